"""The divergence over k + 1 outcomes: beside its slow reference, with gradients, and with nothing large allocated."""

import math
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.functional import kl_div, log_softmax
from torch.utils._python_dispatch import TorchDispatchMode

from hf_gqa.uptrain.top_k_loss import top_k_kl


def example(N=7, V=11, k=3, dtype=torch.float64, seed=0, scale=2.0):
    """Logits of a student, the teacher's top k of all its log-probabilities, and weights with a zero among them."""
    generator = torch.Generator().manual_seed(seed)
    logits_NV = (scale * torch.randn(N, V, generator=generator, dtype=torch.float64)).to(dtype)
    teacher_NV = log_softmax(scale * torch.randn(N, V, generator=generator, dtype=torch.float64), -1)
    log_probs_Nk, token_ids_Nk = teacher_NV.topk(k)
    weights_N = torch.rand(N, generator=generator, dtype=torch.float64)
    weights_N[0] = 0
    return logits_NV.requires_grad_(), token_ids_Nk, log_probs_Nk, weights_N, teacher_NV


def slow_top_k_kl(logits_NV, token_ids_Nk, log_probs_Nk, weights_N):
    """As the docstring has it, with nothing saved, left to autograd."""
    student_NV = log_softmax(logits_NV.double(), -1)
    total = 0
    for student_V, token_ids_k, log_probs_k, weight in zip(
        student_NV, token_ids_Nk, log_probs_Nk, weights_N, strict=True
    ):
        probs_k = log_probs_k.double().exp()
        others = [token for token in range(len(student_V)) if token not in token_ids_k]
        if probs_k.sum() > 1 or not others:
            probs_k = probs_k / probs_k.sum()
        kl = (probs_k * (probs_k.log() - student_V[token_ids_k])).sum()
        rest = 1 - probs_k.sum()
        if others and rest > 0:
            kl = kl + rest * (rest.log() - student_V[others].logsumexp(0))
        total = total + weight.double() * kl
    return total


def loss_and_grad(function, logits_NV, *others, **arguments):
    loss = function(logits_NV, *others, **arguments)
    return loss.detach(), torch.autograd.grad(loss, logits_NV)[0]


@settings(max_examples=60, deadline=None)
@given(
    N=st.integers(1, 9),
    V=st.integers(1, 13),
    k=st.integers(1, 13),
    chunk=st.integers(1, 10),
    seed=st.integers(0, 1000),
    half=st.booleans(),
)
def test_equals_the_slow_reference(N, V, k, chunk, seed, half):
    """With the teacher in float16 too, whose listed mass may be above 1."""
    logits_NV, token_ids_Nk, log_probs_Nk, weights_N, _ = example(N, V, min(k, V), seed=seed)
    log_probs_Nk = log_probs_Nk.half() if half else log_probs_Nk
    given_tensors = (logits_NV, token_ids_Nk, log_probs_Nk, weights_N)
    loss, grad_NV = loss_and_grad(top_k_kl, *given_tensors, tokens_per_chunk=chunk)
    expected, expected_grad_NV = loss_and_grad(slow_top_k_kl, *given_tensors)
    torch.testing.assert_close(loss, expected, rtol=1e-6, atol=1e-9)
    torch.testing.assert_close(grad_NV, expected_grad_NV, rtol=1e-6, atol=1e-9)
    assert loss >= -1e-12


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.bfloat16, 5e-3), (torch.float16, 6e-4)])
@pytest.mark.parametrize("in_place", [False, True])
def test_dtypes(dtype, tolerance, in_place):
    """The loss is of float32 accuracy in every dtype; the gradient is rounded to the logits' dtype once."""
    leaf_NV, *others, _ = example(N=40, V=50, k=6, dtype=dtype)
    expected, expected_grad_NV = loss_and_grad(slow_top_k_kl, leaf_NV, *others)
    logits_NV = leaf_NV * 1
    loss, grad_NV = loss_and_grad(top_k_kl, logits_NV, *others, tokens_per_chunk=16, in_place=in_place)
    assert loss.dtype == torch.float32 and grad_NV.dtype == dtype
    torch.testing.assert_close(loss.double(), expected.double(), rtol=2e-6, atol=0)
    torch.testing.assert_close(grad_NV.double(), expected_grad_NV.double(), rtol=tolerance, atol=1e-7)


@pytest.mark.parametrize("k", [1, 4, 6])
def test_gradcheck(k):
    logits_NV, *others, _ = example(N=5, V=6, k=k)
    torch.autograd.gradcheck(lambda logits: top_k_kl(logits, *others, tokens_per_chunk=2), (logits_NV,))


def test_with_every_token_listed_it_is_the_full_divergence():
    logits_NV, token_ids_Nk, log_probs_Nk, weights_N, teacher_NV = example(k=11)
    loss, grad_NV = loss_and_grad(top_k_kl, logits_NV, token_ids_Nk, log_probs_Nk, weights_N)
    full_N = kl_div(log_softmax(logits_NV, -1), teacher_NV, reduction="none", log_target=True).sum(-1)
    expected = (full_N * weights_N).sum()
    torch.testing.assert_close(loss, expected.detach())
    torch.testing.assert_close(grad_NV, torch.autograd.grad(expected, logits_NV)[0])


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 10_000), scale=st.sampled_from([0.1, 2.0, 10.0]))
def test_bounds_the_full_divergence_from_below_and_rises_with_k(seed, scale):
    losses = []
    for k in range(1, 12):
        logits_NV, token_ids_Nk, log_probs_Nk, weights_N, _ = example(k=k, seed=seed, scale=scale)
        losses.append(top_k_kl(logits_NV, token_ids_Nk, log_probs_Nk, weights_N).item())
    assert losses[0] >= 0
    assert all(less <= more * (1 + 1e-9) + 1e-12 for less, more in pairwise(losses))


def test_student_that_is_the_teacher_learns_nothing():
    _, token_ids_Nk, log_probs_Nk, weights_N, teacher_NV = example()
    loss, grad_NV = loss_and_grad(top_k_kl, teacher_NV.requires_grad_(), token_ids_Nk, log_probs_Nk, weights_N)
    assert abs(loss) < 1e-12 and grad_NV.abs().max() < 1e-12


def test_gradient_of_every_token_sums_to_zero_and_scales():
    logits_NV, *others, _ = example()
    _, grad_NV = loss_and_grad(top_k_kl, logits_NV, *others)
    assert grad_NV[1:].abs().sum() > 0.1 and grad_NV.sum(-1).abs().max() < 1e-12
    assert grad_NV[0].abs().max() == 0  # whose weight is 0
    _, tripled_NV = loss_and_grad(lambda *given: 3 * top_k_kl(*given), logits_NV, *others)
    torch.testing.assert_close(tripled_NV, 3 * grad_NV)


def test_student_whose_rest_underflows_is_told_exactly():
    """exp(-200) is no float32, and 1 - q would be 0 already at exp(-17)."""
    logits_NV = torch.tensor([[200.0, 0.0, 0.0]], requires_grad=True)
    log_probs_Nk = torch.tensor([[math.log(0.9)]])
    loss, grad_NV = loss_and_grad(top_k_kl, logits_NV, torch.tensor([[0]]), log_probs_Nk, torch.ones(1))
    expected = 0.9 * math.log(0.9) + 0.1 * (math.log(0.1) - (math.log(2) - 200))
    assert loss.item() == pytest.approx(expected, rel=1e-6)
    torch.testing.assert_close(grad_NV, torch.tensor([[0.1, -0.05, -0.05]]))


def test_tokens_that_neither_model_ever_says_count_nothing():
    """Such as the padding of a vocabulary: minus infinity, of which float16 makes -65,504."""
    logits_NV = torch.tensor([[1.0, 2.0, -torch.inf, -torch.inf]], requires_grad=True)
    teacher = torch.tensor([[math.log(0.25), math.log(0.75), -65504.0]])
    for log_probs_Nk in (teacher, teacher.masked_fill(teacher < -1000, -torch.inf)):
        others = (torch.tensor([[0, 1, 2]]), log_probs_Nk, torch.ones(1))
        loss, grad_NV = loss_and_grad(top_k_kl, logits_NV, *others)
        probs = logits_NV.detach().softmax(-1)
        expected = 0.25 * math.log(0.25 / probs[0, 0]) + 0.75 * math.log(0.75 / probs[0, 1])
        assert loss.item() == pytest.approx(expected, abs=1e-6)
        torch.testing.assert_close(grad_NV, probs - torch.tensor([[0.25, 0.75, 0, 0]]))


class NewTensors(TorchDispatchMode):
    """The most elements that were made at an address, for all addresses but that of `known`."""

    def __init__(self, known: torch.Tensor):
        super().__init__()
        self.known = known.untyped_storage().data_ptr()
        self.elements = {}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        made = function(*args, **(kwargs or {}))
        for tensor in made if isinstance(made, tuple | list) else (made,):
            storage = tensor.untyped_storage() if isinstance(tensor, torch.Tensor) else None
            if storage is not None and storage.data_ptr() != self.known:
                elements = storage.nbytes() // tensor.itemsize
                self.elements[storage.data_ptr()] = max(elements, self.elements.get(storage.data_ptr(), 0))
        return made


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("in_place", [False, True])
def test_nothing_larger_than_a_chunk_is_made(dtype, in_place):
    N, V, chunk = 64, 500, 8
    leaf_NV, *others, _ = example(N, V, 5, dtype)
    logits_NV = leaf_NV * 1
    with NewTensors(logits_NV) as new:
        loss = top_k_kl(logits_NV, *others, in_place=in_place, tokens_per_chunk=chunk)
        assert max(new.elements.values()) == chunk * V
        new.elements.clear()
        (grad_NV,) = torch.autograd.grad(loss, logits_NV)
    assert grad_NV.grad_fn is None and (grad_NV.data_ptr() == logits_NV.data_ptr()) == in_place
    large = [elements for elements in new.elements.values() if elements > chunk * V]
    assert large == ([] if in_place else [N * V])  # the gradient itself


def test_in_place_gradient_is_the_gradient():
    leaf_NV, *others, _ = example()
    _, expected_NV = loss_and_grad(top_k_kl, leaf_NV, *others)
    before_NV = leaf_NV.detach().clone()
    head = torch.eye(11, dtype=torch.float64)
    loss = top_k_kl((leaf_NV @ head).view(1, 7, 11).view(7, 11), *others, in_place=True, tokens_per_chunk=3)
    loss.backward()
    torch.testing.assert_close(leaf_NV.grad, expected_NV)
    assert torch.equal(leaf_NV, before_NV)


def test_in_place_without_a_gradient_leaves_the_logits_alone():
    logits_NV, *others, _ = example()
    before_NV = logits_NV.detach().clone()
    with torch.no_grad():
        top_k_kl(logits_NV * 1, *others, in_place=True)
        top_k_kl(logits_NV.detach(), *others, in_place=True)
    assert torch.equal(logits_NV, before_NV)


def test_in_place_is_never_silently_wrong():
    """Where the logits are still needed, autograd notices that they were overwritten."""
    logits_NV, *others, _ = example()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        top_k_kl(logits_NV.tanh(), *others, in_place=True).backward()
    loss = top_k_kl(logits_NV * 1, *others, in_place=True)
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize("make", [lambda leaf: leaf, lambda leaf: leaf.view(7, 11), lambda leaf: leaf[:]])
def test_in_place_refuses_a_leaf(make):
    logits_NV, *others, _ = example()
    with pytest.raises(ValueError) as error:
        top_k_kl(make(logits_NV), *others, in_place=True)
    assert str(error.value) == (
        "top_k_kl: in_place=True would overwrite a leaf that requires grad. Give logits that a model computed, "
        "or in_place=False."
    )


def test_shapes_that_do_not_fit_are_refused():
    logits_NV, token_ids_Nk, log_probs_Nk, weights_N, _ = example()
    with pytest.raises(ValueError) as error:
        top_k_kl(logits_NV, token_ids_Nk, log_probs_Nk, weights_N.unsqueeze(-1))
    assert str(error.value) == (
        "top_k_kl: shapes of student_logits_NV, token_ids_Nk, teacher_log_probs_Nk, weights_N are "
        "(7, 11), (7, 3), (7, 3), (7, 1). Give (N, V), (N, k), (N, k), (N,) with 1 <= k <= V."
    )
    for wrong in (logits_NV[:6], logits_NV[:, :2], logits_NV.unsqueeze(0)):
        with pytest.raises(ValueError, match="Give \\(N, V\\)"):
            top_k_kl(wrong, token_ids_Nk, log_probs_Nk, weights_N)


def test_no_second_derivative():
    logits_NV, *others, _ = example()
    (grad_NV,) = torch.autograd.grad(top_k_kl(logits_NV, *others), logits_NV, create_graph=True)
    with pytest.raises(RuntimeError, match="does not require grad"):
        grad_NV.sum().backward()
