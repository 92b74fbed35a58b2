"""Gemma 3 text with the KV heads its plan gives each layer; sliding and full layers, query and key norms."""

from huggingface_hub.dataclasses import strict
from transformers import (
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    Gemma3TextForSequenceClassification,
    Gemma3TextModel,
)
from transformers.generation import GenerationMixin
from transformers.models.gemma3.modeling_gemma3 import Gemma3Attention, apply_rotary_pos_emb

from .attention_layout import AttentionLayout
from .grouped_attention import NAME
from .layer_plan import Rows
from .native_call import NativeCall
from .planned_attention import PlannedAttention
from .planned_model import PlannedConfig, PlannedHead, PlannedModel


DONOR_LAYOUT = AttentionLayout(
    model_type="gemma3_text",
    attention="layers.{layer_idx}.self_attn",
    query_norm="q_norm",
    key_norm="k_norm",
    output_normed=True,
    rotary="halves",
    position="RoPE, sliding and full layers",
)


@strict
class GQAGemma3TextConfig(PlannedConfig, Gemma3TextConfig):
    model_type = "gqa_gemma3_text"
    layer_plan: Rows = None


class GQAGemma3TextAttention(NativeCall, PlannedAttention, Gemma3Attention):
    donor_layout = DONOR_LAYOUT
    rotate = staticmethod(apply_rotary_pos_emb)


class GQAGemma3TextModel(PlannedModel, Gemma3TextModel):
    config: GQAGemma3TextConfig
    config_class = GQAGemma3TextConfig
    attention_class = GQAGemma3TextAttention
    default_attention = NAME


class GQAGemma3TextHead(PlannedHead):
    config_class = GQAGemma3TextConfig
    model_class = GQAGemma3TextModel
    default_attention = NAME


class GQAGemma3TextForCausalLM(GQAGemma3TextHead, Gemma3ForCausalLM, GenerationMixin):
    config: GQAGemma3TextConfig


class GQAGemma3TextForSequenceClassification(GQAGemma3TextHead, Gemma3TextForSequenceClassification):
    config: GQAGemma3TextConfig
