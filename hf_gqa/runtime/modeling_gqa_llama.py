"""Llama with the KV heads its plan gives each layer."""

from huggingface_hub.dataclasses import strict
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForQuestionAnswering,
    LlamaForSequenceClassification,
    LlamaForTokenClassification,
    LlamaModel,
)
from transformers.generation import GenerationMixin
from transformers.models.llama.modeling_llama import LlamaAttention, apply_rotary_pos_emb

from .attention_layout import AttentionLayout
from .grouped_attention import NAME
from .layer_plan import Rows
from .native_call import NativeCall
from .planned_attention import PlannedAttention
from .planned_model import PlannedConfig, PlannedHead, PlannedModel


DONOR_LAYOUT = AttentionLayout(
    model_type="llama",
    attention="layers.{layer_idx}.self_attn",
    rotary="halves",
    position="RoPE",
)


@strict
class GQALlamaConfig(PlannedConfig, LlamaConfig):
    model_type = "gqa_llama"
    layer_plan: Rows = None


class GQALlamaAttention(NativeCall, PlannedAttention, LlamaAttention):
    donor_layout = DONOR_LAYOUT
    rotate = staticmethod(apply_rotary_pos_emb)


class GQALlamaModel(PlannedModel, LlamaModel):
    config: GQALlamaConfig
    config_class = GQALlamaConfig
    attention_class = GQALlamaAttention
    default_attention = NAME


class GQALlamaHead(PlannedHead):
    config_class = GQALlamaConfig
    model_class = GQALlamaModel
    default_attention = NAME


class GQALlamaForCausalLM(GQALlamaHead, LlamaForCausalLM, GenerationMixin):
    config: GQALlamaConfig


class GQALlamaForSequenceClassification(GQALlamaHead, LlamaForSequenceClassification):
    config: GQALlamaConfig


class GQALlamaForTokenClassification(GQALlamaHead, LlamaForTokenClassification):
    config: GQALlamaConfig


class GQALlamaForQuestionAnswering(GQALlamaHead, LlamaForQuestionAnswering):
    config: GQALlamaConfig
