"""BLOOM with the KV heads its plan gives each layer; ALiBi."""

import torch
from huggingface_hub.dataclasses import strict
from torch import nn
from transformers import (
    BloomConfig,
    BloomForCausalLM,
    BloomForQuestionAnswering,
    BloomForSequenceClassification,
    BloomForTokenClassification,
    BloomModel,
)
from transformers.generation import GenerationMixin
from transformers.models.bloom.modeling_bloom import BloomAttention, dropout_add

from .attention_layout import AttentionLayout
from .grouped_attention import NAME
from .layer_plan import Rows
from .linear_biases import biased_mask, padded
from .native_call import NativeCall
from .planned_attention import PlannedAttention
from .planned_model import BuiltEagerly, PlannedConfig, PlannedHead, PlannedModel


DONOR_LAYOUT = AttentionLayout(
    model_type="bloom",
    attention="h.{layer_idx}.self_attention",
    fused="query_key_value",
    fused_blocks=None,
    output="dense",
    key_value_heads_field=None,
    plain_scores=False,
    passes_keywords=False,
    head_positions="always",
    position="ALiBi",
)


@strict
class GQABloomConfig(PlannedConfig, BloomConfig):
    model_type = "gqa_bloom"
    num_key_value_heads: int | None = None
    layer_plan: Rows = None


def eager_attention(module, query, key, value, attention_mask, scaling, dropout=0.0, alibi=None, **kwargs):
    """`[B, Q, H, D]` and weights `[B, H, Q, S]`, in the native order of operations."""
    key = key.repeat_interleave(module.num_key_value_groups, dim=1).flatten(0, 1)
    value = value.repeat_interleave(module.num_key_value_groups, dim=1).flatten(0, 1)
    scores = torch.baddbmm(alibi.flatten(0, 1), query.flatten(0, 1), key.transpose(1, 2), alpha=scaling)
    scores = scores.unflatten(0, query.shape[:2])
    if attention_mask is not None:
        scores = scores + attention_mask
    weights = nn.functional.softmax(scores, dim=-1, dtype=torch.float32).to(query.dtype)
    weights = nn.functional.dropout(weights, p=dropout, training=module.training)
    mixed = torch.bmm(weights.flatten(0, 1), value).unflatten(0, query.shape[:2])
    return mixed.transpose(1, 2), weights


class GQABloomAttention(NativeCall, PlannedAttention, BloomAttention):
    donor_layout = DONOR_LAYOUT
    eager = staticmethod(eager_attention)

    def __init__(self, config, layer_idx: int):
        super().__init__(config, layer_idx)
        del self.attention_dropout
        self.config, self.attention_dropout, self.scaling = config, config.attention_dropout, self.inv_norm_factor

    def compute(self, hidden_states, residual, alibi, **kwargs):
        output, weights = super().compute(hidden_states, alibi=alibi, **kwargs)
        return dropout_add(output, residual, self.hidden_dropout, self.training), weights

    def run_attention(self, query, key, value, attention_mask, alibi, **kwargs):
        """The native bias is `[B * H, 1, S]`, as long as the attention mask; a static cache is longer."""
        alibi = padded(alibi.unflatten(0, (len(query), -1)), key.shape[2])
        if self.config._attn_implementation == "eager":
            return super().run_attention(query, key, value, attention_mask, alibi=alibi, **kwargs)
        return super().run_attention(query, key, value, biased_mask(alibi, attention_mask, query, key), **kwargs)


class GQABloomModel(BuiltEagerly, PlannedModel, BloomModel):
    config: GQABloomConfig
    config_class = GQABloomConfig
    attention_class = GQABloomAttention
    default_attention = NAME
    _supports_sdpa = True


class GQABloomHead(BuiltEagerly, PlannedHead):
    config_class = GQABloomConfig
    model_class = GQABloomModel
    default_attention = NAME
    _supports_sdpa = True


class GQABloomForCausalLM(GQABloomHead, BloomForCausalLM, GenerationMixin):
    config: GQABloomConfig


class GQABloomForSequenceClassification(GQABloomHead, BloomForSequenceClassification):
    config: GQABloomConfig


class GQABloomForTokenClassification(GQABloomHead, BloomForTokenClassification):
    config: GQABloomConfig


class GQABloomForQuestionAnswering(GQABloomHead, BloomForQuestionAnswering):
    config: GQABloomConfig
