"""Phi with the KV heads its plan gives each layer; rotation of a part of each head, query and key norms by a flag."""

import torch
from huggingface_hub.dataclasses import strict
from transformers import PhiConfig, PhiForCausalLM, PhiForSequenceClassification, PhiForTokenClassification, PhiModel
from transformers.generation import GenerationMixin
from transformers.models.phi.modeling_phi import PhiAttention, apply_rotary_pos_emb

from .attention_layout import AttentionLayout
from .grouped_attention import NAME
from .layer_plan import Rows
from .native_call import NativeCall
from .planned_attention import PlannedAttention
from .planned_model import PlannedConfig, PlannedHead, PlannedModel


DONOR_LAYOUT = AttentionLayout(
    model_type="phi",
    attention="layers.{layer_idx}.self_attn",
    output="dense",
    query_norm="q_layernorm",
    key_norm="k_layernorm",
    norm_switch="qk_layernorm",
    rotary="halves",
    position="RoPE in part of each head",
)


@strict
class GQAPhiConfig(PlannedConfig, PhiConfig):
    model_type = "gqa_phi"
    layer_plan: Rows = None


class GQAPhiAttention(NativeCall, PlannedAttention, PhiAttention):
    donor_layout = DONOR_LAYOUT

    def rotate(self, query, key, cos, sin):
        turned = apply_rotary_pos_emb(query[..., : self.rotary_ndims], key[..., : self.rotary_ndims], cos, sin)
        kept = query[..., self.rotary_ndims :], key[..., self.rotary_ndims :]
        return tuple(torch.cat(parts, dim=-1) for parts in zip(turned, kept, strict=True))


class GQAPhiModel(PlannedModel, PhiModel):
    config: GQAPhiConfig
    config_class = GQAPhiConfig
    attention_class = GQAPhiAttention
    default_attention = NAME


class GQAPhiHead(PlannedHead):
    config_class = GQAPhiConfig
    model_class = GQAPhiModel
    default_attention = NAME


class GQAPhiForCausalLM(GQAPhiHead, PhiForCausalLM, GenerationMixin):
    config: GQAPhiConfig


class GQAPhiForSequenceClassification(GQAPhiHead, PhiForSequenceClassification):
    config: GQAPhiConfig


class GQAPhiForTokenClassification(GQAPhiHead, PhiForTokenClassification):
    config: GQAPhiConfig
