"""GPT-Neo with the KV heads its plan gives each layer; learned positions, local and global layers."""

import torch
from huggingface_hub.dataclasses import strict
from torch import nn
from transformers import (
    GPTNeoConfig,
    GPTNeoForCausalLM,
    GPTNeoForQuestionAnswering,
    GPTNeoForSequenceClassification,
    GPTNeoForTokenClassification,
    GPTNeoModel,
)
from transformers.generation import GenerationMixin
from transformers.models.gpt_neo.modeling_gpt_neo import GPTNeoSelfAttention

from .attention_layout import AttentionLayout
from .grouped_attention import NAME
from .layer_plan import Rows
from .native_call import NativeCall
from .planned_attention import PlannedAttention
from .planned_model import BuiltEagerly, PlannedConfig, PlannedHead, PlannedModel


DONOR_LAYOUT = AttentionLayout(
    model_type="gpt_neo",
    attention="h.{layer_idx}.attn.attention",
    output="out_proj",
    key_value_heads_field=None,
    plain_scores=False,
    passes_keywords=False,
    position="learned, local and global layers",
)


@strict
class GQAGPTNeoConfig(PlannedConfig, GPTNeoConfig):
    model_type = "gqa_gpt_neo"
    num_key_value_heads: int | None = None
    layer_plan: Rows = None


def eager_attention(module, query, key, value, attention_mask, dropout=0.0, allowed_QS=None, **kwargs):
    """`[B, Q, H, D]` and weights `[B, H, Q, S]`, in the native order of operations; scores in float32, unscaled."""
    key = key.repeat_interleave(module.num_key_value_groups, dim=1).float()
    value = value.repeat_interleave(module.num_key_value_groups, dim=1)
    scores = torch.matmul(query.float(), key.transpose(2, 3))
    scores = scores.masked_fill(~allowed_QS, torch.finfo(scores.dtype).min)
    if attention_mask is not None:
        scores = scores + attention_mask
    weights = nn.functional.softmax(scores, dim=-1).to(value.dtype)
    weights = nn.functional.dropout(weights, p=dropout, training=module.training)
    return torch.matmul(weights, value).transpose(1, 2), weights


class NativeAttention(GPTNeoSelfAttention):
    """The native class with the arguments that the others have."""

    def __init__(self, config, layer_idx: int):
        super().__init__(config, config.attention_layers[layer_idx], layer_idx)
        self.layer_idx = layer_idx


class GQAGPTNeoAttention(NativeCall, PlannedAttention, NativeAttention):
    donor_layout = DONOR_LAYOUT
    eager = staticmethod(eager_attention)

    def __init__(self, config, layer_idx: int):
        super().__init__(config, layer_idx)
        self.attention_dropout, self.scaling = config.attention_dropout, 1.0

    def compute(self, hidden_states, cache=None, **kwargs):
        before = 0 if cache is None else cache.get_seq_length(self.layer_idx)
        position_Q = before + torch.arange(hidden_states.shape[1], device=hidden_states.device)
        output, weights = super().compute(hidden_states, cache=cache, position_Q=position_Q, **kwargs)
        return self.resid_dropout(output), weights

    def run_attention(self, query, key, value, attention_mask, position_Q, **kwargs):
        """The model makes one mask for all layers; the window of a local one is added here."""
        position_Q1 = position_Q[:, None]
        position_S = torch.arange(key.shape[2], device=query.device)
        allowed_QS = position_S <= position_Q1
        if self.attention_type == "local":
            allowed_QS = allowed_QS & (position_S > position_Q1 - self.config.window_size)
        if self.config._attn_implementation == "eager":
            return super().run_attention(query, key, value, attention_mask, allowed_QS=allowed_QS, **kwargs)
        if self.attention_type == "local":
            attention_mask = narrowed(attention_mask, allowed_QS)
        return super().run_attention(query, key, value, attention_mask, **kwargs)


def narrowed(attention_mask, allowed_QS):
    """The mask, bool (True may be looked at), additive or None, without what is not allowed."""
    if attention_mask is None:
        return allowed_QS[None, None]
    if attention_mask.dtype == torch.bool:
        return attention_mask & allowed_QS
    return attention_mask.masked_fill(~allowed_QS, torch.finfo(attention_mask.dtype).min)


class GQAGPTNeoModel(BuiltEagerly, PlannedModel, GPTNeoModel):
    config: GQAGPTNeoConfig
    config_class = GQAGPTNeoConfig
    attention_class = GQAGPTNeoAttention
    default_attention = NAME
    _supports_sdpa = True
    _supports_flash_attn = False


class GQAGPTNeoHead(BuiltEagerly, PlannedHead):
    config_class = GQAGPTNeoConfig
    model_class = GQAGPTNeoModel
    default_attention = NAME
    _supports_sdpa = True
    _supports_flash_attn = False


class GQAGPTNeoForCausalLM(GQAGPTNeoHead, GPTNeoForCausalLM, GenerationMixin):
    config: GQAGPTNeoConfig


class GQAGPTNeoForSequenceClassification(GQAGPTNeoHead, GPTNeoForSequenceClassification):
    config: GQAGPTNeoConfig


class GQAGPTNeoForTokenClassification(GQAGPTNeoHead, GPTNeoForTokenClassification):
    config: GQAGPTNeoConfig


class GQAGPTNeoForQuestionAnswering(GQAGPTNeoHead, GPTNeoForQuestionAnswering):
    config: GQAGPTNeoConfig
