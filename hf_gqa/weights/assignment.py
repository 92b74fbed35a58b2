"""Who does what so that the whole costs least."""

from collections.abc import Sequence
from math import inf


def cheapest_assignment(cost: Sequence[Sequence[float]]) -> list[int]:
    """The column that each row takes, each column once, so that the sum of costs is smallest; exact, for any sign.

    Source: the Hungarian method (Kuhn 1955) by shortest augmenting paths: rows come one after the other, and each takes the
    cheapest way to a free column, by which rows before it may move on.
    """
    row_price, column_price = [0.0] * len(cost), [0.0] * len(cost)
    row_of: list[int | None] = [None] * len(cost)
    for new in range(len(cost)):
        reached = [inf] * len(cost)
        before: list[int | None] = [None] * len(cost)
        left, row, column, so_far = set(range(len(cost))), new, None, 0.0
        while row is not None:
            for other in left:
                price = so_far + cost[row][other] - row_price[row] - column_price[other]
                if price < reached[other]:
                    reached[other], before[other] = price, column
            column = min(left, key=reached.__getitem__)
            left.remove(column)
            row, so_far = row_of[column], reached[column]
        row_price[new] += so_far
        for passed in set(range(len(cost))) - left - {column}:
            row_price[row_of[passed]] += so_far - reached[passed]
            column_price[passed] -= so_far - reached[passed]
        while column is not None:
            row_of[column] = new if before[column] is None else row_of[before[column]]
            column = before[column]
    return [row_of.index(row) for row in range(len(cost))]
