"""How many KV heads each layer gets out of one budget for all of them; integers and damages, no models."""

from collections.abc import Mapping, Sequence

from ..refusal import Refusal


Damages = Sequence[Mapping[int, float]]  # of each layer: KV heads -> what having so few costs


def best_assignment(damages: Damages, budget_heads: int) -> tuple[int, ...]:
    """The assignment of least summed damage whose KV heads are no more than the budget, by dynamic programming.

    A multiple-choice knapsack: exact, in time proportional to layers x budget x choices. Of equal damages, the one that
    spends less.

    Raises:
        Refusal: even the fewest heads of every layer are more.
    """
    check_budget(damages, budget_heads)
    best: dict[int, tuple[float, tuple[int, ...]]] = {
        0: (0.0, ())
    }  # heads spent -> (damage, heads of the layers so far)
    for choices in damages:
        longer: dict[int, tuple[float, tuple[int, ...]]] = {}
        for spent, (damage, heads) in best.items():
            for choice, cost in choices.items():
                total, found = spent + choice, (damage + cost, (*heads, choice))
                if total <= budget_heads and (total not in longer or found < longer[total]):
                    longer[total] = found
        best = longer
    return min(best.items(), key=lambda item: (item[1][0], item[0]))[1][1]


def greedy_assignment(damages: Damages, budget_heads: int) -> tuple[int, ...]:
    """From the most heads down, the step that costs least for each head it saves, until the budget is met.

    The baseline of `best_assignment`; it may miss the best, and may save more than it was asked to.
    """
    check_budget(damages, budget_heads)
    heads = [max(choices) for choices in damages]
    while sum(heads) > budget_heads:
        steps = [
            ((choices[fewer] - choices[now]) / (now - fewer), layer, fewer)
            for layer, (choices, now) in enumerate(zip(damages, heads, strict=True))
            for fewer in choices
            if fewer < now
        ]
        _, layer, fewer = min(steps)
        heads[layer] = fewer
    return tuple(heads)


def check_budget(damages: Damages, budget_heads: int) -> None:
    """Raises Refusal where no assignment meets the budget."""
    least = sum(min(choices) for choices in damages)
    if budget_heads < least:
        raise Refusal(
            f"budget: {budget_heads} KV heads in all {len(damages)} layers together are fewer than the {least} that they "
            f"have at least. Allow {least} or more."
        )
