"""Phi-3 with the KV heads its plan gives each layer; separate query, key and value, one sliding window."""

from huggingface_hub.dataclasses import strict
from transformers import (
    Phi3Config,
    Phi3ForCausalLM,
    Phi3ForSequenceClassification,
    Phi3ForTokenClassification,
    Phi3Model,
)
from transformers.generation import GenerationMixin
from transformers.models.phi3.modeling_phi3 import Phi3Attention, apply_rotary_pos_emb

from .attention_layout import AttentionLayout
from .grouped_attention import NAME
from .layer_plan import Rows
from .native_call import NativeCall
from .planned_attention import PlannedAttention
from .planned_model import PlannedConfig, PlannedHead, PlannedModel


DONOR_LAYOUT = AttentionLayout(
    model_type="phi3",
    attention="layers.{layer_idx}.self_attn",
    fused="qkv_proj",
    rotary="halves",
    position="RoPE, sliding window",
)


@strict
class GQAPhi3Config(PlannedConfig, Phi3Config):
    model_type = "gqa_phi3"
    layer_plan: Rows = None


class GQAPhi3Attention(NativeCall, PlannedAttention, Phi3Attention):
    donor_layout = DONOR_LAYOUT
    rotate = staticmethod(apply_rotary_pos_emb)

    def __init__(self, config, layer_idx: int):
        super().__init__(config, layer_idx)
        self.sliding_window = config.sliding_window


class GQAPhi3Model(PlannedModel, Phi3Model):
    config: GQAPhi3Config
    config_class = GQAPhi3Config
    attention_class = GQAPhi3Attention
    default_attention = NAME


class GQAPhi3Head(PlannedHead):
    config_class = GQAPhi3Config
    model_class = GQAPhi3Model
    default_attention = NAME


class GQAPhi3ForCausalLM(GQAPhi3Head, Phi3ForCausalLM, GenerationMixin):
    config: GQAPhi3Config


class GQAPhi3ForSequenceClassification(GQAPhi3Head, Phi3ForSequenceClassification):
    config: GQAPhi3Config


class GQAPhi3ForTokenClassification(GQAPhi3Head, Phi3ForTokenClassification):
    config: GQAPhi3Config
