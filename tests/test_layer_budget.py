"""The solver of per-layer budgets against trying everything."""

from itertools import product

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_gqa import Refusal
from hf_gqa.workflow.layer_budget import best_assignment, greedy_assignment


layers = st.lists(
    st.dictionaries(st.sampled_from([1, 2, 4, 8]), st.floats(0, 9), min_size=1, max_size=4), min_size=1, max_size=5
)


def total(damages, heads) -> float:
    return sum(choices[n] for choices, n in zip(damages, heads, strict=True))


def tried(damages, budget: int) -> float:
    """Least damage of all assignments there are."""
    return min(total(damages, heads) for heads in product(*damages) if sum(heads) <= budget)


@settings(deadline=None, max_examples=200)
@given(damages=layers, more=st.integers(0, 20))
def test_no_assignment_is_better(damages, more):
    budget = sum(map(min, damages)) + more
    found = best_assignment(damages, budget)
    assert sum(found) <= budget
    assert total(damages, found) == pytest.approx(tried(damages, budget))
    greedy = greedy_assignment(damages, budget)
    assert sum(greedy) <= budget
    assert total(damages, greedy) >= total(damages, found) - 1e-9


def test_greedy_can_miss_the_best():
    damages = [{4: 0.0, 2: 2.0, 1: 2.1}, {4: 0.0, 2: 1.9, 1: 9.0}]
    assert greedy_assignment(damages, 6) == (1, 4), "0.7 for each head saved, and one more than was asked for"
    assert best_assignment(damages, 6) == (4, 2)


def test_of_equal_damages_the_cheaper_is_taken():
    assert best_assignment([{4: 0.0, 2: 0.0}, {4: 0.0, 1: 0.0}], 8) == (2, 1)


def test_a_budget_that_no_assignment_meets_is_refused():
    for solve in (best_assignment, greedy_assignment):
        with pytest.raises(Refusal) as refused:
            solve([{4: 0.0, 2: 1.0}] * 3, 5)
        assert str(refused.value) == (
            "budget: 5 KV heads in all 3 layers together are fewer than the 6 that they have at least. Allow 6 or more."
        )
