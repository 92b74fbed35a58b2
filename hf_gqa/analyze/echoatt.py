"""Layers chosen by how alike their attention is. Source: EchoAtt (Rajabzadeh et al. 2024, arXiv 2409.14595), section 3.2."""

import numpy as np


def mean_similarity(similarity_LL: np.ndarray) -> np.ndarray:
    """`[L]`: each layer's mean cosine with all others."""
    layers = len(similarity_LL)
    return (similarity_LL.sum(1) - similarity_LL.diagonal()) / (layers - 1)


def kept_layers(similarity_LL: np.ndarray) -> list[int]:
    """Layers that the paper leaves untouched: those at either end that lie below the largest gap of the sorted means.

    A layer below the gap that has shared layers on both sides of it is no end, and is shared.
    """
    mean_L = mean_similarity(similarity_LL)
    order = np.argsort(mean_L, kind="stable")
    gap = int(np.diff(mean_L[order]).argmax())
    below, layers = set(order[: gap + 1].tolist()), len(mean_L)
    first = next(layer for layer in range(layers) if layer not in below)
    last = next(layer for layer in reversed(range(layers)) if layer not in below)
    return [*range(first), *range(last + 1, layers)]


def block_borrowers(similarity_LL: np.ndarray, block_layers: int) -> list[int]:
    """The paper's choice: inner layers in blocks of `block_layers`, all but the first of a block borrow from that."""
    kept = set(kept_layers(similarity_LL))
    inner = [layer for layer in range(len(similarity_LL)) if layer not in kept]
    return [layer for place, layer in enumerate(inner) if place % block_layers]


def ranked_borrowers(similarity_LL: np.ndarray, can_borrow: list[int]) -> list[int]:
    """Layers in the order in which the paper shares more of them: most alike to all others first.

    Its sets of 23, 41 and 77% of TinyLlama's layers hold each other in one order; which, it does not say.

    Args:
        can_borrow: layers that have an earlier one to borrow from.
    """
    mean_L = mean_similarity(similarity_LL)
    return sorted(can_borrow, key=lambda layer: (-mean_L[layer], layer))
