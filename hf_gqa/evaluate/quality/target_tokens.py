"""Donor and student of an encoder-decoder on the same targets: the loss of each, and how far they are apart.

`B` pairs of a batch, `S` source tokens, `T` target tokens, `N` scored tokens.
"""

from collections.abc import Callable, Sequence

import numpy as np
import torch
from transformers import PreTrainedModel

from ..inputs.padding import padded
from ..inputs.seq2seq_pairs import TokenPair
from .token_scores import IGNORED, TokenScores, check_finite, collected, compare


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
