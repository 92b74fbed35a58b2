"""Qwen3 with the KV heads its plan gives each layer; norms over head_dim on queries and keys."""

from huggingface_hub.dataclasses import strict
from transformers import (
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3ForQuestionAnswering,
    Qwen3ForSequenceClassification,
    Qwen3ForTokenClassification,
    Qwen3Model,
)
from transformers.generation import GenerationMixin
from transformers.models.qwen3.modeling_qwen3 import Qwen3Attention, apply_rotary_pos_emb

from .attention_layout import AttentionLayout
from .grouped_attention import NAME
from .layer_plan import Rows
from .native_call import NativeCall
from .planned_attention import PlannedAttention
from .planned_model import PlannedConfig, PlannedHead, PlannedModel


DONOR_LAYOUT = AttentionLayout(
    model_type="qwen3",
    attention="layers.{layer_idx}.self_attn",
    query_norm="q_norm",
    key_norm="k_norm",
    rotary="halves",
    position="RoPE, sliding window in some layers",
)


@strict
class GQAQwen3Config(PlannedConfig, Qwen3Config):
    model_type = "gqa_qwen3"
    layer_plan: Rows = None


class GQAQwen3Attention(NativeCall, PlannedAttention, Qwen3Attention):
    donor_layout = DONOR_LAYOUT
    rotate = staticmethod(apply_rotary_pos_emb)


class GQAQwen3Model(PlannedModel, Qwen3Model):
    config: GQAQwen3Config
    config_class = GQAQwen3Config
    attention_class = GQAQwen3Attention
    default_attention = NAME


class GQAQwen3Head(PlannedHead):
    config_class = GQAQwen3Config
    model_class = GQAQwen3Model
    default_attention = NAME


class GQAQwen3ForCausalLM(GQAQwen3Head, Qwen3ForCausalLM, GenerationMixin):
    config: GQAQwen3Config


class GQAQwen3ForSequenceClassification(GQAQwen3Head, Qwen3ForSequenceClassification):
    config: GQAQwen3Config


class GQAQwen3ForTokenClassification(GQAQwen3Head, Qwen3ForTokenClassification):
    config: GQAQwen3Config


class GQAQwen3ForQuestionAnswering(GQAQwen3Head, Qwen3ForQuestionAnswering):
    config: GQAQwen3Config
