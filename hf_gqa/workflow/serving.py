"""What serving asks for, and the bytes it takes by arithmetic, from shapes alone."""

from dataclasses import dataclass, replace

from transformers import PretrainedConfig

from ..convert.cache_bytes import cache_bytes_computed, cached_heads
from ..convert.donor import Donor
from ..evaluate.cost.memory import context_that_fits, working_bytes
from ..evaluate.cost.seq2seq_cache import cache_bytes_of_a_token, seq2seq_heads
from ..evaluate.cost.seq2seq_memory import encoding_bytes, source_that_fits, step_bytes
from ..export.explanation import stored_dtype
from ..refusal import Refusal


TARGET_TOKENS = 128


@dataclass(frozen=True, slots=True, kw_only=True)
class Wanted:
    """What serving asks for; None: no such wish.

    Args:
        context_tokens: of each sequence; of an encoder-decoder, what its encoder reads.
        memory_bytes: for weights, cache and working memory of `batch_size` sequences of `context_tokens`.
        cache_bytes: for the cache alone.
        decode_speedup: over the donor.
        target_tokens: that an encoder-decoder writes to each sequence, 128 if not said; no other model may be asked.
    """

    context_tokens: int
    batch_size: int
    memory_bytes: int | None = None
    cache_bytes: int | None = None
    decode_speedup: float | None = None
    target_tokens: int | None = None

    def __post_init__(self):
        for name in ("context_tokens", "batch_size", "target_tokens"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise Refusal(f"{name} = {getattr(self, name)}: use a whole number from 1 on.")
        if self.memory_bytes is None and self.cache_bytes is None and self.decode_speedup is None:
            raise Refusal("recommend: nothing is asked for. Give --memory, --cache or --speedup.")
        if self.decode_speedup is not None and not self.decode_speedup > 0:
            raise Refusal(f"speedup = {self.decode_speedup}: use a number above 0, such as 1.5.")

    def of(self, donor: Donor) -> "Wanted":
        """With what this donor must be asked, and nothing that it cannot be.

        Raises:
            Refusal: `target_tokens` of a model without an encoder.
        """
        if donor.layout.cross_attention is not None:
            return replace(self, target_tokens=self.target_tokens or TARGET_TOKENS)
        if self.target_tokens is not None:
            raise Refusal(
                f"target_tokens = {self.target_tokens}: '{donor.name}' has no encoder and keeps one cache of what it reads and "
                f"writes. Leave it out; --context is of both together."
            )
        return self


@dataclass(frozen=True, slots=True, kw_only=True)
class ServingBytes:
    """Of a donor or student, for what is wanted.

    Args:
        cache: of all sequences.
        working: an allowance for what is computed at once.
        unread: of the weights, what decoding one token does not read.
        longest_context_tokens: that fits into the memory; None without such a wish, and where there is no end.
    """

    cache: int
    working: int
    unread: int
    longest_context_tokens: int | None


def serving_bytes(donor: Donor, config: PretrainedConfig, weight_bytes: int, wanted: Wanted) -> ServingBytes:
    """Of a decoder.

    Args:
        config: of the donor or of a student of it.
        weight_bytes: of the same.
    """
    dtype, tokens, batch = stored_dtype(donor), wanted.context_tokens, wanted.batch_size
    longest = None
    if wanted.memory_bytes is not None:
        longest = context_that_fits(config, weight_bytes, dtype, wanted.memory_bytes, batch)
    return ServingBytes(
        cache=cache_bytes_computed(config, cached_heads(config), dtype, "static", tokens, batch),
        working=working_bytes(config, dtype, batch),
        unread=embedding_bytes(donor),
        longest_context_tokens=longest,
    )


def serving_bytes_with_encoder(
    donor: Donor, config: PretrainedConfig, weight_bytes: int, wanted: Wanted
) -> ServingBytes:
    """The same of an encoder-decoder, which keeps a cache of what it read and one of what it writes.

    A step reads neither the encoder nor the projections that made keys and values of its output.
    """
    dtype, batch = stored_dtype(donor), wanted.batch_size
    source, target = wanted.context_tokens, wanted.target_tokens
    own, cross = cache_bytes_of_a_token(config, dtype)
    cache = batch * (target * own + source * cross)
    total = step_bytes(config, dtype, batch, target) + encoding_bytes(config, dtype, batch, source)
    longest = None
    if wanted.memory_bytes is not None:
        longest = source_that_fits(config, weight_bytes, dtype, wanted.memory_bytes, batch, target)
    heads = seq2seq_heads(config)
    projections = 2 * sum(heads.cross) * heads.head_dim * config.hidden_size * dtype.itemsize
    return ServingBytes(
        cache=cache,
        working=total - cache,
        unread=embedding_bytes(donor) + encoder_bytes(donor) + projections,
        longest_context_tokens=longest,
    )


def embedding_bytes(donor: Donor) -> int:
    """Of an input embedding of its own: decoding reads a row of it."""
    tied = getattr(donor.config, "tie_word_embeddings", False)
    return 0 if tied else donor.config.vocab_size * donor.config.hidden_size * stored_dtype(donor).itemsize


def encoder_bytes(donor: Donor) -> int:
    names = (name for shard in donor.tensors.shards.values() for name in shard if name not in donor.dropped)
    return sum(donor.tensors.size_bytes(name) for name in names if "encoder" in name.split("."))
