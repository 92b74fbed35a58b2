"""The one attention module: project or borrow, norm, rotate, cache, lend, mix, project back.

Shapes: B batch, Q query length, S key length, H query heads, K KV heads, G = H/K, D head_dim, E hidden.
"""

import torch
from torch import nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from .attention_layout import AttentionLayout
from .grouped_attention import NAME, attention_probabilities, mix
from .layer_plan import read_rows
from .native_call import is_paged, update_paged


KERNELS = (NAME, "sdpa")  # attention whose numbers `attention_probabilities` has too


def eager_attention(module, query, key, value, attention_mask, scaling, dropout=0.0, softcap=None, **kwargs):
    """Attention in the open: the slow reference, and the path that can return its weights `[B, H, Q, S]`."""
    key = key.repeat_interleave(module.num_key_value_groups, dim=1)
    value = value.repeat_interleave(module.num_key_value_groups, dim=1)
    if getattr(module, "reorder_and_upcast_attn", False):  # a flag of GPT-2: scores in float32, whatever autocast says
        with torch.autocast(query.device.type, enabled=False):
            weights = torch.matmul(query.float(), key.float().transpose(2, 3)) * scaling
    else:
        weights = torch.matmul(query, key.transpose(2, 3)) * scaling
    if softcap is not None:
        weights = torch.tanh(weights / softcap) * softcap
    if attention_mask is not None:
        weights = weights + attention_mask
    weights = nn.functional.softmax(weights, dim=-1, dtype=torch.float32).to(value.dtype)
    weights = nn.functional.dropout(weights, p=dropout, training=module.training)
    return torch.matmul(weights, value).transpose(1, 2).contiguous(), weights


class PlannedAttention:
    """Mixin after `NativeCall`, before a family's native attention class, whose `__init__` sets all but the KV heads.

    Source: GQA (Ainslie et al. 2023, arXiv 2305.13245). The row of the layer says how many KV heads there are, and what
    is borrowed from which layer; the query, key and value that are the layer's own are Linear modules whatever the donor
    has, the output projection stays the donor's.
    """

    donor_layout: AttentionLayout
    rotate = None  # the family's (query, key, cos, sin) -> (query, key) as a staticmethod, where it has one
    linear_class = nn.Linear
    eager = staticmethod(eager_attention)  # what "eager" means; a family's own order of operations, where it differs

    def __init__(self, config, layer_idx: int):
        super().__init__(config, layer_idx=layer_idx)
        layout = self.donor_layout
        rows = read_rows(config)
        self.row = row = rows[layer_idx]
        self.lends = frozenset(
            name for name in ("query", "key", "value") if any(getattr(r, f"{name}_from") == layer_idx for r in rows)
        )
        heads = row.num_key_value_heads
        self.fits_pages = not any(r.borrows_states or r.num_key_value_heads != heads for r in rows)
        self.num_key_value_groups = config.num_attention_heads // heads
        native = [layout.fused] if layout.fused else [layout.query, layout.key, layout.value]
        native = [name.rpartition(".")[2] for name in native]
        has_bias = getattr(self, native[-1]).bias is not None
        if native[0] != "q_proj":
            for name in native:
                delattr(self, name)
            self.q_proj = self.linear_class(
                config.hidden_size, config.num_attention_heads * self.head_dim, bias=has_bias
            )
        self.k_proj = self.linear_class(config.hidden_size, heads * self.head_dim, bias=has_bias)
        self.v_proj = self.linear_class(config.hidden_size, heads * self.head_dim, bias=has_bias)
        for name in borrowed_modules(row, layout):
            if hasattr(self, name):  # norms may be switched off
                delattr(self, name)

    def compute(
        self, hidden_states, position_embeddings=None, attention_mask=None, cache=None, shared_states=None, **kwargs
    ):
        """The output `[B, Q, E]`, and the attention weights where there are any.

        Args:
            hidden_states: `[B, Q, E]`.
            position_embeddings: what `rotate` takes after query and key.
            attention_mask: as the attention implementation wants it.
            cache: of transformers; it keeps this layer's keys and values.
            shared_states: what layers lend each other in this forward.
            kwargs: for the attention function.
        """
        if shared_states is None and (self.lends or self.row.borrows_states):
            raise ValueError(f"layer {self.layer_idx} shares with others, but was not told of what they lend.")
        query, key, value = self.own_states(hidden_states, position_embeddings)
        key, value = self.cached(key, value, cache, kwargs)
        query, key, value = self.shared(query, key, value, shared_states)
        mixed, weights = self.attend(query, key, value, attention_mask, shared_states, **kwargs)
        mixed = mixed.reshape(*hidden_states.shape[:-1], -1).contiguous()
        return (mixed if self.donor_layout.inner else getattr(self, self.donor_layout.output)(mixed)), weights

    def own_states(self, hidden_states, position_embeddings):
        """Query, key and value `[B, heads, Q, D]`, normed and rotated; None for each that is borrowed."""
        head_shape = (*hidden_states.shape[:-1], -1, self.head_dim)
        row, layout = self.row, self.donor_layout
        query = self.q_proj(hidden_states).view(head_shape) if row.query_from is None else None
        key = self.k_proj(hidden_states).view(head_shape) if row.key_from is None else None
        value = self.v_proj(hidden_states).view(head_shape).transpose(1, 2) if row.value_from is None else None
        query, key = self.normed(layout.query_norm, query), self.normed(layout.key_norm, key)
        query = None if query is None else query.transpose(1, 2)
        key = None if key is None else key.transpose(1, 2)
        if self.rotate is None or query is None:  # who borrows queries borrows keys
            return query, key, value
        if key is None:
            return self.rotate(query, query[:, :0], *position_embeddings)[0], None, value
        return *self.rotate(query, key, *position_embeddings), value

    def normed(self, norm: str | None, states):
        """`[B, Q, heads, D]` through the norm on queries or keys, where the family has one and nothing switched it off."""
        norm = None if norm is None or states is None else getattr(self, norm, None)
        if norm is None:
            return states
        if self.donor_layout.norm_weights == "joint":
            return norm(states.flatten(2)).view(states.shape)
        return norm(states)

    def cached(self, key, value, cache, handed: dict):
        """Own keys and values with those of earlier tokens, `[B, K, S, D]`.

        A layer that owns one of the two keeps it where the cache has its keys, and no numbers where it has values:
        caches take their length from the keys.
        """
        if cache is None or (key is None and value is None):
            return key, value
        if is_paged(cache):
            if not self.fits_pages:
                raise ValueError(
                    "layer_plan: layers that share, or have different numbers of KV heads, do not fit the paged cache of "
                    "continuous batching. Use generate."
                )
            return update_paged(cache, key, value, self.layer_idx, handed)
        if key is not None and value is not None:
            return cache.update(key, value, self.layer_idx)
        own = value if key is None else key
        own, _ = cache.update(own, own[..., :0], self.layer_idx)
        return (None, own) if key is None else (own, None)

    def shared(self, query, key, value, shared_states):
        """All three, lent ones to other layers, borrowed ones from them."""
        states = {"query": query, "key": key, "value": value}
        for name, own in states.items():
            lender = getattr(self.row, f"{name}_from")
            if lender is not None:
                states[name] = shared_states.borrow(name, lender)
            elif name in self.lends:
                shared_states.lend(name, self.layer_idx, own)
        return states.values()

    def attend(self, query, key, value, attention_mask, shared_states, **kwargs):
        """What the values mix to, `[B, Q, H, D]`, and the attention weights or None.

        While one token is decoded, the lender of an attention matrix computes its one row per head in the open and lends
        it: borrowers read no keys. Everywhere else they compute it again from the lender's queries and keys, inside a
        kernel that never writes it to memory.
        """
        name = self.config._attn_implementation
        kwargs["softcap"] = getattr(self, "attn_logit_softcapping", None)  # Gemma 2
        is_shared = self.row.query_from is not None or "query" in self.lends
        if is_shared and query.shape[2] == 1 and not self.training and name in KERNELS:
            if self.row.query_from is None:
                probabilities = attention_probabilities(query, key, attention_mask, self.scaling, **kwargs)
                shared_states.lend("probabilities", self.layer_idx, probabilities)
            else:
                probabilities = shared_states.borrow("probabilities", self.row.query_from)
            return mix(probabilities, value).transpose(1, 2), None
        return self.run_attention(query, key, value, attention_mask, scaling=self.scaling, **kwargs)

    def run_attention(self, query, key, value, attention_mask, **kwargs):
        """`[B, Q, H, D]` and the attention weights or None; where a family biases its scores or scales its queries."""
        return ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, self.eager)(
            self,
            query,
            key,
            value,
            attention_mask,
            dropout=self.attention_dropout if self.training else 0.0,
            sliding_window=getattr(self, "sliding_window", None),
            **kwargs,
        )


def borrowed_modules(row, layout: AttentionLayout) -> list[str]:
    """Names, below a layer's attention, of our own modules that its row leaves it without."""
    names = {
        "query_from": ("q_proj", layout.query_norm),
        "key_from": ("k_proj", layout.key_norm),
        "value_from": ("v_proj",),
    }
    borrowed = [names[column] for column in names if getattr(row, column) is not None]
    return [name for group in borrowed for name in group if name is not None]
