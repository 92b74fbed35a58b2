"""Rows of many lengths as the tensors of a batch, and some of many rows from all over."""

from collections.abc import Sequence

import torch


def padded(rows: Sequence[Sequence[int]], fill: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(tokens, mask) `[rows, longest]`, filled on the right, where every kind of position has begun to count."""
    longest = max(map(len, rows))
    tokens = torch.full((len(rows), longest), fill, dtype=torch.long)
    mask = torch.zeros_like(tokens)
    for number, row in enumerate(rows):
        tokens[number, : len(row)] = torch.tensor(row)
        mask[number, : len(row)] = 1
    return tokens, mask


def evenly_spread(count: int, wanted: int | None) -> list[int]:
    """Numbers below `count`, at most `wanted` of them, from all over; None: all of them."""
    if wanted is None or wanted >= count:
        return list(range(count))
    return [(2 * number + 1) * count // (2 * wanted) for number in range(wanted)]
