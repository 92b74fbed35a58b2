"""What the measurement of one kind of model gives to a report, and what it begins with."""

from dataclasses import dataclass, fields
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from ...refusal import Refusal
from ..inputs.opened import Pair
from ..quality.bootstrap import Bootstrap
from ..recipe import EvaluationRecipe
from ..report import TextFacts


LONGEST_UNASKED = 2048
TOKENS_AT_ONCE = 8192
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
class Measured:
    """Parts of a report.

    Args:
        donor, student: fields of their `ModelFacts`.
        report: fields of the `Report`.
        notes: what the reader must know.
    """

    donor: dict
    student: dict
    report: dict
    text: TextFacts
    notes: tuple[str, ...]


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
