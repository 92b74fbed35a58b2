"""Mixtral with the KV heads its plan gives each layer; a mixture of experts that stays the donor's."""

from huggingface_hub.dataclasses import strict
from transformers import (
    MixtralConfig,
    MixtralForCausalLM,
    MixtralForQuestionAnswering,
    MixtralForSequenceClassification,
    MixtralForTokenClassification,
    MixtralModel,
)
from transformers.conversion_mapping import get_checkpoint_conversion_mapping, register_checkpoint_conversion_mapping
from transformers.generation import GenerationMixin
from transformers.models.mixtral.modeling_mixtral import MixtralAttention, apply_rotary_pos_emb

from .attention_layout import AttentionLayout
from .grouped_attention import NAME
from .layer_plan import Rows
from .native_call import NativeCall
from .planned_attention import PlannedAttention
from .planned_model import PlannedConfig, PlannedHead, PlannedModel


DONOR_LAYOUT = AttentionLayout(
    model_type="mixtral",
    attention="layers.{layer_idx}.self_attn",
    rotary="halves",
    position="RoPE, sliding window",
)


@strict
class GQAMixtralConfig(PlannedConfig, MixtralConfig):
    model_type = "gqa_mixtral"
    layer_plan: Rows = None


class GQAMixtralAttention(NativeCall, PlannedAttention, MixtralAttention):
    donor_layout = DONOR_LAYOUT
    rotate = staticmethod(apply_rotary_pos_emb)

    def __init__(self, config, layer_idx: int):
        super().__init__(config, layer_idx)
        self.sliding_window = config.sliding_window


class GQAMixtralModel(PlannedModel, MixtralModel):
    config: GQAMixtralConfig
    config_class = GQAMixtralConfig
    attention_class = GQAMixtralAttention
    default_attention = NAME


class GQAMixtralHead(PlannedHead):
    config_class = GQAMixtralConfig
    model_class = GQAMixtralModel
    default_attention = NAME


class GQAMixtralForCausalLM(GQAMixtralHead, MixtralForCausalLM, GenerationMixin):
    config: GQAMixtralConfig


class GQAMixtralForSequenceClassification(GQAMixtralHead, MixtralForSequenceClassification):
    config: GQAMixtralConfig


class GQAMixtralForTokenClassification(GQAMixtralHead, MixtralForTokenClassification):
    config: GQAMixtralConfig


class GQAMixtralForQuestionAnswering(GQAMixtralHead, MixtralForQuestionAnswering):
    config: GQAMixtralConfig


# checkpoints hold every expert by itself, the class holds them together: transformers joins them for our class too
register_checkpoint_conversion_mapping("gqa_mixtral", get_checkpoint_conversion_mapping("mixtral"), overwrite=True)
