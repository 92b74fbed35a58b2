"""Granite with the KV heads its plan gives each layer; factors on scores and on what attention puts out."""

from huggingface_hub.dataclasses import strict
from transformers import GraniteConfig, GraniteForCausalLM, GraniteModel
from transformers.generation import GenerationMixin
from transformers.models.granite.modeling_granite import GraniteAttention, apply_rotary_pos_emb

from .attention_layout import AttentionLayout
from .grouped_attention import NAME
from .layer_plan import Rows
from .native_call import NativeCall
from .planned_attention import PlannedAttention
from .planned_model import PlannedConfig, PlannedHead, PlannedModel


DONOR_LAYOUT = AttentionLayout(
    model_type="granite",
    attention="layers.{layer_idx}.self_attn",
    output_normed=True,
    rotary="halves",
    position="RoPE",
)


@strict
class GQAGraniteConfig(PlannedConfig, GraniteConfig):
    model_type = "gqa_granite"
    layer_plan: Rows = None


class GQAGraniteAttention(NativeCall, PlannedAttention, GraniteAttention):
    donor_layout = DONOR_LAYOUT
    rotate = staticmethod(apply_rotary_pos_emb)


class GQAGraniteModel(PlannedModel, GraniteModel):
    config: GQAGraniteConfig
    config_class = GQAGraniteConfig
    attention_class = GQAGraniteAttention
    default_attention = NAME


class GQAGraniteForCausalLM(PlannedHead, GraniteForCausalLM, GenerationMixin):
    config: GQAGraniteConfig
    config_class = GQAGraniteConfig
    model_class = GQAGraniteModel
    default_attention = NAME
