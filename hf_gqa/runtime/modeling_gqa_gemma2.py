"""Gemma 2 with the KV heads its plan gives each layer; capped scores, sliding and full layers."""

from huggingface_hub.dataclasses import strict
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    Gemma2ForSequenceClassification,
    Gemma2ForTokenClassification,
    Gemma2Model,
)
from transformers.generation import GenerationMixin
from transformers.models.gemma2.modeling_gemma2 import Gemma2Attention, apply_rotary_pos_emb

from .attention_layout import AttentionLayout
from .grouped_attention import NAME
from .layer_plan import Rows
from .native_call import NativeCall
from .planned_attention import PlannedAttention
from .planned_model import PlannedConfig, PlannedHead, PlannedModel


DONOR_LAYOUT = AttentionLayout(
    model_type="gemma2",
    attention="layers.{layer_idx}.self_attn",
    output_normed=True,
    rotary="halves",
    position="RoPE, sliding and full layers",
)


@strict
class GQAGemma2Config(PlannedConfig, Gemma2Config):
    model_type = "gqa_gemma2"
    layer_plan: Rows = None


class GQAGemma2Attention(NativeCall, PlannedAttention, Gemma2Attention):
    donor_layout = DONOR_LAYOUT
    rotate = staticmethod(apply_rotary_pos_emb)


class GQAGemma2Model(PlannedModel, Gemma2Model):
    config: GQAGemma2Config
    config_class = GQAGemma2Config
    attention_class = GQAGemma2Attention
    default_attention = NAME


class GQAGemma2Head(PlannedHead):
    config_class = GQAGemma2Config
    model_class = GQAGemma2Model
    default_attention = NAME


class GQAGemma2ForCausalLM(GQAGemma2Head, Gemma2ForCausalLM, GenerationMixin):
    config: GQAGemma2Config


class GQAGemma2ForSequenceClassification(GQAGemma2Head, Gemma2ForSequenceClassification):
    config: GQAGemma2Config


class GQAGemma2ForTokenClassification(GQAGemma2Head, Gemma2ForTokenClassification):
    config: GQAGemma2Config
