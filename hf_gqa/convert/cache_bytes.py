"""Bytes of KV cache per token: from the configuration, and from the cache a model really fills."""

import torch
from transformers import DynamicCache, PretrainedConfig, PreTrainedModel


def cache_bytes_per_token_computed(config: PretrainedConfig, num_key_value_heads: list[int], dtype: torch.dtype) -> int:
    """Keys and values of one token in all layers, while it is inside every layer's window.

    Args:
        config: gives `head_dim`, or `hidden_size` and `num_attention_heads`.
        num_key_value_heads: of each layer.
        dtype: of the cache.
    """
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return 2 * sum(num_key_value_heads) * head_dim * dtype.itemsize


def cache_bytes_per_token_beyond_window(
    config: PretrainedConfig, num_key_value_heads: list[int], dtype: torch.dtype
) -> int:
    """The same for a token beyond the sliding window: only layers that attend to everything keep growing."""
    layer_types = getattr(config, "layer_types", None)
    if layer_types is None:
        window = getattr(config, "sliding_window", None)
        layer_types = ["sliding_attention" if window else "full_attention"] * len(num_key_value_heads)
    full = [n for n, kind in zip(num_key_value_heads, layer_types, strict=True) if kind == "full_attention"]
    return cache_bytes_per_token_computed(config, full, dtype)


@torch.no_grad()
def cache_bytes_per_token_measured(model: PreTrainedModel, num_tokens: int = 8) -> float:
    """Fill a DynamicCache with `num_tokens` tokens and count the bytes of its tensors."""
    tokens = torch.zeros(1, num_tokens, dtype=torch.long, device=model.device)
    cache = DynamicCache(config=model.config)
    model(tokens, past_key_values=cache, use_cache=True)
    stored = [tensor for layer in cache.layers for tensor in (layer.keys, layer.values)]
    return sum(tensor.numel() * tensor.element_size() for tensor in stored) / num_tokens


def key_value_heads(config: PretrainedConfig) -> list[int] | None:
    """KV heads of each layer as any decoder's configuration says; None where it says nothing about heads."""
    if getattr(config, "layer_plan", None) is not None:
        return [row["num_key_value_heads"] for row in config.layer_plan]
    default = 1 if getattr(config, "multi_query", False) else getattr(config, "num_attention_heads", None)
    heads = getattr(config, "num_key_value_heads", None) or default
    return None if heads is None else [heads] * config.num_hidden_layers
