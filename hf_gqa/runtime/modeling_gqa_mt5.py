"""mT5 with the KV heads its plan gives each attention of encoder and decoder."""

from huggingface_hub.dataclasses import strict
from transformers import MT5Config, MT5ForConditionalGeneration, MT5Model
from transformers.generation import GenerationMixin
from transformers.models.mt5 import modeling_mt5

from .attention_layout import AttentionLayout
from .grouped_attention import NAME
from .layer_plan import Rows
from .native_call import NativeCall
from .planned_model import PlannedHead
from .planned_seq2seq import PlannedSeq2SeqConfig, PlannedSeq2SeqModel, PlannedWholeHead
from .planned_t5_attention import PlannedT5Attention, eager_attention_with_bias


DONOR_LAYOUT = AttentionLayout(
    model_type="mt5",
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


DEFAULT_ATTENTION = NAME if MT5Model._supports_sdpa else "eager"  # older releases of transformers know no other for mT5


@strict
class GQAMT5Config(PlannedSeq2SeqConfig, MT5Config):
    model_type = "gqa_mt5"
    donor_layout = DONOR_LAYOUT
    layer_plan: Rows = None


class GQAMT5Attention(NativeCall, PlannedT5Attention, modeling_mt5.MT5Attention):
    donor_layout = DONOR_LAYOUT
    native_eager = staticmethod(getattr(modeling_mt5, "eager_attention_forward", eager_attention_with_bias))
    weights_if_asked = not hasattr(modeling_mt5, "eager_attention_forward")


class GQAMT5Model(PlannedSeq2SeqModel, MT5Model):
    config: GQAMT5Config
    config_class = GQAMT5Config
    attention_class = GQAMT5Attention
    default_attention = DEFAULT_ATTENTION


class GQAMT5ForSeq2SeqLM(PlannedWholeHead, PlannedHead, MT5ForConditionalGeneration, GenerationMixin):
    config: GQAMT5Config
    config_class = GQAMT5Config
    model_class = GQAMT5Model
    default_attention = DEFAULT_ATTENTION
