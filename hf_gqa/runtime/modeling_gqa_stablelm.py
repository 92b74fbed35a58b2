"""StableLM with the KV heads its plan gives each layer; rotation of a part of each head, a norm per head by a flag."""

import torch
from huggingface_hub.dataclasses import strict
from transformers import (
    StableLmConfig,
    StableLmForCausalLM,
    StableLmForSequenceClassification,
    StableLmForTokenClassification,
    StableLmModel,
)
from transformers.generation import GenerationMixin
from transformers.models.stablelm.modeling_stablelm import (
    StableLmAttention,
    StableLmLayerNormPerHead,
    apply_rotary_pos_emb,
)

from .attention_layout import AttentionLayout
from .grouped_attention import NAME
from .layer_plan import Rows
from .native_call import NativeCall
from .planned_attention import PlannedAttention
from .planned_model import PlannedConfig, PlannedHead, PlannedModel


DONOR_LAYOUT = AttentionLayout(
    model_type="stablelm",
    attention="layers.{layer_idx}.self_attn",
    query_norm="q_layernorm",
    key_norm="k_layernorm",
    norm_switch="qk_layernorm",
    norm_weights="per_head",
    norm_list="norms",
    rotary="halves",
    passes_keywords=False,
    position="RoPE in part of each head",
)


@strict
class GQAStableLmConfig(PlannedConfig, StableLmConfig):
    model_type = "gqa_stablelm"
    layer_plan: Rows = None


class GQAStableLmAttention(NativeCall, PlannedAttention, StableLmAttention):
    donor_layout = DONOR_LAYOUT

    def __init__(self, config, layer_idx: int):
        super().__init__(config, layer_idx)
        if hasattr(self, "k_layernorm"):  # not where keys are borrowed or norms are switched off
            heads = config.num_attention_heads // self.num_key_value_groups
            self.k_layernorm = StableLmLayerNormPerHead(self.head_dim, heads, eps=config.layer_norm_eps)

    def normed(self, norm, states):
        """The native norm wants heads before tokens."""
        return None if states is None else super().normed(norm, states.transpose(1, 2)).transpose(1, 2)

    def rotate(self, query, key, cos, sin):
        turned = apply_rotary_pos_emb(query[..., : self.rotary_ndims], key[..., : self.rotary_ndims], cos, sin)
        kept = query[..., self.rotary_ndims :], key[..., self.rotary_ndims :]
        return tuple(torch.cat(parts, dim=-1) for parts in zip(turned, kept, strict=True))


class GQAStableLmModel(PlannedModel, StableLmModel):
    config: GQAStableLmConfig
    config_class = GQAStableLmConfig
    attention_class = GQAStableLmAttention
    default_attention = NAME


class GQAStableLmHead(PlannedHead):
    config_class = GQAStableLmConfig
    model_class = GQAStableLmModel
    default_attention = NAME


class GQAStableLmForCausalLM(GQAStableLmHead, StableLmForCausalLM, GenerationMixin):
    config: GQAStableLmConfig


class GQAStableLmForSequenceClassification(GQAStableLmHead, StableLmForSequenceClassification):
    config: GQAStableLmConfig


class GQAStableLmForTokenClassification(GQAStableLmHead, StableLmForTokenClassification):
    config: GQAStableLmConfig
