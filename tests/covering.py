"""Fewer cases than a full product, for tests that go over every family and several ways of running it."""

from collections.abc import Callable, Iterable
from itertools import combinations, product

import pytest


def each_value(**axes: Iterable) -> pytest.MarkDecorator:
    """Cases in which each value of the first axis meets each value of every other; which of those meet takes turns."""
    return cases_for_each(shifted_rows, axes)


def each_pair(**axes: Iterable) -> pytest.MarkDecorator:
    """Cases in which each value of the first axis meets each pair of values of two others."""
    return cases_for_each(rows_with_every_pair, axes)


def cases_for_each(rows_of: Callable, axes: dict[str, Iterable]) -> pytest.MarkDecorator:
    first, *others = (list(choices) for choices in axes.values())
    return pytest.mark.parametrize(
        tuple(axes), [(value, *row) for turn, value in enumerate(first) for row in rows_of(others, turn)]
    )


def shifted_rows(axes: list[list], turn: int) -> list[tuple]:
    """As many as the longest axis has values; each axis is shifted by `turn` against the one before."""
    rows = range(max(map(len, axes)))
    return [tuple(axis[(row + turn * place) % len(axis)] for place, axis in enumerate(axes)) for row in rows]


def rows_with_every_pair(axes: list[list], turn: int) -> list[tuple]:
    """Greedily: always the row with the most pairs that none before had, of equals the first from the `turn`-th on."""
    rows = list(product(*(range(len(axis)) for axis in axes)))
    rows = rows[turn % len(rows) :] + rows[: turn % len(rows)]
    missing, chosen = set().union(*map(pairs_in, rows)), []
    while missing:
        chosen.append(max(rows, key=lambda row: len(missing & pairs_in(row))))
        missing -= pairs_in(chosen[-1])
    return [tuple(axis[place] for axis, place in zip(axes, row, strict=True)) for row in chosen]


def pairs_in(row: tuple) -> set:
    return set(combinations(enumerate(row), 2))
