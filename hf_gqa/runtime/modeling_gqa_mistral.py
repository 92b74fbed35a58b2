"""Mistral with the KV heads its plan gives each layer; one sliding window for all layers."""

from huggingface_hub.dataclasses import strict
from transformers import (
    MistralConfig,
    MistralForCausalLM,
    MistralForQuestionAnswering,
    MistralForSequenceClassification,
    MistralForTokenClassification,
    MistralModel,
)
from transformers.generation import GenerationMixin
from transformers.models.mistral.modeling_mistral import MistralAttention, apply_rotary_pos_emb

from .attention_layout import AttentionLayout
from .grouped_attention import NAME
from .layer_plan import Rows
from .native_call import NativeCall
from .planned_attention import PlannedAttention
from .planned_model import PlannedConfig, PlannedHead, PlannedModel


DONOR_LAYOUT = AttentionLayout(
    model_type="mistral",
    attention="layers.{layer_idx}.self_attn",
    rotary="halves",
    position="RoPE, sliding window",
)


@strict
class GQAMistralConfig(PlannedConfig, MistralConfig):
    model_type = "gqa_mistral"
    layer_plan: Rows = None


class GQAMistralAttention(NativeCall, PlannedAttention, MistralAttention):
    donor_layout = DONOR_LAYOUT
    rotate = staticmethod(apply_rotary_pos_emb)

    def __init__(self, config, layer_idx: int):
        super().__init__(config, layer_idx)
        self.sliding_window = config.sliding_window


class GQAMistralModel(PlannedModel, MistralModel):
    config: GQAMistralConfig
    config_class = GQAMistralConfig
    attention_class = GQAMistralAttention
    default_attention = NAME


class GQAMistralHead(PlannedHead):
    config_class = GQAMistralConfig
    model_class = GQAMistralModel
    default_attention = NAME


class GQAMistralForCausalLM(GQAMistralHead, MistralForCausalLM, GenerationMixin):
    config: GQAMistralConfig


class GQAMistralForSequenceClassification(GQAMistralHead, MistralForSequenceClassification):
    config: GQAMistralConfig


class GQAMistralForTokenClassification(GQAMistralHead, MistralForTokenClassification):
    config: GQAMistralConfig


class GQAMistralForQuestionAnswering(GQAMistralHead, MistralForQuestionAnswering):
    config: GQAMistralConfig
