"""Donor and student of an encoder-decoder on the same targets: the loss of each, and how far they are apart.

`B` pairs of a batch, `S` source tokens, `T` target tokens, `N` scored tokens.
"""

from collections.abc import Callable, Sequence

import numpy as np
import torch
from transformers import PreTrainedModel

from ..inputs.padding import padded
from ..inputs.seq2seq_pairs import TokenPair
from ..report import SourceLengthLoss
from .bootstrap import Bootstrap
from .token_scores import IGNORED, TokenScores, check_finite, collected, compare


FIRST_SOURCES_END = 32


@torch.inference_mode()
def score_pairs(
    donor: PreTrainedModel,
    student: PreTrainedModel,
    rows: Sequence[TokenPair],
    batch_size: int,
    seen: Callable[[int], object] = lambda tokens: None,
) -> TokenScores:
    """Every token of every target, given its source and the target's tokens before it (teacher forcing).

    The models make the decoder's input of the target themselves, as they do in training.

    Returns:
        Scores whose windows are the pairs, and whose contexts are the lengths of the sources.

    Raises:
        Refusal: a loss that is NaN or Inf.
    """
    parts = []
    ordered = sorted(rows, key=lambda row: (-len(row.source_ids), -len(row.target_ids)))
    for begin in range(0, len(ordered), batch_size):
        batch = ordered[begin : begin + batch_size]
        source_BS, mask_BS = padded([row.source_ids for row in batch], 0)
        target_BT, scored_BT = padded([row.target_ids for row in batch], IGNORED)
        read = {"input_ids": source_BS, "attention_mask": mask_BS, "labels": target_BT}
        read = {name: tensor.to(donor.device) for name, tensor in read.items()}
        theirs, ours = (model(**read, use_cache=False).logits for model in (donor, student))
        chosen_BT = scored_BT.bool().to(donor.device)
        found = compare(theirs[chosen_BT], ours[chosen_BT], read["labels"][chosen_BT])
        lengths = [len(row.target_ids) for row in batch]
        numbers = ([row.pair for row in batch], [len(row.source_ids) for row in batch])
        parts.append([*(np.repeat(values, lengths) for values in numbers), *found])
        seen(sum(lengths))
    scores = collected(parts)
    check_finite(scores)
    return scores


def by_source_length(scores: TokenScores, bootstrap: Bootstrap) -> tuple[SourceLengthLoss, ...]:
    """Losses of the pairs by how long their source is: up to 32 tokens, then up to each power of two."""
    lasts = [FIRST_SOURCES_END]
    while lasts[-1] < scores.context_N.max():
        lasts.append(2 * lasts[-1])
    rows = []
    for before, last in zip([0, *lasts], lasts, strict=False):
        here = scores.where((scores.context_N > before) & (scores.context_N <= last))
        if len(here):
            difference_W = here.by_window(here.student_loss_N - here.donor_loss_N)
            rows.append(
                SourceLengthLoss(
                    first_source_tokens=int(here.context_N.min()),
                    last_source_tokens=int(here.context_N.max()),
                    pairs=here.windows,
                    tokens=len(here),
                    donor_loss_nats_per_token=float(here.donor_loss_N.mean()),
                    student_loss_nats_per_token=float(here.student_loss_N.mean()),
                    kl_nats_per_token=float(here.kl_N.mean()),
                    difference=bootstrap.interval(difference_W, here.by_window(np.ones(len(here)))),
                )
            )
    return tuple(rows)
