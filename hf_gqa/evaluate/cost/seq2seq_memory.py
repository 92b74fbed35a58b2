"""What fits into a given memory: the longest source that an encoder-decoder can read and answer, from the configuration."""

from bisect import bisect_right

import torch
from transformers import PretrainedConfig

from .memory import vectors_bytes
from .seq2seq_cache import cache_bytes_of_a_token


def source_that_fits(
    config: PretrainedConfig,
    weight_bytes: int,
    dtype: torch.dtype,
    memory_bytes: int,
    batch_size: int,
    target_tokens: int,
) -> int:
    """Tokens of each of `batch_size` sources that fit beside the weights, with answers of `target_tokens`.

    Whether the model has positions for so many is not asked. 0 where not even one token fits.
    """
    left = memory_bytes - weight_bytes - step_bytes(config, dtype, batch_size, target_tokens)
    if left < 0:
        return 0

    def source_bytes(tokens: int) -> int:
        return encoding_bytes(config, dtype, batch_size, tokens)

    return bisect_right(range(left // source_bytes(1) + 1), left, key=source_bytes) - 1


def step_bytes(config: PretrainedConfig, dtype: torch.dtype, batch_size: int, target_tokens: int) -> int:
    """What the decoder keeps of its own tokens, and what one step of it computes: vectors, and logits also in float32."""
    own, _ = cache_bytes_of_a_token(config, dtype)
    logits = config.vocab_size * (dtype.itemsize + torch.float32.itemsize)
    return batch_size * (target_tokens * own + vectors_bytes(config, dtype) + logits)


def encoding_bytes(config: PretrainedConfig, dtype: torch.dtype, batch_size: int, tokens: int) -> int:
    """For sources of `tokens` each: what the decoder keeps of them, and what encoding them takes.

    An encoder looks both ways, so that it computes with all tokens at once, and what it says of each is kept. Where positions
    are a bias of the scores (T5), that is a matrix for each head, and another for each head and sequence once padding is
    masked in it.
    """
    _, cross = cache_bytes_of_a_token(config, dtype)
    of_a_token = cross + vectors_bytes(config, dtype) + config.hidden_size * dtype.itemsize
    total = batch_size * tokens * of_a_token
    if getattr(config, "relative_attention_num_buckets", None):
        heads = getattr(config, "encoder_attention_heads", None) or config.num_attention_heads
        total += (1 + batch_size) * heads * tokens**2 * dtype.itemsize
    return total
