"""Windows that predict each token once, scores against a slow reference, and intervals that cover."""

import json
import math
from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from hf_gqa import convert
from hf_gqa.evaluate.inputs.windows import Window, batches, token_ids, windows_of
from hf_gqa.evaluate.quality.bootstrap import FEWEST_GROUPS, Bootstrap, expanded_tail, student_t_quantile
from hf_gqa.evaluate.quality.by_length import by_context
from hf_gqa.evaluate.quality.token_scores import score
from hf_gqa.refusal import Refusal

from .tiny_donors import tiny_donor


FAST = settings(max_examples=150, deadline=None)


@FAST
@given(
    length=st.integers(0, 70),
    prefix=st.sampled_from([None, -1]),
    context=st.integers(1, 20),
    stride=st.integers(1, 20),
)
def test_every_token_is_predicted_once_with_all_the_context_that_fits(length, prefix, context, stride):
    stride, tokens = min(stride, context), list(range(length))
    whole = tokens if prefix is None else [prefix, *tokens]
    predicted = Counter()
    windows = list(windows_of(tokens, prefix, context, stride))
    for window in windows:
        assert len(window.tokens) <= context + 1 and 0 < window.scored <= len(window.tokens) - 1
        for token, before in zip(window.tokens[-window.scored :], window.contexts, strict=True):
            place = whole.index(token)
            predicted[token] += 1
            assert window.tokens[: len(window.tokens) - window.scored] == tuple(
                whole[place - before : place - before + len(window.tokens) - window.scored]
            )
            assert before >= min(place, context - stride + 1)
    assert predicted == Counter(whole[1:])


@FAST
@given(length=st.integers(1, 70), context=st.integers(1, 20))
def test_windows_are_those_of_lm_eval(length, context):
    utils = pytest.importorskip("lm_eval.utils", reason="the extra hf_gqa[eval] is not installed")
    tokens = list(range(length))
    theirs = utils.get_rolling_token_windows(tokens, -1, context, 1)
    ours = [(list(w.tokens[:-1]), list(w.tokens[-w.scored :])) for w in windows_of(tokens, -1, context, context)]
    assert ours == [(list(read), list(predicted)) for read, predicted in theirs]


@given(lengths=st.lists(st.integers(2, 9), max_size=40), size=st.integers(1, 5), at_once=st.integers(1, 12))
def test_batches_hold_every_window_once(lengths, size, at_once):
    windows = [Window(tokens=tuple(range(length)), scored=1) for length in lengths]
    found = [pair for batch in batches(windows, size, at_once) for pair in batch]
    assert sorted(found, key=lambda pair: pair[0]) == list(enumerate(windows))
    assert all(len(batch) <= size for batch in batches(windows, size, at_once))


@pytest.fixture(scope="module")
def models():
    donor = tiny_donor("llama")
    return donor, convert(donor, num_key_value_heads=1)


@pytest.fixture(scope="module")
def windows() -> list[Window]:
    """Of three documents, two of them shorter than a window."""
    draw = torch.Generator().manual_seed(0)
    documents = [torch.randint(3, 99, (length,), generator=draw).tolist() for length in (150, 7, 1)]
    return [window for tokens in documents for window in windows_of(tokens, 1, 24, 10)]


@torch.no_grad()
def slow_scores(donor, student, windows):
    """One window at a time, without padding, one token at a time, in float64."""
    rows = []
    for number, window in enumerate(windows):
        read = torch.tensor([window.tokens[:-1]])
        theirs, ours = (model(read, use_cache=False).logits[0].double().log_softmax(-1) for model in (donor, student))
        for position in range(len(window.tokens) - 1 - window.scored, len(window.tokens) - 1):
            token, p, q = window.tokens[position + 1], theirs[position], ours[position]
            kl = sum(float(a.exp() * (a - b)) for a, b in zip(p, q, strict=True))
            agrees = float(p.argmax() == q.argmax())
            rows.append((number, position + 1, -float(p[token]), -float(q[token]), kl, agrees))
    return np.array(sorted(rows))


@pytest.mark.parametrize("batch_size", [1, 3, 64])
def test_scores_equal_the_slow_ones(models, windows, batch_size, monkeypatch):
    monkeypatch.setattr("hf_gqa.evaluate.quality.token_scores.ELEMENTS_AT_ONCE", 99 * 7)  # parts of seven tokens
    found = score(*models, windows, batch_size)
    columns = (found.window_N, found.context_N, found.donor_loss_N, found.student_loss_N, found.kl_N, found.agrees_N)
    rows = np.stack(columns, axis=1)
    rows = rows[np.lexsort((rows[:, 1], rows[:, 0]))]
    wanted = slow_scores(*models, windows)
    assert len(found) == 158 and rows.shape == wanted.shape
    assert np.array_equal(rows[:, :2], wanted[:, :2]) and np.array_equal(rows[:, 5], wanted[:, 5])
    np.testing.assert_allclose(rows[:, 2:5], wanted[:, 2:5], rtol=1e-5, atol=2e-6)


def test_a_model_does_not_differ_from_itself(models, windows):
    found = score(models[0], models[0], windows, 3)
    assert (found.kl_N == 0).all() and (found.agrees_N == 1).all()
    assert np.array_equal(found.donor_loss_N, found.student_loss_N)


def test_progress_is_told_of_every_token(models, windows):
    told = []
    found = score(*models, windows, 3, told.append)
    assert sum(told) == len(found) and len(told) > 3


@pytest.mark.parametrize("value", [math.nan, math.inf, 1e6])
def test_a_broken_student_is_refused(windows, value):
    donor, broken = tiny_donor("llama"), tiny_donor("llama")
    with torch.no_grad():
        broken.lm_head.weight[5] = value
    with pytest.raises(
        Refusal, match=r"student: its loss is NaN, Inf or beyond 700 nats on [\d,]+ of 158 tokens\. Check it"
    ):
        score(donor, broken, windows, 4)


def test_losses_by_context_add_up(models, windows):
    scores = score(*models, windows, 4)
    rows = by_context(scores, 24, Bootstrap())
    assert [(row.first_context_tokens, row.last_context_tokens) for row in rows] == [(1, 24)]
    longer = [window for tokens in (list(range(3, 90)) * 4,) for window in windows_of(tokens, 1, 60, 60)]
    scores = score(*models, longer, 4)
    rows = by_context(scores, 60, Bootstrap())
    assert [(row.first_context_tokens, row.last_context_tokens) for row in rows] == [(1, 32), (33, 60)]
    assert sum(row.tokens for row in rows) == len(scores)
    for name in ("donor_loss", "student_loss", "kl"):
        mean = sum(getattr(row, f"{name}_nats_per_token") * row.tokens for row in rows) / len(scores)
        assert mean == pytest.approx(getattr(scores, f"{name}_N").mean(), rel=1e-12)


def coverage(groups: int, bootstrap: Bootstrap, trials: int = 400) -> float:
    """How often the interval holds the truth, for the loss difference of windows that differ in length and difficulty."""
    draw, truth, held = np.random.default_rng(groups), 0.3, 0
    for _ in range(trials):
        counts = draw.integers(20, 60, groups)
        hard = draw.gamma(2.0, 0.5, groups) - 1.0  # skewed, shared by all tokens of a window
        found = bootstrap.interval(counts * (truth + hard) + np.sqrt(counts) * draw.normal(size=groups), counts)
        held += found.low <= truth <= found.high
    return held / trials


@pytest.mark.parametrize("groups", [12, 40, 150])
def test_the_interval_holds_the_truth_as_often_as_it_says(groups):
    """400 trials: 95% +- 1.1%, one standard error; skewed windows cost few-window intervals another per cent or two."""
    assert 0.915 <= coverage(groups, Bootstrap(resamples=600)) <= 0.98


def test_a_wrong_interval_would_be_noticed(monkeypatch):
    assert coverage(40, Bootstrap(resamples=600, confidence_fraction=0.8)) < 0.86
    monkeypatch.setattr("hf_gqa.evaluate.quality.bootstrap.expanded_tail", lambda tail, groups: tail)
    assert coverage(12, Bootstrap(resamples=600)) < 0.915


def test_intervals_are_the_same_twice_and_in_parts(monkeypatch):
    draw = np.random.default_rng(0)
    sums, counts = draw.normal(size=30), np.full(30, 2.0)
    found = Bootstrap().interval(sums, counts)
    assert found == Bootstrap().interval(sums, counts) != Bootstrap(seed=1).interval(sums, counts)
    assert found.low < found.value < found.high and found.value == pytest.approx(sums.sum() / 60)
    monkeypatch.setattr("hf_gqa.evaluate.quality.bootstrap.DRAWN_AT_ONCE", 1000)
    assert found == Bootstrap().interval(sums, counts)
    ratio = Bootstrap().interval(sums, counts, np.exp)
    assert (ratio.value, ratio.low, ratio.high) == tuple(map(math.exp, (found.value, found.low, found.high)))


def test_no_difference_has_an_interval_of_nothing_and_few_groups_have_none():
    found = Bootstrap().interval(np.zeros(20), np.ones(20))
    assert (found.value, found.low, found.high) == (0, 0, 0)
    assert Bootstrap().interval(np.arange(FEWEST_GROUPS - 1), np.ones(FEWEST_GROUPS - 1)) is None


@pytest.mark.parametrize(("degrees", "quantile"), [(7, 2.3646), (11, 2.2010), (30, 2.0423), (1000, 1.9623)])
def test_student_t(degrees, quantile):
    assert student_t_quantile(0.975, degrees) == pytest.approx(quantile, abs=1e-3)
    assert expanded_tail(0.025, degrees + 1) < 0.025


def test_tokens_are_those_of_the_text_alone():
    tokenizer = AutoTokenizer.from_pretrained("examples/donor")
    assert tokenizer.decode(token_ids(tokenizer, "Once upon a time")) == "Once upon a time"
    assert json.dumps(token_ids(tokenizer, "Once"))  # plain numbers
