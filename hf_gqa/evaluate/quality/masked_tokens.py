"""Donor and student of an encoder guessing the same masked tokens: the loss of each, and how far they are apart.

Each window is read once with some of its tokens masked, which is what the model was trained for; it is no probability of
the text. `B` windows of a batch, `T` positions, `N` scored tokens.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ...refusal import Refusal
from ..inputs.documents import Documents
from ..inputs.padding import padded
from .token_scores import TokenScores, check_finite, collected, compare


MASKED_FRACTION = 0.15


@dataclass(frozen=True, slots=True, kw_only=True)
class MaskedWindow:
    """Tokens with those around them, and which of them are to be guessed.

    Args:
        tokens: as they are.
        masked: positions to be guessed, in order.
    """

    tokens: tuple[int, ...]
    masked: tuple[int, ...]


def encoder_windows(
    documents: Documents, tokenizer: PreTrainedTokenizerBase, context_tokens: int
) -> Iterator[tuple[tuple[int, ...], range]]:
    """(tokens, positions of the text's own) of pieces of the documents, each with the special tokens around it."""
    before, after = tokens_around(tokenizer)
    room = context_tokens - len(before) - len(after)
    if room < 1:
        raise Refusal(f"context_length = {context_tokens}: leaves no room beside the special tokens. Use more.")
    for ids in documents.ids:
        for begin in range(0, len(ids), room):
            piece = ids[begin : begin + room].tolist()
            yield (*before, *piece, *after), range(len(before), len(before) + len(piece))


def tokens_around(tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], list[int]]:
    """The special tokens that the tokenizer puts before and after a text."""
    marked = tokenizer("a", return_special_tokens_mask=True)
    ids, special = marked["input_ids"], marked["special_tokens_mask"]
    own = [number for number, is_special in enumerate(special) if not is_special]
    if not own:
        return ids[:1], ids[1:]
    return ids[: own[0]], ids[own[-1] + 1 :]


def masked_windows(
    documents: Documents, tokenizer: PreTrainedTokenizerBase, context_tokens: int, seed: int
) -> list[MaskedWindow]:
    """15% of each window's tokens, at least one, drawn from the seed and the window's number alone."""
    if tokenizer.mask_token_id is None:
        raise Refusal("tokenizer: has no mask token, so nothing can be masked. Give the donor's own tokenizer.")
    windows = []
    for number, (tokens, own) in enumerate(encoder_windows(documents, tokenizer, context_tokens)):
        count = max(1, round(MASKED_FRACTION * len(own)))
        chosen = np.random.default_rng([seed, number]).choice(len(own), size=count, replace=False)
        windows.append(MaskedWindow(tokens=tokens, masked=tuple(sorted(own.start + int(place) for place in chosen))))
    return windows


@torch.inference_mode()
def score_masked(
    donor: PreTrainedModel,
    student: PreTrainedModel,
    windows: Sequence[MaskedWindow],
    mask_token: int,
    batch_size: int,
    seen: Callable[[int], object] = lambda tokens: None,
) -> TokenScores:
    """Every masked token once, both models reading the same masked windows.

    Raises:
        Refusal: a loss that is NaN or Inf.
    """
    parts = []
    ordered = sorted(enumerate(windows), key=lambda pair: -len(pair[1].tokens))
    for begin in range(0, len(ordered), batch_size):
        numbers, batch = zip(*ordered[begin : begin + batch_size], strict=True)
        tokens_BT, mask_BT = (each.to(donor.device) for each in padded([window.tokens for window in batch], 0))
        scored_BT = torch.zeros_like(tokens_BT, dtype=torch.bool)
        for row, window in enumerate(batch):
            scored_BT[row, list(window.masked)] = True
        read = {"input_ids": tokens_BT.masked_fill(scored_BT, mask_token), "attention_mask": mask_BT}
        theirs, ours = (model(**read).logits for model in (donor, student))
        counts = [len(window.masked) for window in batch]
        found = compare(theirs[scored_BT], ours[scored_BT], tokens_BT[scored_BT])
        lengths = [len(window.tokens) for window in batch]
        parts.append([np.repeat(numbers, counts), np.repeat(lengths, counts), *found])
        seen(sum(lengths))
    scores = collected(parts)
    check_finite(scores)
    return scores
