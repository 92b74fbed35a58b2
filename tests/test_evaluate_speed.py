"""Timing two models by turns: what is run, in which order, and what is made of the seconds. No real clock."""

import re
import time

import pytest
import torch
from torch import nn
from transformers import StaticCache

from hf_gqa import Refusal, convert
from hf_gqa.evaluate.cost import speed
from hf_gqa.evaluate.cost.speed import Timing, allowed_decode_speedup, decode_step_bytes, measure_speed, read_and_decode
from hf_gqa.runtime.native_call import with_cache

from .tiny_donors import SOME_MODEL_TYPES, VOCAB_SIZE, tiny_donor, tokens_and_mask


MODELS = {
    "donor": lambda donor: donor,
    "bundle": lambda donor: convert(donor, num_key_value_heads=2, export="bundle"),
    "one head": lambda donor: convert(donor, num_key_value_heads=1),
}
every_model = pytest.mark.parametrize("which", MODELS)
some_families = pytest.mark.parametrize("model_type", SOME_MODEL_TYPES)


@pytest.fixture(scope="module")
def pair():
    donor = tiny_donor("llama", tie_word_embeddings=False)
    return donor, convert(donor, num_key_value_heads=1)


class Clock:
    """Stands still but for what models take: `read` seconds for a prompt, `step` seconds for a token."""

    def __init__(self):
        self.now = 0.0

    def charge(self, model, read: float, steps: list[float]):
        """The steps of prompt number n take `steps[n]` each."""
        prompts = -1

        def taken(module, arguments):
            nonlocal prompts
            is_prompt = arguments[0].shape[1] > 1
            prompts += is_prompt
            self.now += read if is_prompt else steps[prompts]

        return model.register_forward_pre_hook(taken)


@some_families
@every_model
def test_what_is_timed_is_greedy_decoding(model_type, which):
    model = MODELS[which](tiny_donor(model_type, tie_word_embeddings=False))
    model.generation_config.eos_token_id = None
    if hasattr(model.base_model, "ln_f"):
        nn.init.zeros_(model.base_model.ln_f.bias)  # it drowns what the tokens say: all answers would be one
    tokens, _ = tokens_and_mask(batch=3)
    expected = model.generate(
        tokens, attention_mask=torch.ones_like(tokens), max_new_tokens=9, do_sample=False, pad_token_id=0
    )
    answer, _ = read_and_decode(model, tokens, 8)
    assert torch.equal(torch.cat([tokens, answer], dim=1), expected)
    assert len(set(answer.flatten().tolist())) > 2


def test_seconds_of_reading_and_of_decoding(monkeypatch, pair):
    clock = Clock()
    monkeypatch.setattr(time, "perf_counter", lambda: clock.now)
    hook = clock.charge(pair[0], read=100, steps=[3])
    _, timing = read_and_decode(pair[0], tokens_and_mask()[0], 5)
    hook.remove()
    assert timing == Timing(first_token_seconds=100, decode_seconds=15)


def test_points_from_seconds(monkeypatch, pair):
    """Ratios are of pairs, and the median is theirs; the first pair only warms up."""
    clock = Clock()
    monkeypatch.setattr(time, "perf_counter", lambda: clock.now)
    hooks = [
        clock.charge(pair[0], read=60, steps=[999, 8, 8, 8, 30, 8]),
        clock.charge(pair[1], read=20, steps=[1, 4, 2, 1, 10, 16]),
    ]
    points, notes = measure_speed(*pair, batch_sizes=[3], context_lengths=[10], decode_tokens=4)
    for hook in hooks:
        hook.remove()
    (point,) = points
    assert notes == () and (point.batch_size, point.context_tokens, point.repetitions) == (3, 10, 5)
    assert (point.donor_first_token_seconds, point.student_first_token_seconds) == (60, 20)
    assert point.first_token_speedup == 3
    assert point.donor_decode_tokens_per_second == 3 / 8 and point.student_decode_tokens_per_second == 3 / 4
    assert (point.decode_speedup_low, point.decode_speedup, point.decode_speedup_high) == (0.5, 3, 8)
    assert point.allowed_decode_speedup == allowed_decode_speedup(*pair, 3, 10, 4)


def recorded(monkeypatch, pair, **settings) -> list[tuple[int, torch.Tensor]]:
    """(which model, prompts) of every run of a measurement."""
    runs = []

    def run(model, tokens, decode_tokens):
        runs.append((pair.index(model), tokens))
        return tokens, Timing(first_token_seconds=1, decode_seconds=1)

    monkeypatch.setattr(speed, "read_and_decode", run)
    measure_speed(*pair, **settings)
    return runs


def test_models_take_turns_on_the_same_prompts(monkeypatch, pair):
    settings = {"batch_sizes": [1, 2], "context_lengths": [7], "repetitions": 9}
    runs = recorded(monkeypatch, pair, **settings)
    assert len(runs) == 2 * 2 * (1 + 9)
    pairs = list(zip(runs[::2], runs[1::2], strict=True))
    for first, second in pairs:
        assert {first[0], second[0]} == {0, 1} and torch.equal(first[1], second[1])
    orders = [first for (first, _), _ in pairs]
    assert set(orders[:10]) == set(orders[10:]) == {0, 1} and orders[:10] != orders[10:]
    assert [tuple(tokens.shape) for _, tokens in runs] == [(1, 7)] * 20 + [(2, 7)] * 20
    assert not torch.equal(runs[0][1], runs[2][1]) and all((tokens < VOCAB_SIZE).all() for _, tokens in runs)
    again = recorded(monkeypatch, pair, **settings)
    assert all(a == b and torch.equal(c, d) for (a, c), (b, d) in zip(runs, again, strict=True))
    other = recorded(monkeypatch, pair, **settings, seed=1)
    assert not torch.equal(runs[0][1], other[0][1])


def counted_step_bytes(model, batch_size: int, context_tokens: int) -> int:
    """By watching one step: what each module that runs holds, rows of what is looked up, and the cache it fills."""
    full, rows = {}, {}

    def watch(module, arguments, output):
        for parameter in module.parameters(recurse=False):
            if isinstance(module, nn.Embedding):
                rows[id(parameter)] = batch_size * output.shape[-1] * output.element_size()
            else:
                full[id(parameter)] = parameter.nbytes

    cache = StaticCache(config=model.config, max_cache_len=context_tokens)
    tokens = torch.zeros(batch_size, context_tokens, dtype=torch.long)
    with torch.no_grad():
        model(tokens[:, 1:], **with_cache(model, cache))
        hooks = [module.register_forward_hook(watch) for module in model.modules()]
        model(tokens[:, :1], **with_cache(model, cache))
    for hook in hooks:
        hook.remove()
    in_cache = sum(tensor.nbytes for layer in cache.layers for tensor in (layer.keys, layer.values))
    return sum((rows | full).values()) + in_cache


@some_families
@every_model
@pytest.mark.parametrize("tied", [True, False])
def test_bytes_of_a_step(model_type, which, tied):
    model = MODELS[which](tiny_donor(model_type, tie_word_embeddings=tied)).bfloat16()
    for batch_size, context_tokens in ((1, 4), (3, 20)):
        assert decode_step_bytes(model, batch_size, context_tokens) == counted_step_bytes(
            model, batch_size, context_tokens
        )


def test_allowed_speedup_by_hand(pair):
    hidden, inner, layers, head_dim = 32, 48, 2, 8
    both = layers * (2 * hidden * hidden + 3 * hidden * inner + 2 * hidden) + hidden + VOCAB_SIZE * hidden

    def step(heads: int, attended: int) -> int:
        rows, kept = 5 * hidden, 5 * attended * 2 * layers * heads * head_dim
        return both + layers * 2 * heads * head_dim * hidden + rows + kept

    expected = (step(4, 11) + step(4, 12)) / (step(1, 11) + step(1, 12))
    assert allowed_decode_speedup(*pair, 5, 10, 2) == expected
    assert allowed_decode_speedup(pair[0], pair[0], 5, 10, 2) == 1
    assert allowed_decode_speedup(*pair, 5, 60, 2) > expected > allowed_decode_speedup(*pair, 1, 1, 1) > 1


def raise_error(error: Exception):
    raise error


@pytest.mark.parametrize(
    "fail", [lambda: torch.empty(1 << 60), lambda: raise_error(torch.OutOfMemoryError("CUDA out of memory."))]
)
def test_points_without_memory_are_left_out(monkeypatch, pair, fail):
    def run(model, tokens, decode_tokens):
        if tokens.shape[0] == 64:
            fail()
        return tokens, Timing(first_token_seconds=1, decode_seconds=1)

    monkeypatch.setattr(speed, "read_and_decode", run)
    seen = []
    points, notes = measure_speed(*pair, batch_sizes=[64, 1], context_lengths=[7, 9], progress=seen.append)
    assert [(point.batch_size, point.context_tokens) for point in points] == [(1, 7), (1, 9)]
    assert notes == tuple(f"Speed at batch 64 x context {n} was not measured: memory ran out." for n in (7, 9))
    assert seen == [f"batch {batch} x context {tokens}" for batch in (64, 1) for tokens in (7, 9)]


def test_other_errors_are_not_swallowed(monkeypatch, pair):
    def run(model, tokens, decode_tokens):
        raise RuntimeError("shapes do not fit")

    monkeypatch.setattr(speed, "read_and_decode", run)
    with pytest.raises(RuntimeError, match="shapes do not fit"):
        measure_speed(*pair, batch_sizes=[1], context_lengths=[7])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"repetitions": 2}, "speed: repetitions = 2 are too few for a median. Use 3 or more."),
        ({"batch_sizes": [1, 0]}, "speed: batch_sizes has 0. Use 1 or more."),
        ({"context_lengths": [-1]}, "speed: context_lengths has -1. Use 1 or more."),
        ({"decode_tokens": 0}, "speed: decode_tokens has 0. Use 1 or more."),
        (
            {"context_lengths": [8, 49]},
            "speed: a context of 49 and 16 decoded tokens are more than the 64 positions of the donor. Use contexts of up to "
            "48 tokens.",
        ),
    ],
)
def test_refusals(pair, changes, message):
    with pytest.raises(Refusal, match=f"^{re.escape(message)}$"):
        measure_speed(*pair, **{"batch_sizes": [1], "context_lengths": [8]} | changes)
