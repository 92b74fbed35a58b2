"""ModernBERT with the KV heads its plan gives each layer; an encoder with global and local layers."""

from huggingface_hub.dataclasses import strict
from transformers import (
    ModernBertConfig,
    ModernBertForMaskedLM,
    ModernBertForMultipleChoice,
    ModernBertForQuestionAnswering,
    ModernBertForSequenceClassification,
    ModernBertForTokenClassification,
    ModernBertModel,
)
from transformers.models.modernbert.modeling_modernbert import ModernBertAttention, apply_rotary_pos_emb

from .attention_layout import AttentionLayout
from .grouped_attention import NAME
from .layer_plan import Rows
from .native_call import NativeCall
from .planned_attention import PlannedAttention
from .planned_model import PlannedConfig, PlannedHead, PlannedModel


DONOR_LAYOUT = AttentionLayout(
    model_type="modernbert",
    attention="layers.{layer_idx}.attn",
    fused="Wqkv",
    output="Wo",
    rotary="halves",
    key_value_heads_field=None,
    bidirectional=True,
    position="RoPE, sliding and full layers",
)


@strict
class GQAModernBertConfig(PlannedConfig, ModernBertConfig):
    model_type = "gqa_modernbert"
    num_key_value_heads: int | None = None
    layer_plan: Rows = None


class GQAModernBertAttention(NativeCall, PlannedAttention, ModernBertAttention):
    donor_layout = DONOR_LAYOUT
    rotate = staticmethod(apply_rotary_pos_emb)

    def __init__(self, config, layer_idx: int):
        super().__init__(config, layer_idx)
        self.scaling = self.head_dim**-0.5

    def compute(self, hidden_states, **kwargs):
        output, weights = super().compute(hidden_states, deterministic=self.deterministic_flash_attn, **kwargs)
        return self.out_drop(output), weights


class GQAModernBertInit:
    """Mixin for model classes: the native initialisation of an attention knows one fused projection."""

    def _init_weights(self, module):
        if not isinstance(module, GQAModernBertAttention):
            super()._init_weights(module)
            return
        for projection in (module.q_proj, module.k_proj, module.v_proj):
            object.__setattr__(module, "Wqkv", projection)
            super()._init_weights(module)
        object.__delattr__(module, "Wqkv")


class GQAModernBertModel(GQAModernBertInit, PlannedModel, ModernBertModel):
    config: GQAModernBertConfig
    config_class = GQAModernBertConfig
    attention_class = GQAModernBertAttention
    default_attention = NAME


class GQAModernBertHead(GQAModernBertInit, PlannedHead):
    config_class = GQAModernBertConfig
    model_class = GQAModernBertModel
    default_attention = NAME


class GQAModernBertForMaskedLM(GQAModernBertHead, ModernBertForMaskedLM):
    config: GQAModernBertConfig


class GQAModernBertForSequenceClassification(GQAModernBertHead, ModernBertForSequenceClassification):
    config: GQAModernBertConfig


class GQAModernBertForTokenClassification(GQAModernBertHead, ModernBertForTokenClassification):
    config: GQAModernBertConfig


class GQAModernBertForQuestionAnswering(GQAModernBertHead, ModernBertForQuestionAnswering):
    config: GQAModernBertConfig


class GQAModernBertForMultipleChoice(GQAModernBertHead, ModernBertForMultipleChoice):
    config: GQAModernBertConfig
