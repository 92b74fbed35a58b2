"""KV heads are put next to those with which they share best; groups stay of one size."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from itertools import combinations
from math import factorial

import torch

from ..weights.attention_weights import AttentionWeights
from ..weights.head_spaces import HeadSpace, key_spaces, value_space
from . import MethodContext


MOST_PARTITIONS = 2000  # that are all tried; beyond, swaps from several starts
STARTS = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class Group:
    """The partition of which `fold` would keep the most energy, of keys and of values alike.

    Source: QCQA (Joshi et al. 2024, arXiv 2406.10247) for the search; what is kept is measured as `fold` keeps it.
    """

    kind: str = "rearrange"
    moves_heads: bool = True

    def __call__(self, heads: AttentionWeights, layer: MethodContext) -> AttentionWeights:
        count, size = heads.num_key_value_heads, heads.num_key_value_heads // layer.num_key_value_heads
        if size in (1, count):
            return heads
        statistics = layer.statistics_for(heads)
        kept = _energy([key_spaces(heads, statistics, layer.rotation), [value_space(heads, statistics)]])
        partitions = factorial(count) // factorial(size) ** (count // size) // factorial(count // size)
        if partitions <= MOST_PARTITIONS:
            best = max(_partitions(tuple(range(count)), size), key=lambda groups: sum(map(kept, groups)))
        else:
            best = _swapped(count, size, layer.seed + layer.layer_idx, kept)
        return heads.reordered([member for group in best for member in group])


def _energy(kinds: list[list[HeadSpace]]) -> Callable[[tuple[int, ...]], float]:
    """What a group keeps of the whole layer's energy, as fractions that keys and values may lose alike."""
    weighted = [[space.weighted_BKdKd for space in spaces] for spaces in kinds]
    totals = [sum(float(torch.einsum("bhihi->", part).real) for part in parts) for parts in weighted]

    @cache
    def kept(group: tuple[int, ...]) -> float:
        energy, picked = 0.0, torch.tensor(group)
        for parts, total in zip(weighted, totals, strict=True):
            for moment_BKdKd in parts:
                width = moment_BKdKd.shape[2]
                block = moment_BKdKd[:, picked][:, :, :, picked].reshape(len(moment_BKdKd), width * len(group), -1)
                energy += float(torch.linalg.eigvalsh(block)[:, -width:].sum()) / max(total, 1e-300)
        return energy

    return kept


def _partitions(members: tuple[int, ...], size: int) -> Iterator[list[tuple[int, ...]]]:
    """All ways to put the members into groups of one size, in a fixed order."""
    if not members:
        yield []
        return
    first, others = members[0], members[1:]
    for mates in combinations(others, size - 1):
        left = tuple(member for member in others if member not in mates)
        yield from ([(first, *mates), *groups] for groups in _partitions(left, size))


def _swapped(count: int, size: int, seed: int, kept: Callable) -> list[tuple[int, ...]]:
    """The best of several starts, each improved by exchanging two members while that helps."""
    generator = torch.Generator().manual_seed(seed)
    found = []
    for start in range(STARTS):
        order = torch.arange(count) if start == 0 else torch.randperm(count, generator=generator)
        groups = [tuple(sorted(group)) for group in order.unflatten(0, (-1, size)).tolist()]
        while _improve_by_a_swap(groups, kept):
            pass
        found.append(sorted(groups))
    return max(found, key=lambda groups: sum(map(kept, groups)))


def _improve_by_a_swap(groups: list[tuple[int, ...]], kept: Callable) -> bool:
    for one in range(len(groups)):
        for other in range(one):
            now = kept(groups[one]) + kept(groups[other])
            for mine in groups[one]:
                for theirs in groups[other]:
                    pair = [
                        tuple(sorted((set(groups[one]) - {mine}) | {theirs})),
                        tuple(sorted((set(groups[other]) - {theirs}) | {mine})),
                    ]
                    if sum(map(kept, pair)) > now + 1e-9:
                        groups[one], groups[other] = pair
                        return True
    return False


METHOD = Group()
