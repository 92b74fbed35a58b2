"""Gemma with the KV heads its plan gives each layer."""

from huggingface_hub.dataclasses import strict
from transformers import (
    GemmaConfig,
    GemmaForCausalLM,
    GemmaForSequenceClassification,
    GemmaForTokenClassification,
    GemmaModel,
)
from transformers.generation import GenerationMixin
from transformers.models.gemma.modeling_gemma import GemmaAttention, apply_rotary_pos_emb

from .attention_layout import AttentionLayout
from .grouped_attention import NAME
from .layer_plan import Rows
from .native_call import NativeCall
from .planned_attention import PlannedAttention
from .planned_model import PlannedConfig, PlannedHead, PlannedModel


DONOR_LAYOUT = AttentionLayout(
    model_type="gemma",
    attention="layers.{layer_idx}.self_attn",
    rotary="halves",
    position="RoPE",
)


@strict
class GQAGemmaConfig(PlannedConfig, GemmaConfig):
    model_type = "gqa_gemma"
    layer_plan: Rows = None


class GQAGemmaAttention(NativeCall, PlannedAttention, GemmaAttention):
    donor_layout = DONOR_LAYOUT
    rotate = staticmethod(apply_rotary_pos_emb)


class GQAGemmaModel(PlannedModel, GemmaModel):
    config: GQAGemmaConfig
    config_class = GQAGemmaConfig
    attention_class = GQAGemmaAttention
    default_attention = NAME


class GQAGemmaHead(PlannedHead):
    config_class = GQAGemmaConfig
    model_class = GQAGemmaModel
    default_attention = NAME


class GQAGemmaForCausalLM(GQAGemmaHead, GemmaForCausalLM, GenerationMixin):
    config: GQAGemmaConfig


class GQAGemmaForSequenceClassification(GQAGemmaHead, GemmaForSequenceClassification):
    config: GQAGemmaConfig


class GQAGemmaForTokenClassification(GQAGemmaHead, GemmaForTokenClassification):
    config: GQAGemmaConfig
