"""T5 (v1.1 and Flan-T5 too) with the KV heads its plan gives each attention of encoder and decoder."""

from huggingface_hub.dataclasses import strict
from transformers import T5Config, T5ForConditionalGeneration, T5Model
from transformers.generation import GenerationMixin
from transformers.models.t5 import modeling_t5

from .attention_layout import AttentionLayout
from .grouped_attention import NAME
from .layer_plan import Rows
from .native_call import NativeCall
from .planned_model import PlannedHead
from .planned_seq2seq import PlannedSeq2SeqConfig, PlannedSeq2SeqModel, PlannedWholeHead
from .planned_t5_attention import PlannedT5Attention, eager_attention_with_bias


DONOR_LAYOUT = AttentionLayout(
    model_type="t5",
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
    position="relative bias",
)


DEFAULT_ATTENTION = NAME if T5Model._supports_sdpa else "eager"  # older releases of transformers know no other for T5


@strict
class GQAT5Config(PlannedSeq2SeqConfig, T5Config):
    model_type = "gqa_t5"
    donor_layout = DONOR_LAYOUT
    layer_plan: Rows = None


class GQAT5Attention(NativeCall, PlannedT5Attention, modeling_t5.T5Attention):
    donor_layout = DONOR_LAYOUT
    native_eager = staticmethod(getattr(modeling_t5, "eager_attention_forward", eager_attention_with_bias))
    weights_if_asked = not hasattr(modeling_t5, "eager_attention_forward")


class GQAT5Model(PlannedSeq2SeqModel, T5Model):
    config: GQAT5Config
    config_class = GQAT5Config
    attention_class = GQAT5Attention
    default_attention = DEFAULT_ATTENTION


class GQAT5ForSeq2SeqLM(PlannedWholeHead, PlannedHead, T5ForConditionalGeneration, GenerationMixin):
    config: GQAT5Config
    config_class = GQAT5Config
    model_class = GQAT5Model
    default_attention = DEFAULT_ATTENTION
