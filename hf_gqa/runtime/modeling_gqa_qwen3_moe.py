"""Qwen3 MoE with the KV heads its plan gives each layer; norms over head_dim, experts stay the donor's."""

from huggingface_hub.dataclasses import strict
from transformers import (
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
    Qwen3MoeForQuestionAnswering,
    Qwen3MoeForSequenceClassification,
    Qwen3MoeForTokenClassification,
    Qwen3MoeModel,
)
from transformers.conversion_mapping import get_checkpoint_conversion_mapping, register_checkpoint_conversion_mapping
from transformers.generation import GenerationMixin
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeAttention, apply_rotary_pos_emb

from .attention_layout import AttentionLayout
from .grouped_attention import NAME
from .layer_plan import Rows
from .native_call import NativeCall
from .planned_attention import PlannedAttention
from .planned_model import PlannedConfig, PlannedHead, PlannedModel


DONOR_LAYOUT = AttentionLayout(
    model_type="qwen3_moe",
    attention="layers.{layer_idx}.self_attn",
    query_norm="q_norm",
    key_norm="k_norm",
    rotary="halves",
    position="RoPE, sliding window",
)


@strict
class GQAQwen3MoeConfig(PlannedConfig, Qwen3MoeConfig):
    model_type = "gqa_qwen3_moe"
    layer_plan: Rows = None


class GQAQwen3MoeAttention(NativeCall, PlannedAttention, Qwen3MoeAttention):
    donor_layout = DONOR_LAYOUT
    rotate = staticmethod(apply_rotary_pos_emb)


class GQAQwen3MoeModel(PlannedModel, Qwen3MoeModel):
    config: GQAQwen3MoeConfig
    config_class = GQAQwen3MoeConfig
    attention_class = GQAQwen3MoeAttention
    default_attention = NAME


class GQAQwen3MoeHead(PlannedHead):
    config_class = GQAQwen3MoeConfig
    model_class = GQAQwen3MoeModel
    default_attention = NAME


class GQAQwen3MoeForCausalLM(GQAQwen3MoeHead, Qwen3MoeForCausalLM, GenerationMixin):
    config: GQAQwen3MoeConfig


class GQAQwen3MoeForSequenceClassification(GQAQwen3MoeHead, Qwen3MoeForSequenceClassification):
    config: GQAQwen3MoeConfig


class GQAQwen3MoeForTokenClassification(GQAQwen3MoeHead, Qwen3MoeForTokenClassification):
    config: GQAQwen3MoeConfig


class GQAQwen3MoeForQuestionAnswering(GQAQwen3MoeHead, Qwen3MoeForQuestionAnswering):
    config: GQAQwen3MoeConfig


# checkpoints hold every expert by itself, the class holds them together: transformers joins them for our class too
register_checkpoint_conversion_mapping("gqa_qwen3_moe", get_checkpoint_conversion_mapping("qwen3_moe"), overwrite=True)
