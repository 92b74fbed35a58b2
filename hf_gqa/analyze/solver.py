"""The sharing with the smallest sum of costs for what it must save, exactly, and the greedy choice to compare it with.

A borrower borrows from the nearest earlier owner of its own kind (layers that attend alike and have the same heads), as
in the plans that `convert` takes. The sum of what single borrowers cost is only a guess of what they cost together.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from .borrowing import Owners


PairCosts = Mapping[tuple[int, int], float]  # (borrower, owner) -> cost; pairs that are not in it are not allowed


@dataclass(frozen=True, slots=True, kw_only=True)
class Choice:
    """Borrowers with their owners, what they save, and the sum of what each costs alone."""

    owners: Owners
    saved: int
    cost: float

    @property
    def borrowers(self) -> list[int]:
        return sorted(self.owners)


def cheapest_choices(kinds: Sequence, costs: PairCosts, saved: Sequence[int]) -> list[Choice]:
    """For every amount that can be saved the cheapest choice, without those that another beats in both; least first.

    A dynamic program over layers: what later layers can borrow depends on earlier ones only through the last owner, so
    for each last owner the best choices so far are kept, one for each amount saved that no other beats.

    Args:
        kinds: of each layer; layers of different kinds never share.
        costs: of each borrower with each owner, not negative.
        saved: what each layer saves as a borrower, in any unit.
    """
    fronts = [[Choice(owners={}, saved=0, cost=0.0)]]
    for kind in dict.fromkeys(kinds):
        layers = [layer for layer, other in enumerate(kinds) if other == kind]
        fronts.append(_cheapest_in_chain(layers, costs, saved))
    joined = fronts[0]
    for front in fronts[1:]:
        joined = _front([_both(one, other) for one in joined for other in front])
    return joined


def choose(choices: Sequence[Choice], to_save: int) -> Choice | None:
    """The cheapest that saves enough, or None."""
    enough = [choice for choice in choices if choice.saved >= to_save]
    return min(enough, key=lambda choice: (choice.cost, choice.saved), default=None)


def cheapest_sets(kinds: Sequence, costs: PairCosts, saved: Sequence[int], to_save: int, count: int) -> list[Choice]:
    """The `count` cheapest choices, cheapest first, that save enough, and that without their last borrower do not.

    For measuring together what sums only guess: the same dynamic program, with as many choices kept for each last owner
    and amount saved, where all amounts that are enough are one.
    """
    chains = [[layer for layer, other in enumerate(kinds) if other == kind] for kind in dict.fromkeys(kinds)]
    joined = [Choice(owners={}, saved=0, cost=0.0)]
    for layers in chains:
        by_last_owner = {layers[0]: joined}
        for layer in layers[1:]:
            owning = [choice for choices in by_last_owner.values() for choice in choices]
            for owner, choices in by_last_owner.items():
                cost = costs.get((layer, owner))
                wanting = [] if cost is None else [choice for choice in choices if choice.saved < to_save]
                by_last_owner[owner] = [_with_borrower(choice, layer, owner, cost, saved) for choice in wanting]
            by_last_owner[layer] = owning
            by_last_owner = {owner: _shortest(choices, to_save, count) for owner, choices in by_last_owner.items()}
        joined = _shortest([choice for choices in by_last_owner.values() for choice in choices], to_save, count)
    return sorted((choice for choice in joined if choice.saved >= to_save), key=lambda choice: choice.cost)


def _shortest(choices: list[Choice], to_save: int, count: int) -> list[Choice]:
    """The `count` cheapest of each amount saved."""
    kept: dict[int, list[Choice]] = {}
    for choice in sorted(choices, key=lambda one: one.cost):
        of_amount = kept.setdefault(min(choice.saved, to_save), [])
        if len(of_amount) < count:
            of_amount.append(choice)
    return [choice for of_amount in kept.values() for choice in of_amount]


def greedy_choices(kinds: Sequence, costs: PairCosts, saved: Sequence[int]) -> list[Choice]:
    """The baseline: again and again the layer that adds least to the sum for what it saves becomes a borrower."""
    choices = [Choice(owners={}, saved=0, cost=0.0)]
    while True:
        current = choices[-1]
        bigger = [
            choice
            for layer in range(len(kinds))
            if layer not in current.owners
            and (choice := choice_of([*current.owners, layer], kinds, costs, saved)) is not None
        ]
        if not bigger:
            return choices
        choices.append(min(bigger, key=lambda one: (one.cost - current.cost) / max(1, one.saved - current.saved)))


def choice_of(borrowers: Sequence[int], kinds: Sequence, costs: PairCosts, saved: Sequence[int]) -> Choice | None:
    """The choice with these borrowers; None if one has no owner that it may borrow from."""
    owners = nearest_owners(borrowers, kinds)
    if any(pair not in costs for pair in owners.items()):
        return None
    cost = sum(costs[pair] for pair in sorted(owners.items()))
    return Choice(owners=owners, saved=sum(saved[layer] for layer in owners), cost=cost)


def nearest_owners(borrowers: Sequence[int], kinds: Sequence) -> dict[int, int]:
    """Each borrower's nearest earlier owner of its kind; -1 where there is none."""
    owners, last = {}, {}
    for layer, kind in enumerate(kinds):
        if layer in borrowers:
            owners[layer] = last.get(kind, -1)
        else:
            last[kind] = layer
    return owners


def _cheapest_in_chain(layers: list[int], costs: PairCosts, saved: Sequence[int]) -> list[Choice]:
    """`cheapest_choices` among layers of one kind, the first of which must own."""
    by_last_owner = {layers[0]: [Choice(owners={}, saved=0, cost=0.0)]}
    for layer in layers[1:]:
        owning = _front([choice for front in by_last_owner.values() for choice in front])
        for owner, front in by_last_owner.items():
            cost = costs.get((layer, owner))
            borrowing = [] if cost is None else [_with_borrower(choice, layer, owner, cost, saved) for choice in front]
            by_last_owner[owner] = borrowing
        by_last_owner[layer] = owning
    return _front([choice for front in by_last_owner.values() for choice in front])


def _with_borrower(choice: Choice, layer: int, owner: int, cost: float, saved: Sequence[int]) -> Choice:
    return Choice(owners={**choice.owners, layer: owner}, saved=choice.saved + saved[layer], cost=choice.cost + cost)


def _both(one: Choice, other: Choice) -> Choice:
    return Choice(owners={**one.owners, **other.owners}, saved=one.saved + other.saved, cost=one.cost + other.cost)


def _front(choices: list[Choice]) -> list[Choice]:
    """Those that no other beats, least saved first."""
    kept: list[Choice] = []
    for choice in sorted(choices, key=lambda one: (-one.saved, one.cost)):
        if not kept or choice.cost < kept[-1].cost:
            kept.append(choice)
    return kept[::-1]
