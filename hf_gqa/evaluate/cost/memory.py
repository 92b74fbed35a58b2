"""What fits into a given memory: the longest context beside the weights, computed from the configuration."""

import re
from bisect import bisect_right
from collections.abc import Callable
from decimal import Decimal

import torch
from transformers import PretrainedConfig, PreTrainedModel

from ...convert.cache_bytes import (
    cache_bytes_computed,
    cache_bytes_per_token_beyond_window,
    cached_heads,
    layer_windows,
)
from ...refusal import Refusal
from ..report import Capacity


READ_AT_ONCE_TOKENS = 512
UNITS = {
    **{"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12},
    **{"KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40},
}


def parse_memory(memory: str | int) -> int:
    """'24GB' is 24 x 10^9 bytes, '24GiB' 24 x 2^30; a number alone is bytes.

    Raises:
        Refusal: anything else, or less than one byte.
    """
    found = re.fullmatch(r"([0-9]+(?:\.[0-9]+)?) *([A-Za-z]*)", str(memory).strip())
    unit = UNITS.get(found[2].upper()) if found else None
    amount = 0 if unit is None or isinstance(memory, bool) else int(Decimal(found[1]) * unit)
    if amount < 1:
        raise Refusal(
            f"memory = {memory!r} is no amount of memory. Give bytes, or a number with a unit, such as 512MB or 24GB "
            f"(10^9 bytes) or 24GiB (2^30 bytes)."
        )
    return amount


def context_that_fits(
    config: PretrainedConfig, weight_bytes: int, dtype: torch.dtype, memory_bytes: int, batch_size: int
) -> int | None:
    """Tokens of each of `batch_size` sequences whose cache fits beside the weights and `working_bytes`.

    A layer with a sliding window keeps no more than its window, which takes a cache that allocates once, or that reads long
    prompts in pieces; what DynamicCache copies while it grows is not counted.

    Args:
        config: of the model; whether it has positions for so many tokens is not asked.
        dtype: of the weights, and so of the cache.

    Returns:
        0 where not even one token fits; None where every layer has a sliding window and all windows fit, so that no context
        is too long.
    """
    heads = cached_heads(config)
    left = memory_bytes - weight_bytes - working_bytes(config, dtype, batch_size)

    def cache_bytes(context_tokens: int) -> int:
        return cache_bytes_computed(config, heads, dtype, "static", context_tokens, batch_size)

    growing = batch_size * cache_bytes_per_token_beyond_window(config, heads, dtype)
    windows = [window for window in layer_windows(config, len(heads)) if window is not None]
    if left < 0:
        return 0
    if not windows:
        return left // growing
    if not growing and cache_bytes(max(windows)) <= left:
        return None
    longest = left // growing if growing else max(windows)
    return bisect_right(range(longest + 1), left, key=cache_bytes) - 1


def capacity(
    donor: PreTrainedModel,
    student: PreTrainedModel,
    memory_bytes: int,
    batch_size: int,
    longest: Callable[..., int | None] = context_that_fits,
) -> Capacity:
    """The longest context of each model, in the dtype it is in.

    Args:
        longest: in place of `context_that_fits`, with its arguments.
    """
    fits = [
        longest(model.config, weight_bytes(model), model.dtype, memory_bytes, batch_size) for model in (donor, student)
    ]
    return Capacity(
        memory_bytes=memory_bytes,
        batch_size=batch_size,
        donor_context_tokens=fits[0],
        student_context_tokens=fits[1],
    )


def working_bytes(config: PretrainedConfig, dtype: torch.dtype, batch_size: int) -> int:
    """An allowance for what a step computes: prompts are read in pieces of 512 tokens of all sequences together.

    For each token of a piece the vectors of one layer; for each sequence the logits of one token, in `dtype` and in float32.
    No attention scores, which neither sdpa nor flash attention keeps.
    """
    tokens = max(READ_AT_ONCE_TOKENS, batch_size)
    logits = batch_size * config.vocab_size * (dtype.itemsize + torch.float32.itemsize)
    return tokens * vectors_bytes(config, dtype) + logits


def vectors_bytes(config: PretrainedConfig, dtype: torch.dtype) -> int:
    """Of one token within one layer: the residual, its norm, queries, attention's output, three of the feed-forward layer."""
    hidden, heads = config.hidden_size, config.num_attention_heads
    head_dim = getattr(config, "head_dim", None) or getattr(config, "d_kv", None) or hidden // heads
    widths = (getattr(config, name, None) for name in ("intermediate_size", "n_inner", "d_ff", "encoder_ffn_dim"))
    inner = next(filter(None, widths), 4 * hidden)
    return (2 * hidden + 2 * heads * head_dim + 3 * inner) * dtype.itemsize


def weight_bytes(model: PreTrainedModel) -> int:
    """Of all parameters, tied ones once."""
    return sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())
