"""grouped_sdpa against repeated keys and values with an explicit softmax: outputs, gradients, and what is allocated.

Shapes: B batch, Q/S query/key length, H query heads, K KV heads, G = H/K, D head_dim.
"""

from dataclasses import dataclass
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.generation.continuous_batching.cache import PagedAttentionCache

from hf_gqa.runtime.grouped_attention import MOST_PACKED_TOKENS, grouped_sdpa, member_by_member

from .allocations import Allocations, expanded


DECODER = SimpleNamespace(is_causal=True)
ENCODER = SimpleNamespace(is_causal=False)
TOLERANCE = {torch.float64: 1e-10, torch.float32: 2e-5, torch.bfloat16: 4e-2, torch.float16: 6e-3}
MASKS = ("none", "bool", "float", "bool per head", "float per head", "window", "keys only")


def reference(query, key, value, mask=None, scaling=None, bias=None, softcap=None, sinks=None, causal=False):
    """The slow way, in float64: `[B, Q, H, D]`."""
    query, key, value = query.double(), key.double(), value.double()
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
    scores = query @ key.transpose(2, 3) * (query.shape[3] ** -0.5 if scaling is None else scaling)
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    if bias is not None:
        scores = scores + bias.double()
    if causal:
        mask = torch.ones(query.shape[2], key.shape[2], dtype=torch.bool).tril()
    if mask is not None and mask.dtype == torch.bool:
        scores = scores.masked_fill(~mask, float("-inf"))
    elif mask is not None:
        scores = scores + mask.double()
    if sinks is not None:
        scores = torch.cat([scores, sinks.double().view(1, -1, 1, 1).expand(*scores.shape[:3], 1)], dim=-1)
    weights = scores.softmax(dim=-1)[..., : key.shape[2]]
    return (weights @ value).transpose(1, 2)


@dataclass
class Case:
    """Random inputs for one call."""

    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    mask: torch.Tensor | None
    causal: bool

    @property
    def states(self):
        return self.query, self.key, self.value


def draw_mask(kind: str, batch: int, heads: int, tokens: int, keys: int, dtype) -> torch.Tensor | None:
    """The last `tokens` of `keys` are asking; every one of them may look at its own key at least."""
    if kind == "none":
        return None
    own = torch.arange(keys - tokens, keys)
    distance = own[:, None] - torch.arange(keys)[None]  # [Q, S]
    allowed = (distance >= 0).expand(batch, heads if "per head" in kind else 1, tokens, keys).clone()
    if kind == "window":
        return allowed & (distance < 4)
    if kind == "keys only":
        return torch.rand(batch, 1, 1, keys).lt(0.7) | (torch.arange(keys) >= keys - tokens)
    allowed &= torch.rand(allowed.shape).lt(0.7) | (distance == 0)
    if kind.startswith("bool"):
        return allowed
    return torch.randn(allowed.shape, dtype=dtype).masked_fill(~allowed, torch.finfo(dtype).min)


def make(batch=2, kv_heads=2, groups=3, tokens=1, keys=9, head_dim=8, kind="none", dtype=torch.float32, seed=0) -> Case:
    torch.manual_seed(seed)
    heads = kv_heads * groups
    query = torch.randn(batch, tokens, heads, head_dim, dtype=dtype).transpose(1, 2)  # as projections give it
    key, value = (torch.randn(batch, kv_heads, keys, head_dim, dtype=dtype) for _ in "kv")
    causal = kind == "none" and tokens > 1 and tokens == keys
    return Case(query, key, value, draw_mask(kind, batch, heads, tokens, keys, dtype), causal)


def assert_like_reference(found: torch.Tensor, expected: torch.Tensor, dtype) -> None:
    assert found.dtype == dtype and found.is_contiguous()
    torch.testing.assert_close(found.double(), expected, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])


@st.composite
def cases(draw, dtype=None):
    kind = draw(st.sampled_from(MASKS))
    keys = draw(st.integers(1, 40))
    tokens = draw(
        st.sampled_from([1, keys, min(keys, 4), min(keys, MOST_PACKED_TOKENS), min(keys, MOST_PACKED_TOKENS + 1)])
    )
    if kind == "none" and tokens != keys:
        tokens = 1
    return make(
        batch=draw(st.integers(1, 3)),
        kv_heads=draw(st.sampled_from([1, 2, 3])),
        groups=draw(st.sampled_from([1, 2, 4, 5])),
        tokens=tokens,
        keys=keys,
        head_dim=draw(st.sampled_from([1, 8, 20])),
        kind=kind,
        dtype=dtype or draw(st.sampled_from(list(TOLERANCE))),
        seed=draw(st.integers(0, 2**16)),
    )


@settings(max_examples=200, deadline=None)
@given(cases())
def test_equals_repeating_keys_and_values(case):
    found, weights = grouped_sdpa(DECODER, *case.states, case.mask)
    assert weights is None
    assert_like_reference(found, reference(*case.states, case.mask, causal=case.causal), case.query.dtype)


@settings(max_examples=60, deadline=None)
@given(cases(torch.float32))
def test_way_of_devices_whose_kernels_take_no_groups(case):
    found = member_by_member(*case.states, case.mask, is_causal=case.causal)
    expected = reference(*case.states, case.mask, causal=case.causal)
    torch.testing.assert_close(found.transpose(1, 2).double(), expected, rtol=0, atol=2e-5)


@settings(max_examples=100, deadline=None)
@given(cases(), st.floats(0.1, 2.0), st.booleans(), st.booleans())
def test_softcap_sinks_and_scaling(case, scaling, capped, with_sinks):
    softcap = 5.0 if capped else None
    sinks = torch.randn(case.query.shape[1], dtype=case.query.dtype) if with_sinks else None
    found, _ = grouped_sdpa(DECODER, *case.states, case.mask, scaling=scaling, softcap=softcap, s_aux=sinks)
    expected = reference(*case.states, case.mask, scaling, softcap=softcap, sinks=sinks, causal=case.causal)
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=3 * TOLERANCE[case.query.dtype])


@settings(max_examples=60, deadline=None)
@given(cases(torch.float32), st.booleans())
def test_position_bias_is_added(case, learned):
    bias = torch.randn(1, case.query.shape[1], case.query.shape[2], case.key.shape[2], requires_grad=learned)
    found, _ = grouped_sdpa(DECODER, *case.states, case.mask, position_bias=bias)
    expected = reference(*case.states, case.mask, bias=bias, causal=case.causal)
    assert_like_reference(found, expected, torch.float32)
    if learned:
        ours, slow = (torch.autograd.grad(mixed.double().square().sum(), bias)[0] for mixed in (found, expected))
        torch.testing.assert_close(ours, slow, rtol=1e-4, atol=1e-4)


@settings(max_examples=100, deadline=None)
@given(cases(torch.float32), st.sampled_from([{}, {"softcap": 4.0}, {"sinks": True}]))
def test_gradients_equal_those_of_the_reference(case, options):
    wanted = [state.requires_grad_() for state in case.states]
    if "sinks" in options:
        options = {"sinks": torch.randn(case.query.shape[1], requires_grad=True)}
        wanted.append(options["sinks"])
    renamed = {"s_aux" if name == "sinks" else name: option for name, option in options.items()}
    found, _ = grouped_sdpa(DECODER, *case.states, case.mask, **renamed)
    expected = reference(*case.states, case.mask, causal=case.causal, **options)
    upward = torch.randn_like(found)
    ours = torch.autograd.grad(found, wanted, upward)
    slow = torch.autograd.grad(expected, wanted, upward.double())
    for one, other in zip(ours, slow, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("tokens", [2, 20])
def test_without_a_mask_encoders_look_both_ways(tokens):
    case = make(tokens=tokens, keys=tokens)
    for module, options in ((ENCODER, {}), (DECODER, {"is_causal": False}), (SimpleNamespace(is_causal=False), {})):
        found, _ = grouped_sdpa(module, *case.states, None, **options)
        assert_like_reference(found, reference(*case.states), torch.float32)
    found, _ = grouped_sdpa(ENCODER, *case.states, None, is_causal=True)
    assert_like_reference(found, reference(*case.states, causal=True), torch.float32)
    crossing, _ = grouped_sdpa(ENCODER, case.query[:, :, :-1], case.key, case.value, None)
    assert_like_reference(crossing, reference(case.query[:, :, :-1], case.key, case.value), torch.float32)


@pytest.mark.parametrize("with_bias", [False, True])
def test_prefill_of_an_empty_static_cache_stops_at_its_own_tokens(with_bias):
    """What the cache will hold later, here NaN, is not even read."""
    case = make(tokens=12, keys=12)
    bias = torch.randn(1, 6, 12, 30) if with_bias else None
    padded = [torch.cat([state, torch.full_like(state, torch.nan)], dim=2) for state in (case.key, case.value)]
    found, _ = grouped_sdpa(DECODER, case.query, *padded, None, position_bias=bias)
    bias = None if bias is None else bias[..., :12]
    assert_like_reference(found, reference(*case.states, bias=bias, causal=True), torch.float32)


@pytest.mark.parametrize("tokens", [1, 4, 20])
@pytest.mark.parametrize("softcap", [None, 30.0])
@pytest.mark.parametrize("lowest", [None, float("-inf"), torch.finfo(torch.float32).min])
def test_token_that_may_look_at_nothing_is_finite_and_spoils_no_other(tokens, softcap, lowest):
    case = make(tokens=tokens, keys=20, kind="bool")
    mask, expected = case.mask.clone(), reference(*case.states, case.mask, softcap=softcap)
    mask[0, :, 0] = False
    if lowest is not None:
        mask = torch.zeros(mask.shape).masked_fill(~mask, lowest)
    found, _ = grouped_sdpa(DECODER, *case.states, mask, softcap=softcap)
    assert found.isfinite().all()
    torch.testing.assert_close(found[1:].double(), expected[1:], rtol=0, atol=1e-5)
    torch.testing.assert_close(found[:, 1:].double(), expected[:, 1:], rtol=0, atol=1e-5)


@pytest.mark.parametrize("groups", [1, 4])
def test_dropout_scales_what_it_keeps(groups):
    """Values of 1 come out as the kept weights' sum: 1 on average, and not the same in each row."""
    case = make(batch=4, groups=groups, tokens=64, keys=64, head_dim=4)
    value = torch.ones_like(case.value).requires_grad_()
    found, _ = grouped_sdpa(DECODER, case.query, case.key, value, None, dropout=0.5)
    late = found[:, 16:]
    assert abs(late.mean().item() - 1) < 0.05 and late.std() > 0.1
    found.sum().backward()
    assert value.grad.isfinite().all()


PATHS = {
    "prefill": {"tokens": 48, "keys": 48},
    "padded prefill": {"tokens": 48, "keys": 48, "kind": "bool"},
    "prefill with a float mask": {"tokens": 48, "keys": 48, "kind": "float"},
    "chunk on a filled cache": {"tokens": 24, "keys": 64, "kind": "bool"},
    "several tokens": {"tokens": 4, "keys": 64, "kind": "bool"},
    "one token": {"tokens": 1, "keys": 64},
    "one token in a static cache": {"tokens": 1, "keys": 64, "kind": "bool"},
    "one token in a window": {"tokens": 1, "keys": 64, "kind": "window"},
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("options", [{}, {"softcap": 4.0}, {"dropout": 0.1}], ids=["plain", "softcap", "dropout"])
@pytest.mark.parametrize("path", PATHS)
def test_keys_and_values_are_never_expanded(path, options, training, dtype):
    """D is larger than Q, so that scores and masks stay below the size that is looked for."""
    case = make(kv_heads=2, groups=4, head_dim=80, dtype=dtype, **PATHS[path])
    for state in case.states:
        state.requires_grad_(training)
    with Allocations() as allocations:
        found, _ = grouped_sdpa(DECODER, *case.states, case.mask, **options)
        if training:
            found.sum().backward()
    keys = case.key.shape[2]
    as_large_themselves = case.query.shape[2] == keys  # queries, output and their gradients
    assert allocations.seen and expanded(allocations.seen, 2, 8, keys, 81 if as_large_themselves else 80) == []


@pytest.mark.parametrize("path", ["prefill", "padded prefill", "prefill with a float mask"])
@pytest.mark.parametrize("softcap", [None, 4.0])
def test_prefill_makes_nothing_of_full_size_but_its_output(path, softcap):
    case = make(kv_heads=2, groups=4, head_dim=80, **PATHS[path])
    with Allocations() as allocations:
        grouped_sdpa(DECODER, *case.states, case.mask, softcap=softcap)
    large = [shape for _, shape in expanded(allocations.seen, 2, 8, 48, 80)]
    in_the_open = [(2, 2, 192, 80)] * 2 + [(4, 192, 80)]  # rows packed and scaled, their product with the values
    assert len(large) <= (2 if softcap is None else 5), large
    assert all(shape in [(2, 8, 48, 80), (2, 48, 8, 80), *in_the_open] for shape in large)


def test_expansion_would_be_noticed():
    case = make(kv_heads=2, groups=4, head_dim=80, tokens=24, keys=64, kind="bool")
    with Allocations() as allocations:
        reference(*case.states, case.mask)
    assert expanded(allocations.seen, 2, 8, 64, 80)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (
            {"mask": torch.ones(2, 1, 4, 8, dtype=torch.bool)},
            r"attention_mask has the shape \(2, 1, 4, 8\), which does",
        ),
        (
            {"mask": torch.ones(4, 9, dtype=torch.bool)},
            r"shape \(4, 9\).*\[batch, query heads, query length, key length\]",
        ),
        ({"mask": torch.ones(2, 2, 4, 9)}, r"\(2, 2, 4, 9\), which does not broadcast to .* = \(2, 6, 4, 9\)\. Give"),
        ({"mask": torch.ones(2, 1, 4, 9).long()}, r"attention_mask is torch.int64; allowed are torch.bool"),
        ({"position_bias": torch.ones(1, 6, 4, 4)}, r"position_bias has the shape"),
        ({"key": torch.ones(2, 4, 9, 8)}, r"query \(2, 6, 4, 8\), key \(2, 4, 9, 8\) and value .* do not fit"),
        ({"value": torch.ones(2, 2, 8, 8)}, r"do not fit\. Keys and values need the same heads and length"),
        (
            {"cache": object.__new__(PagedAttentionCache)},
            r"paged cache of continuous batching\. Use attn_implementation='sdpa'",
        ),
    ],
)
def test_what_does_not_fit_is_refused(wrong, message):
    case = make(tokens=4, keys=9, kind="bool")
    arguments = {"key": case.key, "value": case.value, "mask": case.mask} | wrong
    states = case.query, arguments.pop("key"), arguments.pop("value"), arguments.pop("mask")
    with pytest.raises(ValueError, match=f"^grouped_sdpa: .*{message}"):
        grouped_sdpa(DECODER, *states, **arguments)


def test_float_mask_of_another_dtype_is_taken_as_that_of_the_query():
    case = make(tokens=4, keys=9, kind="float", dtype=torch.bfloat16)
    found, _ = grouped_sdpa(DECODER, *case.states, case.mask.float())
    assert_like_reference(found, reference(*case.states, case.mask), torch.bfloat16)
