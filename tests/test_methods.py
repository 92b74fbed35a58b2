"""Every conversion method keeps the promise of its kind; a new method is tested by existing."""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_gqa import ConversionPlan, Refusal, methods
from hf_gqa.methods import KINDS, METHODS, MethodContext, method_kind
from hf_gqa.weights.attention_weights import AttentionWeights
from hf_gqa.weights.output_moments import OutputMoments
from hf_gqa.weights.query_fit import AttentionRows

from .random_heads import random_heads, tensors_of


# The baseline that forgets the donor: no promise about what the heads said.
FORGETFUL = {"random_init"}
DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


def of_kind(*kinds: str) -> list[str]:
    return [name for name in METHODS.names() if method_kind(name) in kinds]


def context(num_key_value_heads: int, layer_idx: int = 0, seed: int = 0, **known) -> MethodContext:
    """With four KV heads before."""
    return MethodContext(
        **{"layer_idx": layer_idx, "num_key_value_heads": num_key_value_heads, "seed": seed, "initializer_range": 0.02},
        **{"before": random_heads(seed=7), "text": Content()} | known,
    )


class Content:
    """A text on which heads that do not depend on each other already do what they should."""

    def output_moments(self, heads: AttentionWeights) -> OutputMoments:
        output_EM = heads.output_EHD.flatten(1).double()
        bias_E = output_EM.new_zeros(len(output_EM)) if heads.output_bias_E is None else heads.output_bias_E.double()
        target_EM = torch.cat([output_EM, bias_E[:, None]], dim=1)
        return OutputMoments(mixed_MM=torch.eye(target_EM.shape[1]).double(), target_EM=target_EM, tokens=9)

    def attention_rows(self) -> list[AttentionRows]:
        inputs_BLE = torch.randn(2, 9, 10, generator=torch.Generator().manual_seed(3))
        mask = torch.full((1, 1, 9, 9), -torch.inf).triu(1)
        both = {"donor_BLE": inputs_BLE, "student_BLE": inputs_BLE}
        return [AttentionRows(**both, mask_BHLS=mask, scaling=0.4)]


def layer_output(heads: AttentionWeights, tokens: int = 7) -> torch.Tensor:
    """Causal attention without positions, head by head; deliberately slow."""
    hidden = torch.randn(tokens, heads.query_HDE.shape[2], generator=torch.Generator().manual_seed(9)).double()
    mixed = 0 if heads.output_bias_E is None else heads.output_bias_E.double()
    causal = torch.full((tokens, tokens), -torch.inf, dtype=torch.float64).triu(1)
    members = heads.num_attention_heads // heads.num_key_value_heads

    def project(weight_NDE, bias_ND, head: int) -> torch.Tensor:
        projected = hidden @ weight_NDE[head].double().t()
        return projected if bias_ND is None else projected + bias_ND[head].double()

    for head in range(heads.num_attention_heads):
        query = project(heads.query_HDE, heads.query_bias_HD, head)
        key = project(heads.key_KDE, heads.key_bias_KD, head // members)
        value = project(heads.value_KDE, heads.value_bias_KD, head // members)
        weights = (query @ key.t() / query.shape[1] ** 0.5 + causal).softmax(-1)
        mixed = mixed + weights @ value @ heads.output_EHD[:, head].double().t()
    return mixed


def agreeing(heads: AttentionWeights, groups: int) -> AttentionWeights:
    """The heads of each group all equal to its first."""
    size = heads.num_key_value_heads // groups
    return heads.map_key_value(lambda tensor_K: tensor_K[::size].repeat_interleave(size, dim=0))


@pytest.mark.parametrize("name", METHODS.names())
def test_method_is_a_frozen_value_of_a_known_kind(name):
    method = METHODS.get(name)
    assert method.kind in KINDS
    with pytest.raises(AttributeError):
        method.kind = "other"
    with pytest.raises((AttributeError, TypeError)):
        method.anything = 1


@pytest.mark.parametrize("name", METHODS.names())
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no_bias"])
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))
def test_method_keeps_dtype_biases_and_shapes(name, bias, dtype):
    before, after = {"expand": (2, 4), "repair": (2, 2)}.get(method_kind(name), (4, 2))
    heads = random_heads(K=before, bias=bias, dtype=dtype)
    kept = {field: None if tensor is None else tensor.clone() for field, tensor in tensors_of(heads).items()}
    wanted = before if method_kind(name) == "rearrange" else after
    found = METHODS.get(name)(heads, context(after))
    assert found.num_key_value_heads == wanted
    for field, tensor in tensors_of(found).items():
        if kept[field] is None:
            assert tensor is None, field
            continue
        assert tensor.dtype == dtype, field
        assert torch.isfinite(tensor).all(), field
        counted = field.startswith(("key", "value"))
        assert tensor.shape == (wanted, *kept[field].shape[1:]) if counted else kept[field].shape
        assert torch.equal(getattr(heads, field), kept[field]), f"{field} of the input was changed"


@pytest.mark.parametrize("name", METHODS.names())
def test_method_is_deterministic(name):
    heads = random_heads(K=2 if method_kind(name) in ("expand", "repair") else 4)
    wanted = 4 if method_kind(name) == "expand" else 2
    torch.manual_seed(0)
    one = METHODS.get(name)(heads, context(wanted, layer_idx=3, seed=5))
    state = torch.random.get_rng_state()
    torch.manual_seed(1)
    other = METHODS.get(name)(heads, context(wanted, layer_idx=3, seed=5))
    present = {field: tensor for field, tensor in tensors_of(one).items() if tensor is not None}
    assert all(torch.equal(tensor, getattr(other, field)) for field, tensor in present.items())
    torch.manual_seed(0)
    assert torch.equal(torch.random.get_rng_state(), state), "a method draws from the global generator"


@pytest.mark.parametrize("name", of_kind("rearrange"))
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no_bias"])
@pytest.mark.parametrize("num_key_value_heads", [4, 2, 1])
def test_rearranging_keeps_the_output(name, bias, num_key_value_heads):
    heads = random_heads(K=num_key_value_heads, bias=bias, dtype=torch.float64)
    found = METHODS.get(name)(heads, context(max(1, num_key_value_heads // 2)))
    torch.testing.assert_close(layer_output(found), layer_output(heads))


@pytest.mark.parametrize("name", sorted(set(of_kind("reduce")) - FORGETFUL))
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no_bias"])
@pytest.mark.parametrize("before, after", [(4, 2), (4, 1), (2, 1), (6, 2)])
def test_reducing_heads_that_agree_keeps_the_output(name, bias, before, after):
    H = 2 * before
    heads = agreeing(random_heads(H=H, K=before, bias=bias, dtype=torch.float64), after)
    found = METHODS.get(name)(heads, context(after))
    assert found.num_key_value_heads == after
    torch.testing.assert_close(layer_output(found), layer_output(heads))
    assert not torch.allclose(
        layer_output(found), layer_output(random_heads(H=H, K=before, dtype=torch.float64, seed=1))
    )


@pytest.mark.parametrize("name", of_kind("expand"))
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no_bias"])
@pytest.mark.parametrize("before, after", [(2, 4), (1, 4), (1, 2), (2, 6)])
def test_expanding_keeps_the_output(name, bias, before, after):
    heads = random_heads(H=2 * after, K=before, bias=bias, dtype=torch.float64)
    found = METHODS.get(name)(heads, context(after))
    assert found.num_key_value_heads == after
    torch.testing.assert_close(layer_output(found), layer_output(heads))


@pytest.mark.parametrize("expand", of_kind("expand"))
@pytest.mark.parametrize("reduce", sorted(set(of_kind("reduce")) - FORGETFUL))
@settings(deadline=None, max_examples=30)
@given(
    few=st.integers(1, 4),
    times=st.integers(1, 5),
    dtype=st.sampled_from(DTYPES),
    bias=st.booleans(),
    seed=st.integers(0, 99),
)
def test_reducing_what_was_expanded_is_exact(expand, reduce, few, times, dtype, bias, seed):
    heads = random_heads(H=few * times, K=few, D=3, E=4, bias=bias, dtype=dtype, seed=seed)
    expanded = METHODS.get(expand)(heads, context(few * times))
    found = METHODS.get(reduce)(expanded, context(few))
    for field, tensor in tensors_of(heads).items():
        assert tensor is None or torch.equal(getattr(found, field), tensor), field


@pytest.mark.parametrize(
    "name, expected", [("mean_pool", [[0.5, 1.5], [4.5, 5.5]]), ("first", [[0.0, 1.0], [4.0, 5.0]])]
)
def test_groups_are_neighbouring_heads(name, expected):
    """Query head h of the student reads group h // G, so a group is made of neighbours."""
    order = torch.tensor([[0.0, 1.0], [1.0, 2.0], [4.0, 5.0], [5.0, 6.0]])
    heads = replace(
        random_heads(H=4, K=4, D=2, E=3),
        key_KDE=order[:, :, None].expand(-1, -1, 3),
        value_KDE=-order[:, :, None].expand(-1, -1, 3),
        key_bias_KD=order,
        value_bias_KD=-order,
    )
    found = METHODS.get(name)(heads, context(2))
    assert found.key_bias_KD.tolist() == expected
    assert (-found.value_bias_KD).tolist() == expected
    assert found.key_KDE[:, :, 0].tolist() == found.key_KDE[:, :, 2].tolist() == expected
    assert (-found.value_KDE)[:, :, 0].tolist() == expected


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["float16", "bfloat16"])
def test_mean_of_narrow_heads_is_rounded_once(dtype):
    heads = random_heads(H=8, K=8, D=16, E=32, dtype=dtype)
    found = METHODS.get("mean_pool")(heads, context(1))
    exact = heads.key_KDE.double().mean(0, keepdim=True)
    assert torch.equal(found.key_KDE, exact.float().to(dtype))
    large = heads.map_key_value(lambda tensor_K: torch.full_like(tensor_K, 40000.0))
    assert torch.equal(METHODS.get("mean_pool")(large, context(1)).key_KDE, large.key_KDE[:1]), "a sum overflowed"


def test_mean_of_wide_heads_is_not_narrowed():
    heads = random_heads(K=4, dtype=torch.float64)
    found = METHODS.get("mean_pool")(heads, context(1))
    torch.testing.assert_close(found.value_KDE, heads.value_KDE.mean(0, keepdim=True), rtol=1e-14, atol=1e-14)


def test_random_init_depends_on_seed_and_layer_alone():
    draw: Callable = METHODS.get("random_init")
    one = draw(random_heads(seed=0), context(2, layer_idx=1, seed=4))
    same = draw(random_heads(seed=8), context(2, layer_idx=1, seed=4))
    assert torch.equal(one.key_KDE, same.key_KDE)
    assert torch.equal(one.value_KDE, same.value_KDE)
    assert not torch.equal(one.key_KDE, one.value_KDE)
    for other in (context(2, layer_idx=1, seed=5), context(2, layer_idx=2, seed=4), context(2, layer_idx=4, seed=1)):
        assert not torch.equal(draw(random_heads(), other).key_KDE, one.key_KDE)


def test_random_init_draws_as_the_initialisation_would():
    heads = random_heads(H=8, K=8, D=32, E=64)
    found = METHODS.get("random_init")(heads, context(4))
    for tensor in (found.key_KDE, found.value_KDE):
        assert tensor.std().item() == pytest.approx(0.02, rel=0.05)
        assert abs(tensor.mean().item()) < 0.001
    assert not found.key_bias_KD.any()
    assert not found.value_bias_KD.any()
    assert torch.equal(found.query_HDE, heads.query_HDE)
    assert torch.equal(found.output_EHD, heads.output_EHD)


def test_unknown_method_is_refused_with_a_guess():
    with pytest.raises(Refusal) as refused:
        METHODS.get("meanpool")
    known = ", ".join(METHODS.names())
    assert str(refused.value) == f"conversion method 'meanpool' is unknown. Did you mean 'mean_pool'? Known: {known}."


def test_method_of_an_unknown_kind_is_the_authors_error(monkeypatch):
    monkeypatch.setattr(methods.first.METHOD.__class__, "kind", "merge")
    with pytest.raises(TypeError) as refused:
        method_kind("first")
    assert str(refused.value) == (
        "conversion method 'first': kind = 'merge'. Use one of rearrange, reduce, expand, repair."
    )


def test_method_file_without_a_method_is_the_authors_error(monkeypatch):
    monkeypatch.delattr(methods.first, "METHOD")
    with pytest.raises(TypeError, match=r"first\.py: a conversion method file must define `METHOD`\."):
        METHODS.get("first")


@pytest.mark.parametrize("method", ["mean_pool,first", ("mean_pool", "expand"), ()])
def test_plan_takes_exactly_one_method_that_changes_the_head_count(method):
    with pytest.raises(Refusal, match=r"these change the number of KV heads\. Use exactly one of "):
        ConversionPlan(num_key_value_heads=2, method=method)
