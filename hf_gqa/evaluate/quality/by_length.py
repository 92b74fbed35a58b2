"""Losses by how much stands before a token: text of its document, or for an encoder-decoder its source."""

from collections.abc import Iterator

import numpy as np

from ..report import ContextLoss, SourceLengthLoss
from .bootstrap import Bootstrap
from .token_scores import TokenScores


FIRST_LENGTHS_END = 32


def by_context(scores: TokenScores, context_tokens: int, bootstrap: Bootstrap) -> tuple[ContextLoss, ...]:
    """By how much text stood before the token: up to 32 tokens, then up to each power of two."""
    return tuple(
        ContextLoss(
            first_context_tokens=before + 1,
            last_context_tokens=int(here.context_N.max()),
            **_losses(here, bootstrap),
        )
        for before, here in _by_length(scores, context_tokens)
    )


def by_source_length(scores: TokenScores, bootstrap: Bootstrap) -> tuple[SourceLengthLoss, ...]:
    """Of pairs, by how long their source is: up to 32 tokens, then up to each power of two."""
    return tuple(
        SourceLengthLoss(
            first_source_tokens=int(here.context_N.min()),
            last_source_tokens=int(here.context_N.max()),
            pairs=here.windows,
            **_losses(here, bootstrap),
        )
        for _, here in _by_length(scores, int(scores.context_N.max()))
    )


def _by_length(scores: TokenScores, longest: int) -> Iterator[tuple[int, TokenScores]]:
    """(length that all are beyond, tokens) of each step that has any."""
    lasts = [FIRST_LENGTHS_END]
    while lasts[-1] < longest:
        lasts.append(2 * lasts[-1])
    for before, last in zip([0, *lasts], lasts, strict=False):
        here = scores.where((scores.context_N > before) & (scores.context_N <= last))
        if len(here):
            yield before, here


def _losses(here: TokenScores, bootstrap: Bootstrap) -> dict:
    """Fields that rows of both tables have."""
    difference_W = here.by_window(here.student_loss_N - here.donor_loss_N)
    return {
        "tokens": len(here),
        "donor_loss_nats_per_token": float(here.donor_loss_N.mean()),
        "student_loss_nats_per_token": float(here.student_loss_N.mean()),
        "kl_nats_per_token": float(here.kl_N.mean()),
        "difference": bootstrap.interval(difference_W, here.by_window(np.ones(len(here)))),
    }
