"""What the measurement of one kind of model gives to a report, and what it begins with."""

from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from ...progress_bar import progress_bar
from ...refusal import Refusal
from ..inputs.opened import Pair
from ..quality.bootstrap import Bootstrap
from ..recipe import EvaluationRecipe
from ..report import (
    Capacity,
    ContextLoss,
    Continuation,
    Differences,
    Embeddings,
    EncodingSpeed,
    Retrieval,
    Rouge,
    SourceLengthLoss,
    Speed,
    TaskScore,
    TextFacts,
)


LONGEST_UNASKED = 2048
TOKENS_AT_ONCE = 8192
NO_DIFFERENCES = Differences(**dict.fromkeys(field.name for field in fields(Differences)))
ABSURD_TOKENS = 1_000_000  # transformers says 10^30 where it knows nothing


@dataclass(frozen=True, slots=True, kw_only=True)
class Asked:
    """What is to be measured, of which models.

    Args:
        recipe: as the user gave it, with sizes left open.
        donor_name: what the report calls the donor.
        converted: the student before uptraining, if there is one.
    """

    recipe: EvaluationRecipe
    pair: Pair
    donor_name: str
    converted: str | Path | None

    @property
    def bootstrap(self) -> Bootstrap:
        recipe = self.recipe
        return Bootstrap(seed=recipe.seed, resamples=recipe.resamples, confidence_fraction=recipe.confidence)


@dataclass(frozen=True, slots=True, kw_only=True)
class Losses:
    """A model's fields of `ModelFacts` on the text; None where it predicts no tokens."""

    loss_nats_per_token: float | None = None
    perplexity: float | None = None
    bits_per_byte: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class CacheBytes:
    """A model's fields of `ModelFacts` on its cache; None where it keeps none."""

    cache_bytes_per_token_computed: int | None = None
    cache_bytes_per_token_measured: float | None = None
    cache_bytes_per_token_beyond_window: int | None = None
    cache_bytes_per_source_token_computed: int | None = None
    cache_bytes_per_source_token_measured: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerHeads:
    """A model's fields of `ModelFacts` on its attentions."""

    num_hidden_layers: int
    num_key_value_heads: tuple[int, ...]
    cross_num_key_value_heads: tuple[int, ...] = ()
    encoder_num_key_value_heads: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class MeasuredModel:
    """What was measured of one model.

    Args:
        heads: None: those that its configuration names.
    """

    losses: Losses = Losses()
    cache: CacheBytes = CacheBytes()
    heads: LayerHeads | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class MeasuredParts:
    """Fields of the `Report` that are measured; what a kind has not is left as it is here."""

    kl_nats_per_token: float | None = None
    top1_agreement_fraction: float | None = None
    differences: Differences = NO_DIFFERENCES
    by_context: tuple[ContextLoss, ...] = ()
    by_source_length: tuple[SourceLengthLoss, ...] = ()
    rouge: tuple[Rouge, ...] = ()
    embeddings: Embeddings | None = None
    retrieval: tuple[Retrieval, ...] = ()
    tasks: tuple[TaskScore, ...] = ()
    speed: tuple[Speed, ...] = ()
    encoding_speed: tuple[EncodingSpeed, ...] = ()
    capacity: tuple[Capacity, ...] = ()
    continuations: tuple[Continuation, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """What a report is made of.

    Args:
        notes: what the reader must know.
    """

    donor: MeasuredModel
    student: MeasuredModel
    report: MeasuredParts
    text: TextFacts
    notes: tuple[str, ...]


def timed(recipe: EvaluationRecipe, measure: Callable[..., tuple]) -> tuple[tuple, tuple[str, ...]]:
    """The points that the recipe asks for, if any, and notes about those that were left out.

    Args:
        measure: takes batch_sizes, context_lengths, repetitions, seed and progress.
    """
    if not recipe.speed:
        return (), ()
    points = len(recipe.speed_batch_sizes) * len(recipe.speed_context_lengths)
    with progress_bar("Speed", points, "size") as bar:
        return measure(
            batch_sizes=recipe.speed_batch_sizes,
            context_lengths=recipe.speed_context_lengths,
            repetitions=recipe.repetitions,
            seed=recipe.seed,
            progress=lambda point: bar.update(),
        )


def batch_size_of(recipe: EvaluationRecipe, context_tokens: int) -> int:
    """What was asked for, or else what reads about 8,192 tokens at once."""
    return recipe.batch_size or max(1, min(32, TOKENS_AT_ONCE // context_tokens))


def longest_context(recipe: EvaluationRecipe, limit: int | None, trained: int | None = None) -> int:
    """Most tokens to read at once: what was asked for, or else what the models take, up to 2048.

    Args:
        limit: positions of the models; None: no end.
        trained: what their tokenizer says they were made for; only asked where nothing was asked for.
    """
    if limit is not None and recipe.context_length is not None and recipe.context_length > limit:
        raise Refusal(
            f"context_length = {recipe.context_length:,}: the models have positions for {limit:,} tokens. Use "
            f"{limit:,} or fewer."
        )
    return recipe.context_length or min(limit or LONGEST_UNASKED, trained or LONGEST_UNASKED, LONGEST_UNASKED)


def trained_tokens(tokenizer: PreTrainedTokenizerBase) -> int | None:
    """What a tokenizer says its model was made for; None where it says nothing."""
    return tokenizer.model_max_length if tokenizer.model_max_length < ABSURD_TOKENS else None


def refuse_options(recipe: EvaluationRecipe, kind: str, *names: str) -> None:
    """Raises Refusal for options that say nothing to this kind of model."""
    defaults = {field.name: field.default for field in fields(recipe)}
    for name in names:
        if getattr(recipe, name) != defaults[name]:
            raise Refusal(f"{name} = {getattr(recipe, name)!r}: means nothing for {kind}. Leave it out.")
