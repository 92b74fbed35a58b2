"""SmolLM3 with the KV heads its plan gives each layer; some layers rotate nothing."""

from huggingface_hub.dataclasses import strict
from transformers import (
    SmolLM3Config,
    SmolLM3ForCausalLM,
    SmolLM3ForQuestionAnswering,
    SmolLM3ForSequenceClassification,
    SmolLM3ForTokenClassification,
    SmolLM3Model,
)
from transformers.generation import GenerationMixin
from transformers.models.smollm3.modeling_smollm3 import SmolLM3Attention, apply_rotary_pos_emb

from .attention_layout import AttentionLayout
from .grouped_attention import NAME
from .layer_plan import Rows
from .native_call import NativeCall
from .planned_attention import PlannedAttention
from .planned_model import PlannedConfig, PlannedHead, PlannedModel


DONOR_LAYOUT = AttentionLayout(
    model_type="smollm3",
    attention="layers.{layer_idx}.self_attn",
    rotary="halves",
    position="RoPE in some layers, sliding window in some",
)


@strict
class GQASmolLM3Config(PlannedConfig, SmolLM3Config):
    model_type = "gqa_smollm3"
    layer_plan: Rows = None


class GQASmolLM3Attention(NativeCall, PlannedAttention, SmolLM3Attention):
    donor_layout = DONOR_LAYOUT

    def rotate(self, query, key, cos, sin):
        return apply_rotary_pos_emb(query, key, cos, sin) if self.use_rope else (query, key)


class GQASmolLM3Model(PlannedModel, SmolLM3Model):
    config: GQASmolLM3Config
    config_class = GQASmolLM3Config
    attention_class = GQASmolLM3Attention
    default_attention = NAME


class GQASmolLM3Head(PlannedHead):
    config_class = GQASmolLM3Config
    model_class = GQASmolLM3Model
    default_attention = NAME


class GQASmolLM3ForCausalLM(GQASmolLM3Head, SmolLM3ForCausalLM, GenerationMixin):
    config: GQASmolLM3Config


class GQASmolLM3ForSequenceClassification(GQASmolLM3Head, SmolLM3ForSequenceClassification):
    config: GQASmolLM3Config


class GQASmolLM3ForTokenClassification(GQASmolLM3Head, SmolLM3ForTokenClassification):
    config: GQASmolLM3Config


class GQASmolLM3ForQuestionAnswering(GQASmolLM3Head, SmolLM3ForQuestionAnswering):
    config: GQASmolLM3Config
