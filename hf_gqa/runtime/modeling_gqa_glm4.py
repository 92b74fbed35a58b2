"""GLM-4 with the KV heads its plan gives each layer; interleaved rotary pairs in a part of each head."""

from huggingface_hub.dataclasses import strict
from transformers import (
    Glm4Config,
    Glm4ForCausalLM,
    Glm4ForSequenceClassification,
    Glm4ForTokenClassification,
    Glm4Model,
)
from transformers.generation import GenerationMixin
from transformers.models.glm4.modeling_glm4 import Glm4Attention, apply_rotary_pos_emb

from .attention_layout import AttentionLayout
from .grouped_attention import NAME
from .layer_plan import Rows
from .native_call import NativeCall
from .planned_attention import PlannedAttention
from .planned_model import PlannedConfig, PlannedHead, PlannedModel


DONOR_LAYOUT = AttentionLayout(
    model_type="glm4",
    attention="layers.{layer_idx}.self_attn",
    output_normed=True,
    rotary="interleaved",
    position="RoPE, interleaved, in part of each head",
)


@strict
class GQAGlm4Config(PlannedConfig, Glm4Config):
    model_type = "gqa_glm4"
    layer_plan: Rows = None


class GQAGlm4Attention(NativeCall, PlannedAttention, Glm4Attention):
    donor_layout = DONOR_LAYOUT
    rotate = staticmethod(apply_rotary_pos_emb)


class GQAGlm4Model(PlannedModel, Glm4Model):
    config: GQAGlm4Config
    config_class = GQAGlm4Config
    attention_class = GQAGlm4Attention
    default_attention = NAME


class GQAGlm4Head(PlannedHead):
    config_class = GQAGlm4Config
    model_class = GQAGlm4Model
    default_attention = NAME


class GQAGlm4ForCausalLM(GQAGlm4Head, Glm4ForCausalLM, GenerationMixin):
    config: GQAGlm4Config


class GQAGlm4ForSequenceClassification(GQAGlm4Head, Glm4ForSequenceClassification):
    config: GQAGlm4Config


class GQAGlm4ForTokenClassification(GQAGlm4Head, Glm4ForTokenClassification):
    config: GQAGlm4Config
