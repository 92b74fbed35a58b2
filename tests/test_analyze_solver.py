"""The solver against every sharing that there is; EchoAtt's selection against cases worked out by hand."""

from itertools import combinations, pairwise

import numpy as np
import pytest

from hf_gqa.analyze.echoatt import block_borrowers, kept_layers, mean_similarity, ranked_borrowers
from hf_gqa.analyze.solver import cheapest_choices, cheapest_sets, choice_of, choose, greedy_choices, nearest_owners


def random_problem(seed: int, layers: int = 7, kinds_of_layers: int = 2):
    """Layers of some kinds, costs and savings that differ, and a pair in five not allowed."""
    random = np.random.default_rng(seed)
    kinds = random.choice(["full", "sliding"][:kinds_of_layers], layers).tolist()
    costs = {
        (borrower, owner): float(random.integers(1, 50))
        for borrower in range(layers)
        for owner in range(borrower)
        if kinds[borrower] == kinds[owner] and random.random() < 0.8
    }
    return kinds, costs, random.integers(1, 4, layers).tolist()


def every_choice(kinds, costs, saved):
    layers = range(len(kinds))
    sets = [borrowers for number in layers for borrowers in combinations(layers, number)]
    return [found for borrowers in sets if (found := choice_of(borrowers, kinds, costs, saved)) is not None]


@pytest.mark.parametrize("seed", range(20))
def test_solver_finds_the_cheapest_for_every_amount(seed):
    problem = random_problem(seed)
    every, exact = every_choice(*problem), cheapest_choices(*problem)
    for to_save in range(1 + max(choice.saved for choice in every)):
        best = min(choice.cost for choice in every if choice.saved >= to_save)
        found = choose(exact, to_save)
        assert found.cost == best and found.saved >= to_save
        again = choice_of(found.borrowers, *problem)
        assert (again.owners, again.saved) == (found.owners, found.saved)
    assert choose(exact, 1 + max(choice.saved for choice in every)) is None


def test_choices_are_a_front():
    found = cheapest_choices(*random_problem(3))
    assert found[0].owners == {} and found[0].cost == 0
    assert all(less.saved < more.saved and less.cost < more.cost for less, more in pairwise(found))


def test_greedy_is_a_baseline_that_the_exact_choice_beats():
    better = 0
    for seed in range(20):
        problem = random_problem(seed)
        exact, greedy = cheapest_choices(*problem), greedy_choices(*problem)
        for to_save in range(1, 1 + greedy[-1].saved):
            assert choose(exact, to_save).cost <= choose(greedy, to_save).cost
            better += choose(exact, to_save).cost < choose(greedy, to_save).cost
    assert better


def test_layers_in_a_row_borrow_from_one_owner_and_kinds_do_not_mix():
    kinds = ["full", "sliding", "full", "sliding", "full"]
    assert nearest_owners([2, 3, 4], kinds) == {2: 0, 3: 1, 4: 0}
    assert nearest_owners([0, 4], kinds) == {0: -1, 4: 2}


def test_first_layer_never_borrows():
    choice = cheapest_choices(["full"] * 4, {(b, o): 1.0 for b in range(4) for o in range(b)}, [1] * 4)[-1]
    assert choice.owners == {1: 0, 2: 0, 3: 0}


def similarity_with_means(means: list[float]) -> np.ndarray:
    """A matrix whose off-diagonal rows have these means: entry (i, j) is a_i + a_j."""
    layers = len(means)
    shares = np.linalg.solve(np.ones((layers, layers)) + (layers - 2) * np.eye(layers), np.array(means) * (layers - 1))
    similarity = shares[:, None] + shares[None, :]
    np.fill_diagonal(similarity, 1.0)
    np.testing.assert_allclose(mean_similarity(similarity), means)
    return similarity


@pytest.mark.parametrize(
    ("means", "kept", "block", "borrowers"),
    [
        ([0.2, 0.3, 0.7, 0.8, 0.75, 0.72, 0.25], [0, 1, 6], 2, [3, 5]),  # gap between 0.3 and 0.7
        ([0.2, 0.3, 0.7, 0.8, 0.75, 0.72, 0.25], [0, 1, 6], 3, [3, 4]),
        ([0.2, 0.7, 0.25, 0.8, 0.75], [0], 4, [2, 3, 4]),  # layer 2 is below the gap and at no end: shared
        ([0.8, 0.7, 0.75, 0.1], [3], 2, [1]),  # nothing to keep at the beginning
    ],
)
def test_echoatt_keeps_the_ends_below_the_largest_gap_and_shares_blocks(means, kept, block, borrowers):
    similarity = similarity_with_means(means)
    assert kept_layers(similarity) == kept
    assert block_borrowers(similarity, block) == borrowers


def test_echoatt_shares_the_most_alike_first():
    assert ranked_borrowers(similarity_with_means([0.9, 0.3, 0.5, 0.4]), [1, 2, 3]) == [2, 3, 1]


@pytest.mark.parametrize("seed", range(10))
@pytest.mark.parametrize("kinds_of_layers", [1, 2])
def test_shortlist_holds_the_cheapest_sets_in_order(seed, kinds_of_layers):
    kinds, costs, saved = random_problem(seed, kinds_of_layers=kinds_of_layers)
    every = every_choice(kinds, costs, saved)
    for to_save in (1, 3, 5):
        found = cheapest_sets(kinds, costs, saved, to_save, count=4)
        assert len({tuple(choice.borrowers) for choice in found}) == len(found)
        assert all(choice.saved >= to_save for choice in found)
        costs_found = [choice.cost for choice in found]
        enough_at_last = [
            one for one in every if one.saved >= to_save > one.saved - saved[max(one.borrowers, default=0)]
        ]
        if kinds_of_layers == 1:
            assert costs_found == sorted(choice.cost for choice in enough_at_last)[:4]
        assert costs_found == sorted(costs_found)
        cheapest = choose(cheapest_choices(kinds, costs, saved), to_save)
        assert costs_found[:1] == ([] if cheapest is None else [cheapest.cost])
