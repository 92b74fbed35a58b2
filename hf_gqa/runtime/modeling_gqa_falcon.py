"""Falcon with the KV heads its plan gives each layer; RoPE or ALiBi."""

import functools
import math

import torch
from huggingface_hub.dataclasses import strict
from torch import nn
from transformers import (
    FalconConfig,
    FalconForCausalLM,
    FalconForQuestionAnswering,
    FalconForSequenceClassification,
    FalconForTokenClassification,
    FalconModel,
)
from transformers.generation import GenerationMixin
from transformers.masking_utils import create_masks_for_generate
from transformers.models.falcon.modeling_falcon import FalconAttention, FalconLinear, apply_rotary_pos_emb

from .attention_layout import AttentionLayout
from .grouped_attention import NAME
from .layer_plan import Rows
from .linear_biases import padded
from .native_call import NativeCall, cache_argument, cache_in
from .planned_attention import PlannedAttention
from .planned_model import BuiltEagerly, PlannedConfig, PlannedHead, PlannedModel


DONOR_LAYOUT = AttentionLayout(
    model_type="falcon",
    attention="h.{layer_idx}.self_attention",
    fused="query_key_value",
    fused_blocks=None,
    output="dense",
    rotary="halves",
    key_value_heads_field=None,
    plain_scores=False,
    passes_keywords=False,
    head_positions="alibi",
    position="RoPE or ALiBi",
)


MODEL_CACHE = cache_argument(FalconModel.forward)


@strict
class GQAFalconConfig(PlannedConfig, FalconConfig):
    model_type = "gqa_falcon"
    num_key_value_heads: int | None = None
    layer_plan: Rows = None


def native_key_value_heads(config) -> int:
    """Of a native configuration: the new architecture has any number, the old one head or all of them."""
    if config.multi_query and not config.new_decoder_architecture:
        return 1
    return config.num_kv_heads


def native_fields(config, num_key_value_heads: int) -> dict | str:
    """What a native configuration says of this many KV heads, or why it cannot."""
    every = num_key_value_heads == config.num_attention_heads
    if config.new_decoder_architecture:
        if num_key_value_heads == native_key_value_heads(config) or every:
            return {"num_kv_heads": num_key_value_heads}
        return "a native falcon of the new architecture repeats keys and values before it caches them"
    if num_key_value_heads == 1:
        return {"multi_query": True}
    if every:
        return {"multi_query": False, "num_kv_heads": num_key_value_heads}
    return "a native falcon has one KV head, or as many as query heads"


def eager_attention(module, query, key, value, attention_mask, scaling, dropout=0.0, **kwargs):
    """`[B, Q, H, D]` and weights `[B, H, Q, S]`, in the native order of operations."""
    key = key.repeat_interleave(module.num_key_value_groups, dim=1)
    value = value.repeat_interleave(module.num_key_value_groups, dim=1)
    scores = query @ key.transpose(2, 3) / math.sqrt(module.head_dim)
    weights = nn.functional.softmax(scores + attention_mask, dim=-1, dtype=query.dtype)
    weights = nn.functional.dropout(weights, p=dropout, training=module.training)
    return (weights @ value).transpose(1, 2), weights


class GQAFalconAttention(NativeCall, PlannedAttention, FalconAttention):
    donor_layout = DONOR_LAYOUT
    linear_class = FalconLinear
    eager = staticmethod(eager_attention)

    def __init__(self, config, layer_idx: int):
        super().__init__(config, layer_idx)
        del self.attention_dropout
        self.attention_dropout = (
            config.attention_dropout if config.alibi else 0.0
        )  # the native class drops nothing else
        self.scaling = self.inv_norm_factor
        self.rotate = None if config.alibi else apply_rotary_pos_emb

    def compute(self, hidden_states, alibi=None, **kwargs):
        """The mask holds the linear biases already. The native eager attention adds them a second time; this does not."""
        return super().compute(hidden_states, **kwargs)


class GQAFalconModel(BuiltEagerly, PlannedModel, FalconModel):
    config: GQAFalconConfig
    config_class = GQAFalconConfig
    attention_class = GQAFalconAttention
    default_attention = NAME

    @functools.wraps(FalconModel.forward)  # for those who read its signature
    def forward(self, input_ids=None, *, attention_mask=None, inputs_embeds=None, **kwargs):
        """Linear biases are as long as the attention mask; keys are longer in a static cache."""
        cache = kwargs.get(MODEL_CACHE, cache_in(kwargs.values()))
        if self.use_alibi and cache is not None:
            tokens = input_ids if inputs_embeds is None else inputs_embeds
            length, before = cache.get_mask_sizes(tokens.shape[1], 0)[0], cache.get_seq_length()
            if attention_mask is None:
                attention_mask = tokens.new_ones(len(tokens), before + tokens.shape[1], dtype=torch.long)
            attention_mask = padded(attention_mask, length)
        return super().forward(input_ids, attention_mask=attention_mask, inputs_embeds=inputs_embeds, **kwargs)


class GQAFalconHead(BuiltEagerly, PlannedHead):
    config_class = GQAFalconConfig
    model_class = GQAFalconModel
    default_attention = NAME


class GQAFalconForCausalLM(GQAFalconHead, FalconForCausalLM, GenerationMixin):
    config: GQAFalconConfig

    @staticmethod
    def create_masks_for_generate(config, attention_mask=None, **kwargs):
        """Linear biases are counted on the mask with two dimensions."""
        if config.alibi:
            return attention_mask
        return create_masks_for_generate(config=config, attention_mask=attention_mask, **kwargs)


class GQAFalconForSequenceClassification(GQAFalconHead, FalconForSequenceClassification):
    config: GQAFalconConfig


class GQAFalconForTokenClassification(GQAFalconHead, FalconForTokenClassification):
    config: GQAFalconConfig


class GQAFalconForQuestionAnswering(GQAFalconHead, FalconForQuestionAnswering):
    config: GQAFalconConfig
