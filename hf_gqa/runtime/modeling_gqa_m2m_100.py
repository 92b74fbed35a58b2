"""M2M-100 and NLLB with the KV heads its plan gives each attention of encoder and decoder; sinusoidal positions."""

from huggingface_hub.dataclasses import strict
from transformers import M2M100Config, M2M100ForConditionalGeneration, M2M100Model
from transformers.generation import GenerationMixin
from transformers.models.m2m_100.modeling_m2m_100 import M2M100Attention, eager_attention_forward

from .attention_layout import AttentionLayout
from .grouped_attention import NAME
from .layer_plan import Rows
from .native_call import NativeCall
from .planned_model import PlannedHead
from .planned_seq2seq import PlannedSeq2SeqAttention, PlannedSeq2SeqConfig, PlannedSeq2SeqModel


DONOR_LAYOUT = AttentionLayout(
    model_type="m2m_100",
    attention="decoder.layers.{layer_idx}.self_attn",
    cross_attention="decoder.layers.{layer_idx}.encoder_attn",
    encoder_attention="encoder.layers.{layer_idx}.self_attn",
    num_layers_field="decoder_layers",
    num_heads_field="decoder_attention_heads",
    num_encoder_layers_field="encoder_layers",
    num_encoder_heads_field="encoder_attention_heads",
    output="out_proj",
    key_value_heads_field=None,
    position="sinusoidal",
)


@strict
class GQAM2M100Config(PlannedSeq2SeqConfig, M2M100Config):
    model_type = "gqa_m2m_100"
    donor_layout = DONOR_LAYOUT
    layer_plan: Rows = None


class GQAM2M100Attention(NativeCall, PlannedSeq2SeqAttention, M2M100Attention):
    donor_layout = DONOR_LAYOUT
    native_eager = staticmethod(eager_attention_forward)


class GQAM2M100Model(PlannedSeq2SeqModel, M2M100Model):
    config: GQAM2M100Config
    config_class = GQAM2M100Config
    attention_class = GQAM2M100Attention
    default_attention = NAME


class GQAM2M100Head(PlannedHead):
    config_class = GQAM2M100Config
    model_class = GQAM2M100Model
    default_attention = NAME


class GQAM2M100ForSeq2SeqLM(GQAM2M100Head, M2M100ForConditionalGeneration, GenerationMixin):
    config: GQAM2M100Config
