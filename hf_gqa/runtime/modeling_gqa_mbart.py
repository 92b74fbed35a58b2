"""mBART with the KV heads its plan gives each attention of encoder and decoder; norms before each block."""

from huggingface_hub.dataclasses import strict
from transformers import (
    MBartConfig,
    MBartForConditionalGeneration,
    MBartForQuestionAnswering,
    MBartForSequenceClassification,
    MBartModel,
)
from transformers.generation import GenerationMixin
from transformers.models.mbart.modeling_mbart import MBartAttention, eager_attention_forward

from .attention_layout import AttentionLayout
from .grouped_attention import NAME
from .layer_plan import Rows
from .native_call import NativeCall
from .planned_model import PlannedHead
from .planned_seq2seq import PlannedSeq2SeqAttention, PlannedSeq2SeqConfig, PlannedSeq2SeqModel


DONOR_LAYOUT = AttentionLayout(
    model_type="mbart",
    attention="decoder.layers.{layer_idx}.self_attn",
    cross_attention="decoder.layers.{layer_idx}.encoder_attn",
    encoder_attention="encoder.layers.{layer_idx}.self_attn",
    num_layers_field="decoder_layers",
    num_heads_field="decoder_attention_heads",
    num_encoder_layers_field="encoder_layers",
    num_encoder_heads_field="encoder_attention_heads",
    output="out_proj",
    key_value_heads_field=None,
    position="learned",
)


@strict
class GQAMBartConfig(PlannedSeq2SeqConfig, MBartConfig):
    model_type = "gqa_mbart"
    donor_layout = DONOR_LAYOUT
    layer_plan: Rows = None


class GQAMBartAttention(NativeCall, PlannedSeq2SeqAttention, MBartAttention):
    donor_layout = DONOR_LAYOUT
    native_eager = staticmethod(eager_attention_forward)


class GQAMBartModel(PlannedSeq2SeqModel, MBartModel):
    config: GQAMBartConfig
    config_class = GQAMBartConfig
    attention_class = GQAMBartAttention
    default_attention = NAME


class GQAMBartHead(PlannedHead):
    config_class = GQAMBartConfig
    model_class = GQAMBartModel
    default_attention = NAME


class GQAMBartForSeq2SeqLM(GQAMBartHead, MBartForConditionalGeneration, GenerationMixin):
    config: GQAMBartConfig


class GQAMBartForSequenceClassification(GQAMBartHead, MBartForSequenceClassification):
    config: GQAMBartConfig


class GQAMBartForQuestionAnswering(GQAMBartHead, MBartForQuestionAnswering):
    config: GQAMBartConfig
