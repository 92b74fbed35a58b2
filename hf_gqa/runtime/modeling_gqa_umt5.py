"""UUMT5 with the KV heads its plan gives each attention of encoder and decoder; every layer has a bias of its own."""

from huggingface_hub.dataclasses import strict
from transformers import UMT5Config, UMT5ForConditionalGeneration, UMT5Model
from transformers.generation import GenerationMixin
from transformers.models.umt5 import modeling_umt5

from .attention_layout import AttentionLayout
from .grouped_attention import NAME
from .layer_plan import Rows
from .native_call import NativeCall
from .planned_model import PlannedHead
from .planned_seq2seq import PlannedSeq2SeqConfig, PlannedSeq2SeqModel, PlannedWholeHead
from .planned_t5_attention import PlannedT5Attention, eager_attention_with_bias


DONOR_LAYOUT = AttentionLayout(
    model_type="umt5",
    attention="decoder.block.{layer_idx}.layer.0.SelfAttention",
    cross_attention="decoder.block.{layer_idx}.layer.1.EncDecAttention",
    encoder_attention="encoder.block.{layer_idx}.layer.0.SelfAttention",
    num_layers_field="num_decoder_layers",
    query="q",
    key="k",
    value="v",
    output="o",
    key_value_heads_field=None,
    head_positions="always",
    position="relative bias in every layer",
)


DEFAULT_ATTENTION = (
    NAME if UMT5Model._supports_sdpa else "eager"
)  # older releases of transformers know no other for UMT5


@strict
class GQAUMT5Config(PlannedSeq2SeqConfig, UMT5Config):
    model_type = "gqa_umt5"
    donor_layout = DONOR_LAYOUT
    layer_plan: Rows = None


class GQAUMT5Attention(NativeCall, PlannedT5Attention, modeling_umt5.UMT5Attention):
    donor_layout = DONOR_LAYOUT
    native_eager = staticmethod(getattr(modeling_umt5, "eager_attention_forward", eager_attention_with_bias))

    makes_itself = frozenset({"position_bias"})

    def compute(self, hidden_states, **kwargs):
        """The output `[B, Q, E]`, and the attention weights where there are any."""
        output, _, weights = super().compute(hidden_states, **kwargs)
        return output, weights


class GQAUMT5Model(PlannedSeq2SeqModel, UMT5Model):
    config: GQAUMT5Config
    config_class = GQAUMT5Config
    attention_class = GQAUMT5Attention
    default_attention = DEFAULT_ATTENTION


class GQAUMT5ForSeq2SeqLM(PlannedWholeHead, PlannedHead, UMT5ForConditionalGeneration, GenerationMixin):
    config: GQAUMT5Config
    config_class = GQAUMT5Config
    model_class = GQAUMT5Model
    default_attention = DEFAULT_ATTENTION
