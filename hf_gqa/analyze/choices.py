"""What each way to choose would have borrow, for every number of borrowers."""

from collections.abc import Mapping, Sequence

import numpy as np

from ..convert.donor import Donor
from ..convert.plan import ConversionPlan
from ..refusal import Refusal
from ..sharing import SHARINGS
from .echoatt import block_borrowers, ranked_borrowers
from .prices import PriceList
from .recipe import AnalysisRecipe
from .solver import Choice, cheapest_choices, cheapest_sets, choice_of, greedy_choices, nearest_owners


Pairs = Sequence[tuple[int, int]]  # (borrower, owner)


def check_budget(recipe: AnalysisRecipe, kinds: Sequence[str], pairs: Pairs, prices: PriceList, where: str) -> None:
    """Refuse a budget that the donor meets as it is, or that no sharing meets."""
    for budget in recipe.budgets:
        asked = getattr(recipe, budget)
        whole = prices.to_save(recipe.sharing, budget, 0)
        wanted = prices.to_save(recipe.sharing, budget, asked)
        if wanted < 1:
            raise Refusal(
                f"{budget} = {asked:,}: '{where}' needs only {whole:,} without sharing. Use less, or no budget."
            )
        most = cheapest_choices(kinds, dict.fromkeys(pairs, 1.0), prices.saved(recipe.sharing, budget))[-1].saved
        if wanted > most:
            bound = f"{most:,} or fewer" if budget == "shared_layers" else f"{whole - most:,} or more"
            raise Refusal(
                f"{budget} = {asked:,}: no plan with sharing = {recipe.sharing} for '{where}' meets it. Use {bound}, or "
                f"another --sharing, --num-key-value-heads or --reach."
            )


def choices_by_number(
    kinds: Sequence[str], costs: Mapping[tuple[int, int], float], similarity_LL: np.ndarray, block_layers: int
) -> list[tuple[str, Choice]]:
    """(chooser, what it chooses) for every number of borrowers, and the paper's own blocks last."""
    one_each = [1] * len(kinds)
    exact, greedy = cheapest_choices(kinds, costs, one_each), greedy_choices(kinds, costs, one_each)
    found = [("kl", choice) for choice in exact if choice.owners]
    found += [("greedy", choice) for choice in greedy if choice.owners]
    can_borrow = [layer for layer, kind in enumerate(kinds) if kind in kinds[:layer]]
    ranked = ranked_borrowers(similarity_LL, can_borrow)
    found += [("echoatt", _of(ranked[:number], kinds, costs)) for number in range(1, len(ranked) + 1)]
    found.sort(key=lambda pair: len(pair[1].owners))
    blocks = [layer for layer in block_borrowers(similarity_LL, block_layers) if layer in can_borrow]
    return found + ([("echoatt_blocks", _of(blocks, kinds, costs))] if blocks else [])


def _of(borrowers: Sequence[int], kinds: Sequence[str], costs: Mapping[tuple[int, int], float]) -> Choice:
    """The choice with these borrowers; its cost is NaN where a pair was not measured."""
    one_each = [1] * len(kinds)
    owners = nearest_owners(borrowers, kinds)
    unmeasured = Choice(owners=owners, saved=len(owners), cost=float("nan"))
    return choice_of(borrowers, kinds, costs, one_each) or unmeasured


def shortlist(
    recipe: AnalysisRecipe, kinds: Sequence[str], costs: Mapping[tuple[int, int], float], prices: PriceList
) -> list[Choice]:
    """The cheapest that meet the recipe's budget, which has been checked; none without one."""
    for budget in recipe.budgets:
        wanted = prices.to_save(recipe.sharing, budget, getattr(recipe, budget))
        return cheapest_sets(kinds, costs, prices.saved(recipe.sharing, budget), wanted, recipe.candidates)
    return []


def first_that_meets(recipe: AnalysisRecipe, choices: Sequence[Choice], prices: PriceList) -> Choice | None:
    """Of choices with ever more borrowers the first that meets the recipe's budget, which has been checked; None without one."""
    for budget in recipe.budgets:
        wanted = prices.to_save(recipe.sharing, budget, getattr(recipe, budget))
        saved = prices.saved(recipe.sharing, budget)
        return next(choice for choice in choices if sum(saved[layer] for layer in choice.owners) >= wanted)
    return None


def plan_of(donor: Donor, recipe: AnalysisRecipe, choice: Choice) -> ConversionPlan:
    """By the numbers of the layers where `convert` lets them borrow from the same owners, else row by row."""
    heads = recipe.num_key_value_heads
    plan = ConversionPlan(sharing=recipe.sharing, shared_layers=tuple(choice.borrowers), num_key_value_heads=heads)
    types = getattr(donor.config, "layer_types", None) or ["attention"] * donor.config.num_hidden_layers
    lenders = tuple(choice.owners.get(layer, layer) for layer in range(len(types)))
    wanted = tuple(heads or own for own in donor.num_key_value_heads)
    rows = SHARINGS.get(recipe.sharing)(lenders, wanted)
    if plan.rows(donor.num_key_value_heads, types) == rows:
        return plan
    return ConversionPlan(layer_plan=tuple(row.to_dict() for row in rows))
