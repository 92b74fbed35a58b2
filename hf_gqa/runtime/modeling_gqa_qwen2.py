"""Qwen2 with the KV heads its plan gives each layer; query, key and value have biases."""

from huggingface_hub.dataclasses import strict
from transformers import (
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen2ForQuestionAnswering,
    Qwen2ForSequenceClassification,
    Qwen2ForTokenClassification,
    Qwen2Model,
)
from transformers.generation import GenerationMixin
from transformers.models.qwen2.modeling_qwen2 import Qwen2Attention, apply_rotary_pos_emb

from .attention_layout import AttentionLayout
from .grouped_attention import NAME
from .layer_plan import Rows
from .native_call import NativeCall
from .planned_attention import PlannedAttention
from .planned_model import PlannedConfig, PlannedHead, PlannedModel


DONOR_LAYOUT = AttentionLayout(
    model_type="qwen2",
    attention="layers.{layer_idx}.self_attn",
    rotary="halves",
    position="RoPE, sliding window in some layers",
)


@strict
class GQAQwen2Config(PlannedConfig, Qwen2Config):
    model_type = "gqa_qwen2"
    layer_plan: Rows = None


class GQAQwen2Attention(NativeCall, PlannedAttention, Qwen2Attention):
    donor_layout = DONOR_LAYOUT
    rotate = staticmethod(apply_rotary_pos_emb)


class GQAQwen2Model(PlannedModel, Qwen2Model):
    config: GQAQwen2Config
    config_class = GQAQwen2Config
    attention_class = GQAQwen2Attention
    default_attention = NAME


class GQAQwen2Head(PlannedHead):
    config_class = GQAQwen2Config
    model_class = GQAQwen2Model
    default_attention = NAME


class GQAQwen2ForCausalLM(GQAQwen2Head, Qwen2ForCausalLM, GenerationMixin):
    config: GQAQwen2Config


class GQAQwen2ForSequenceClassification(GQAQwen2Head, Qwen2ForSequenceClassification):
    config: GQAQwen2Config


class GQAQwen2ForTokenClassification(GQAQwen2Head, Qwen2ForTokenClassification):
    config: GQAQwen2Config


class GQAQwen2ForQuestionAnswering(GQAQwen2Head, Qwen2ForQuestionAnswering):
    config: GQAQwen2Config
