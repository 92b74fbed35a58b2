"""MPT with the KV heads its plan gives each layer; ALiBi."""

import copy
import functools

import torch
from huggingface_hub.dataclasses import strict
from torch import nn
from transformers import (
    MptConfig,
    MptForCausalLM,
    MptForQuestionAnswering,
    MptForSequenceClassification,
    MptForTokenClassification,
    MptModel,
)
from transformers.generation import GenerationMixin
from transformers.masking_utils import create_causal_mask
from transformers.models.mpt.modeling_mpt import MptAttention

from .attention_layout import AttentionLayout
from .grouped_attention import NAME
from .layer_plan import Rows
from .native_call import NativeCall, cache_argument, cache_in
from .planned_attention import PlannedAttention
from .planned_model import BuiltEagerly, PlannedConfig, PlannedHead, PlannedModel


DONOR_LAYOUT = AttentionLayout(
    model_type="mpt",
    attention="blocks.{layer_idx}.attn",
    fused="Wqkv",
    output="out_proj",
    key_value_heads_field=None,
    plain_scores=False,
    passes_keywords=False,
    head_positions="always",
    position="ALiBi",
)


MASK_CACHE, MODEL_CACHE = cache_argument(create_causal_mask), cache_argument(MptModel.forward)


@strict
class GQAMptConfig(PlannedConfig, MptConfig):
    model_type = "gqa_mpt"
    num_key_value_heads: int | None = None
    layer_plan: Rows = None


def donor_obstacle(config) -> str | None:
    """Why a native configuration is no donor."""
    if config.attn_config.clip_qkv:
        return (
            f"attn_config.clip_qkv = {config.attn_config.clip_qkv} clips keys and values after their projections, so that "
            f"heads merged before it are not merged heads"
        )
    return None


def eager_attention(module, query, key, value, attention_mask, scaling, dropout=0.0, alibi=None, **kwargs):
    """`[B, Q, H, D]` and weights `[B, H, Q, S]`, in the native order of operations; the mask is True where masked."""
    key = key.repeat_interleave(module.num_key_value_groups, dim=1)
    value = value.repeat_interleave(module.num_key_value_groups, dim=1)
    scores = torch.matmul(query, key.transpose(2, 3)) * scaling + alibi
    scores = scores.masked_fill(attention_mask, torch.finfo(query.dtype).min)
    weights = nn.functional.softmax(scores.float(), dim=-1).to(value.dtype)
    weights = nn.functional.dropout(weights, p=dropout, training=module.training)
    return torch.matmul(weights, value).transpose(1, 2), weights


class GQAMptAttention(NativeCall, PlannedAttention, MptAttention):
    donor_layout = DONOR_LAYOUT
    eager = staticmethod(eager_attention)

    def __init__(self, config, layer_idx: int):
        super().__init__(config, layer_idx)
        self.config, self.attention_dropout, self.scaling = config, self.attn_dropout_p, self.softmax_scale

    def compute(self, hidden_states, position_bias, **kwargs):
        return super().compute(hidden_states, alibi=position_bias, **kwargs)

    def run_attention(self, query, key, value, attention_mask, alibi, **kwargs):
        """The native bias is `[H, 1, max_seq_len]`; its end belongs to the last key, and only differences count."""
        alibi = alibi[:, :, max(0, alibi.shape[2] - key.shape[2]) :]
        if self.config._attn_implementation == "eager":
            return super().run_attention(query, key, value, attention_mask, alibi=alibi, **kwargs)
        bias = alibi[None].masked_fill(attention_mask, torch.finfo(alibi.dtype).min)
        bias = bias - bias.amax(
            dim=-1, keepdim=True
        )  # small where it counts: rounded next, as the native class does not
        bias = bias.masked_fill(attention_mask, torch.finfo(query.dtype).min).to(query.dtype)
        return super().run_attention(query, key, value, bias, **kwargs)


class GQAMptModel(BuiltEagerly, PlannedModel, MptModel):
    config: GQAMptConfig
    config_class = GQAMptConfig
    attention_class = GQAMptAttention
    default_attention = NAME
    _supports_sdpa = True

    @functools.wraps(MptModel.forward)  # for those who read its signature
    def forward(self, input_ids=None, *, attention_mask=None, inputs_embeds=None, **kwargs):
        """The native forward understands no masks but those of eager attention."""
        if inputs_embeds is None:
            inputs_embeds = self.wte(input_ids)
        eager = copy.copy(self.config)
        eager._attn_implementation = "eager"
        cache = {MASK_CACHE: kwargs.get(MODEL_CACHE, cache_in(kwargs.values()))}
        mask = create_causal_mask(config=eager, inputs_embeds=inputs_embeds, attention_mask=attention_mask, **cache)
        return super().forward(attention_mask=mask, inputs_embeds=inputs_embeds, **kwargs)


class GQAMptHead(BuiltEagerly, PlannedHead):
    config_class = GQAMptConfig
    model_class = GQAMptModel
    default_attention = NAME
    _supports_sdpa = True


class GQAMptForCausalLM(GQAMptHead, MptForCausalLM, GenerationMixin):
    config: GQAMptConfig

    @staticmethod
    def create_masks_for_generate(attention_mask=None, **kwargs):
        """The model makes its masks itself."""
        return attention_mask


class GQAMptForSequenceClassification(GQAMptHead, MptForSequenceClassification):
    config: GQAMptConfig


class GQAMptForTokenClassification(GQAMptHead, MptForTokenClassification):
    config: GQAMptConfig


class GQAMptForQuestionAnswering(GQAMptHead, MptForQuestionAnswering):
    config: GQAMptConfig
