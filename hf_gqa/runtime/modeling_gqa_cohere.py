"""Cohere (Command R) with the KV heads its plan gives each layer; interleaved rotary pairs, a norm per head by a flag."""

from huggingface_hub.dataclasses import strict
from transformers import CohereConfig, CohereForCausalLM, CohereModel
from transformers.generation import GenerationMixin
from transformers.models.cohere.modeling_cohere import CohereAttention, CohereLayerNorm, apply_rotary_pos_emb

from .attention_layout import AttentionLayout
from .grouped_attention import NAME
from .layer_plan import Rows
from .native_call import NativeCall
from .planned_attention import PlannedAttention
from .planned_model import PlannedConfig, PlannedHead, PlannedModel


DONOR_LAYOUT = AttentionLayout(
    model_type="cohere",
    attention="layers.{layer_idx}.self_attn",
    query_norm="q_norm",
    key_norm="k_norm",
    norm_switch="use_qk_norm",
    norm_weights="per_head",
    rotary="interleaved",
    position="RoPE, interleaved",
)


@strict
class GQACohereConfig(PlannedConfig, CohereConfig):
    model_type = "gqa_cohere"
    layer_plan: Rows = None


class GQACohereAttention(NativeCall, PlannedAttention, CohereAttention):
    donor_layout = DONOR_LAYOUT
    rotate = staticmethod(apply_rotary_pos_emb)

    def __init__(self, config, layer_idx: int):
        super().__init__(config, layer_idx)
        if hasattr(self, "k_norm"):  # not where keys are borrowed or norms are switched off
            heads = config.num_attention_heads // self.num_key_value_groups
            self.k_norm = CohereLayerNorm(hidden_size=(heads, self.head_dim), eps=config.layer_norm_eps)


class GQACohereModel(PlannedModel, CohereModel):
    config: GQACohereConfig
    config_class = GQACohereConfig
    attention_class = GQACohereAttention
    default_attention = NAME


class GQACohereForCausalLM(PlannedHead, CohereForCausalLM, GenerationMixin):
    config: GQACohereConfig
    config_class = GQACohereConfig
    model_class = GQACohereModel
    default_attention = NAME
