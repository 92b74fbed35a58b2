"""Pegasus with the KV heads its plan gives each attention of encoder and decoder; sinusoidal positions."""

from huggingface_hub.dataclasses import strict
from transformers import PegasusConfig, PegasusForConditionalGeneration, PegasusModel
from transformers.generation import GenerationMixin
from transformers.models.pegasus.modeling_pegasus import PegasusAttention, eager_attention_forward

from .attention_layout import AttentionLayout
from .grouped_attention import NAME
from .layer_plan import Rows
from .native_call import NativeCall
from .planned_model import PlannedHead
from .planned_seq2seq import PlannedSeq2SeqAttention, PlannedSeq2SeqConfig, PlannedSeq2SeqModel


DONOR_LAYOUT = AttentionLayout(
    model_type="pegasus",
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
class GQAPegasusConfig(PlannedSeq2SeqConfig, PegasusConfig):
    model_type = "gqa_pegasus"
    donor_layout = DONOR_LAYOUT
    layer_plan: Rows = None


class GQAPegasusAttention(NativeCall, PlannedSeq2SeqAttention, PegasusAttention):
    donor_layout = DONOR_LAYOUT
    native_eager = staticmethod(eager_attention_forward)


class GQAPegasusModel(PlannedSeq2SeqModel, PegasusModel):
    config: GQAPegasusConfig
    config_class = GQAPegasusConfig
    attention_class = GQAPegasusAttention
    default_attention = NAME


class GQAPegasusHead(PlannedHead):
    config_class = GQAPegasusConfig
    model_class = GQAPegasusModel
    default_attention = NAME


class GQAPegasusForSeq2SeqLM(GQAPegasusHead, PegasusForConditionalGeneration, GenerationMixin):
    config: GQAPegasusConfig
