"""BART with the KV heads its plan gives each attention of encoder and decoder; learned positions."""

from huggingface_hub.dataclasses import strict
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    BartForQuestionAnswering,
    BartForSequenceClassification,
    BartModel,
)
from transformers.generation import GenerationMixin
from transformers.models.bart.modeling_bart import BartAttention, eager_attention_forward

from .attention_layout import AttentionLayout
from .grouped_attention import NAME
from .layer_plan import Rows
from .native_call import NativeCall
from .planned_model import PlannedHead
from .planned_seq2seq import PlannedSeq2SeqAttention, PlannedSeq2SeqConfig, PlannedSeq2SeqModel


DONOR_LAYOUT = AttentionLayout(
    model_type="bart",
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
class GQABartConfig(PlannedSeq2SeqConfig, BartConfig):
    model_type = "gqa_bart"
    donor_layout = DONOR_LAYOUT
    layer_plan: Rows = None


class GQABartAttention(NativeCall, PlannedSeq2SeqAttention, BartAttention):
    donor_layout = DONOR_LAYOUT
    native_eager = staticmethod(eager_attention_forward)


class GQABartModel(PlannedSeq2SeqModel, BartModel):
    config: GQABartConfig
    config_class = GQABartConfig
    attention_class = GQABartAttention
    default_attention = NAME


class GQABartHead(PlannedHead):
    config_class = GQABartConfig
    model_class = GQABartModel
    default_attention = NAME


class GQABartForSeq2SeqLM(GQABartHead, BartForConditionalGeneration, GenerationMixin):
    config: GQABartConfig


class GQABartForSequenceClassification(GQABartHead, BartForSequenceClassification):
    config: GQABartConfig


class GQABartForQuestionAnswering(GQABartHead, BartForQuestionAnswering):
    config: GQABartConfig
