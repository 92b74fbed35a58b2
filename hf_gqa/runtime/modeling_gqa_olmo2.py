"""OLMo 2 with the KV heads its plan gives each layer; norms over all query heads and over all KV heads."""

from huggingface_hub.dataclasses import strict
from transformers import Olmo2Config, Olmo2ForCausalLM, Olmo2Model
from transformers.generation import GenerationMixin
from transformers.models.olmo2.modeling_olmo2 import Olmo2Attention, Olmo2RMSNorm, apply_rotary_pos_emb

from .attention_layout import AttentionLayout
from .grouped_attention import NAME
from .layer_plan import Rows
from .native_call import NativeCall
from .planned_attention import PlannedAttention
from .planned_model import PlannedConfig, PlannedHead, PlannedModel


DONOR_LAYOUT = AttentionLayout(
    model_type="olmo2",
    attention="layers.{layer_idx}.self_attn",
    query_norm="q_norm",
    key_norm="k_norm",
    norm_weights="joint",
    output_normed=True,
    rotary="halves",
    position="RoPE",
)


@strict
class GQAOlmo2Config(PlannedConfig, Olmo2Config):
    model_type = "gqa_olmo2"
    layer_plan: Rows = None


class GQAOlmo2Attention(NativeCall, PlannedAttention, Olmo2Attention):
    donor_layout = DONOR_LAYOUT
    rotate = staticmethod(apply_rotary_pos_emb)

    def __init__(self, config, layer_idx: int):
        super().__init__(config, layer_idx)
        if hasattr(self, "k_norm"):  # not where keys are borrowed
            heads = config.num_attention_heads // self.num_key_value_groups
            self.k_norm = Olmo2RMSNorm(heads * self.head_dim, config.rms_norm_eps)


class GQAOlmo2Model(PlannedModel, Olmo2Model):
    config: GQAOlmo2Config
    config_class = GQAOlmo2Config
    attention_class = GQAOlmo2Attention
    default_attention = NAME


class GQAOlmo2ForCausalLM(PlannedHead, Olmo2ForCausalLM, GenerationMixin):
    config: GQAOlmo2Config
    config_class = GQAOlmo2Config
    model_class = GQAOlmo2Model
    default_attention = NAME
