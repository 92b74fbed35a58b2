"""Donor's and student's embeddings of the same text: how near each pair is, and whether they order texts alike.

`B` windows of a batch, `T` positions, `E` hidden, `W` windows.
"""

from collections.abc import Callable, Sequence

import numpy as np
import torch
from transformers import PreTrainedModel

from ..inputs.padding import evenly_spread, padded
from ..report import Embeddings
from .bootstrap import Bootstrap


FEWEST_TO_RANK, MOST_TO_RANK = 3, 1024


@torch.inference_mode()
def embedded(
    model: PreTrainedModel,
    windows: Sequence[Sequence[int]],
    batch_size: int,
    seen: Callable[[int], object] = lambda tokens: None,
) -> np.ndarray:
    """`[W, E]`: the mean of the last hidden states over a window's tokens, those around the text included; in fp32."""
    encoder, found = model.base_model, [None] * len(windows)
    ordered = sorted(range(len(windows)), key=lambda number: -len(windows[number]))
    for begin in range(0, len(ordered), batch_size):
        batch = ordered[begin : begin + batch_size]
        tokens_BT, mask_BT = (each.to(model.device) for each in padded([windows[number] for number in batch], 0))
        hidden_BTE = encoder(input_ids=tokens_BT, attention_mask=mask_BT).last_hidden_state.float()
        weight_BT1 = mask_BT.unsqueeze(-1).float()
        mean_BE = (hidden_BTE * weight_BT1).sum(1) / weight_BT1.sum(1)
        for number, row_E in zip(batch, mean_BE.cpu().numpy().astype(np.float64), strict=True):
            found[number] = row_E
        seen(int(mask_BT.sum()))
    return np.stack(found)


def compare_embeddings(donor_WE: np.ndarray, student_WE: np.ndarray, bootstrap: Bootstrap) -> Embeddings:
    """Cosine of each window's two embeddings, and the rank correlation of the cosines between windows."""
    theirs_WE, ours_WE = (
        rows_WE / np.linalg.norm(rows_WE, axis=1, keepdims=True) for rows_WE in (donor_WE, student_WE)
    )
    cosine_W = (theirs_WE * ours_WE).sum(1)
    chosen = evenly_spread(len(cosine_W), MOST_TO_RANK)
    above = np.triu_indices(len(chosen), k=1)
    between = [(rows_WE[chosen] @ rows_WE[chosen].T)[above] for rows_WE in (theirs_WE, ours_WE)]
    return Embeddings(
        windows=len(cosine_W),
        mean_cosine=float(cosine_W.mean()),
        cosine=bootstrap.interval(cosine_W, np.ones(len(cosine_W))),
        spearman=rank_correlation(*between) if len(chosen) >= FEWEST_TO_RANK else None,
        spearman_windows=len(chosen),
    )


def rank_correlation(one_N: np.ndarray, other_N: np.ndarray) -> float | None:
    """Spearman's, with the mean rank for what is equal; None where all of one are equal."""
    ranks = []
    for values_N in (one_N, other_N):
        _, place_N, count_U = np.unique(values_N, return_inverse=True, return_counts=True)
        last_U = np.cumsum(count_U)
        ranks.append((last_U - (count_U - 1) / 2)[place_N])
    spread = [rank_N - rank_N.mean() for rank_N in ranks]
    size = np.sqrt((spread[0] ** 2).sum() * (spread[1] ** 2).sum())
    return float((spread[0] * spread[1]).sum() / size) if size else None
