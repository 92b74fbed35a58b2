"""Bytes of KV cache of an encoder-decoder, which keeps two: of the tokens it writes, and of those its encoder read."""

from collections.abc import Sequence

import torch
from transformers import PreTrainedModel

from ..runtime.attention_layout import CROSS, SELF, AttentionSite
from ..runtime.native_call import cache_in


def cache_bytes_by_kind(sites: Sequence[AttentionSite], num_key_value_heads: Sequence[int], dtype: torch.dtype) -> dict:
    """Keys and values of one token in all layers: "self" of a decoder's token, "cross" of an encoder's.

    Args:
        num_key_value_heads: of each of the sites.
        dtype: of the cache.
    """
    rows = list(zip(sites, num_key_value_heads, strict=True))
    return {
        kind: sum(2 * heads * site.head_dim * dtype.itemsize for site, heads in rows if site.kind == kind)
        for kind in (SELF, CROSS)
    }


@torch.no_grad()
def cache_bytes_by_kind_measured(model: PreTrainedModel, **inputs: torch.Tensor) -> dict:
    """Bytes per token of the two caches that an encoder-decoder fills, by the numbers of tokens found in them.

    Args:
        inputs: of the model, both sides.
    """
    caches = cache_in(model(**inputs, use_cache=True).values())
    return {
        SELF: _bytes_per_token(caches.self_attention_cache),
        CROSS: _bytes_per_token(caches.cross_attention_cache),
    }


def _bytes_per_token(cache) -> float:
    """Sequences of a batch count as tokens of their own."""
    tensors = [tensor for layer in cache.layers for tensor in (layer.keys, layer.values)]
    tokens = tensors[0].shape[0] * tensors[0].shape[2]
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors) / tokens
