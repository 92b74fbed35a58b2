"""Marian with the KV heads its plan gives each attention of encoder and decoder; translation, sinusoidal positions."""

from huggingface_hub.dataclasses import strict
from transformers import MarianConfig, MarianModel, MarianMTModel
from transformers.generation import GenerationMixin
from transformers.models.marian.modeling_marian import MarianAttention, eager_attention_forward

from .attention_layout import AttentionLayout
from .grouped_attention import NAME
from .layer_plan import Rows
from .native_call import NativeCall
from .planned_model import PlannedHead
from .planned_seq2seq import PlannedSeq2SeqAttention, PlannedSeq2SeqConfig, PlannedSeq2SeqModel


DONOR_LAYOUT = AttentionLayout(
    model_type="marian",
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
class GQAMarianConfig(PlannedSeq2SeqConfig, MarianConfig):
    model_type = "gqa_marian"
    donor_layout = DONOR_LAYOUT
    layer_plan: Rows = None


class GQAMarianAttention(NativeCall, PlannedSeq2SeqAttention, MarianAttention):
    donor_layout = DONOR_LAYOUT
    native_eager = staticmethod(eager_attention_forward)


class GQAMarianModel(PlannedSeq2SeqModel, MarianModel):
    config: GQAMarianConfig
    config_class = GQAMarianConfig
    attention_class = GQAMarianAttention
    default_attention = NAME


class GQAMarianHead(PlannedHead):
    config_class = GQAMarianConfig
    model_class = GQAMarianModel
    default_attention = NAME


class GQAMarianForSeq2SeqLM(GQAMarianHead, MarianMTModel, GenerationMixin):
    config: GQAMarianConfig
