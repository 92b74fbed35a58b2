"""The one attention module: project, norm, rotate, cache, mix, project back.

Shapes: B batch, Q query length, S key length, H query heads, K KV heads, G = H/K, D head_dim, E hidden.
"""

import torch
from torch import nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from .attention_layout import AttentionLayout
from .layer_plan import LayerPlan


def eager_attention(module, query, key, value, attention_mask, scaling, dropout=0.0, **kwargs):
    """Attention in the open: the slow reference, and the path that can return its weights `[B, H, Q, S]`."""
    key = key.repeat_interleave(module.num_key_value_groups, dim=1)
    value = value.repeat_interleave(module.num_key_value_groups, dim=1)
    if getattr(module, "reorder_and_upcast_attn", False):  # a flag of GPT-2: scores in float32, whatever autocast says
        with torch.autocast(query.device.type, enabled=False):
            weights = torch.matmul(query.float(), key.float().transpose(2, 3)) * scaling
    else:
        weights = torch.matmul(query, key.transpose(2, 3)) * scaling
    if attention_mask is not None:
        weights = weights + attention_mask
    weights = nn.functional.softmax(weights, dim=-1, dtype=torch.float32).to(value.dtype)
    weights = nn.functional.dropout(weights, p=dropout, training=module.training)
    return torch.matmul(weights, value).transpose(1, 2).contiguous(), weights


class PlannedAttention:
    """Mixin before a family's native attention class: the native `__init__` sets all but the number of KV heads.

    Source: GQA (Ainslie et al. 2023, arXiv 2305.13245). The row of the layer says how many KV heads there are; query,
    key and value are three Linear modules whatever the donor has, the output projection stays the donor's.
    """

    donor_layout: AttentionLayout
    rotate = None  # the family's (query, key, cos, sin) -> (query, key) as a staticmethod, where it has one
    linear_class = nn.Linear
    eager = staticmethod(eager_attention)  # what "eager" means; a family's own order of operations, where it differs

    def __init__(self, config, layer_idx: int):
        super().__init__(config, layer_idx=layer_idx)
        layout = self.donor_layout
        heads = LayerPlan.from_dict(config.layer_plan[layer_idx]).num_key_value_heads
        self.num_key_value_groups = config.num_attention_heads // heads
        has_bias = getattr(self, layout.fused or layout.key).bias is not None
        if layout.fused is not None:
            delattr(self, layout.fused)
            self.q_proj = self.linear_class(
                config.hidden_size, config.num_attention_heads * self.head_dim, bias=has_bias
            )
        self.k_proj = self.linear_class(config.hidden_size, heads * self.head_dim, bias=has_bias)
        self.v_proj = self.linear_class(config.hidden_size, heads * self.head_dim, bias=has_bias)

    def forward(self, hidden_states, position_embeddings=None, attention_mask=None, past_key_values=None, **kwargs):
        input_shape = hidden_states.shape[:-1]
        head_shape = (*input_shape, -1, self.head_dim)
        query = self.q_proj(hidden_states).view(head_shape)
        key = self.k_proj(hidden_states).view(head_shape)
        value = self.v_proj(hidden_states).view(head_shape)
        if self.donor_layout.query_norm is not None:
            query = getattr(self, self.donor_layout.query_norm)(query)
            key = getattr(self, self.donor_layout.key_norm)(key)
        query, key, value = query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2)  # [B, heads, Q, D]
        if self.rotate is not None:
            query, key = self.rotate(query, key, *position_embeddings)
        if past_key_values is not None:
            key, value = past_key_values.update(key, value, self.layer_idx)

        mixed, weights = self.mix(query, key, value, attention_mask, scaling=self.scaling, **kwargs)
        mixed = mixed.reshape(*input_shape, -1).contiguous()
        return getattr(self, self.donor_layout.output)(mixed), weights

    def mix(self, query, key, value, attention_mask, **kwargs):
        """`[B, Q, H, D]` and the attention weights, if there are any; where a family biases its scores or scales queries.

        Args:
            query: `[B, H, Q, D]`. key, value: `[B, K, S, D]`, as the cache returned them.
        """
        attention_interface = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, self.eager)
        return attention_interface(
            self,
            query,
            key,
            value,
            attention_mask,
            dropout=self.attention_dropout if self.training else 0.0,
            sliding_window=getattr(self, "sliding_window", None),
            **kwargs,
        )
