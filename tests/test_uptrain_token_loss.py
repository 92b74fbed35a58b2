"""The loss whose gradient lives in the logits' storage equals the plain computation, and says so when it cannot."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.functional import cross_entropy, kl_div
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from hf_gqa.uptrain.token_loss import PARTS, TokenWeights, next_token_labels, token_loss


DTYPES = {"float32": torch.float32, "float64": torch.float64, "bfloat16": torch.bfloat16}
RELATIVE = {torch.float32: 1e-5, torch.float64: 1e-5, torch.bfloat16: 2**-7}
MIXED = TokenWeights(kl=0.7, cross_entropy=0.4, teacher_choice=0.3, temperature=2.0)
ONLY_TEXT = TokenWeights(kl=0.0, cross_entropy=1.0)
CHANGED = "modified by an inplace operation"


def plain_parts(logits_NV, labels_N, teacher_NV) -> torch.Tensor:
    """Sums of PARTS, token by token."""
    sums = dict.fromkeys(PARTS, 0.0)
    for token, label in enumerate(labels_N.tolist()):
        if label == -100:
            continue
        student = logits_NV[token].double().softmax(-1)
        sums["tokens"] += 1
        sums["cross_entropy"] -= student[label].log().item()
        if teacher_NV is not None:
            teacher = teacher_NV[token].double().softmax(-1)
            sums["kl"] += (teacher * (teacher.log() - student.log())).sum().item()
            sums["teacher_cross_entropy"] -= teacher[label].log().item()
            sums["agreement"] += float(teacher.argmax() == student.argmax())
    return torch.tensor(list(sums.values()))


def plain_loss(logits_NV, labels_N, teacher_NV, weights: TokenWeights, num_items) -> torch.Tensor:
    """With autograd, in float64, over whole tensors."""
    logits_NV, counts = logits_NV.double(), labels_N != -100
    loss = weights.cross_entropy * cross_entropy(logits_NV, labels_N, reduction="sum", ignore_index=-100)
    if teacher_NV is not None:
        teacher_NV = teacher_NV.double()
        logits = [logits / weights.temperature for logits in (logits_NV[counts], teacher_NV[counts])]
        student, teacher = (each.log_softmax(-1) for each in logits)
        loss = loss + weights.kl * weights.temperature**2 * kl_div(student, teacher, log_target=True, reduction="sum")
        choices = teacher_NV.argmax(-1).masked_fill(~counts, -100)
        loss = loss + weights.teacher_choice * cross_entropy(logits_NV, choices, reduction="sum", ignore_index=-100)
    return loss / num_items


def example(num_tokens=13, vocab_size=11, seed=0, dtype=torch.float32, ignored=0.3):
    """Student's values, labels and teacher's logits."""
    generator = torch.Generator().manual_seed(seed)
    values, teacher = (3 * torch.randn(num_tokens, vocab_size, generator=generator) for _ in range(2))
    labels = torch.randint(vocab_size, (num_tokens,), generator=generator)
    labels[torch.rand(num_tokens, generator=generator) < ignored] = -100
    return values.to(dtype), labels, teacher.to(dtype)


def chunks_of(teacher_NV):
    return None if teacher_NV is None else lambda start, stop: teacher_NV[start:stop]


def both_gradients(values, labels, teacher, weights, num_items, chunk_tokens, upstream=1.0):
    """(loss, gradient, parts) of the fast and the plain computation; `values` is the leaf."""
    leaf = values.clone().requires_grad_()
    loss, parts = token_loss(leaf * 1, labels, chunks_of(teacher), weights, num_items, chunk_tokens)
    (loss * upstream).backward()
    plain = values.double().clone().requires_grad_()
    expected = plain_loss(plain, labels, teacher, weights, num_items)
    (expected * upstream).backward()
    return (loss.detach(), leaf.grad, parts), (expected.detach(), plain.grad, plain_parts(values, labels, teacher))


weight = st.sampled_from([0.0, 0.3, 1.0, 2.5])


@settings(max_examples=80, deadline=None, derandomize=True)
@given(
    num_tokens=st.integers(1, 20),
    vocab_size=st.integers(2, 30),
    chunk_tokens=st.integers(1, 24),
    weights=st.builds(
        TokenWeights,
        kl=weight,
        cross_entropy=weight,
        teacher_choice=weight,
        temperature=st.sampled_from([0.5, 1.0, 3.0]),
    ),
    ignored=st.sampled_from([0.0, 0.4, 0.9]),
    dtype=st.sampled_from(list(DTYPES.values())),
    has_teacher=st.booleans(),
    num_items=st.sampled_from([1, 7.5, 100]),
    seed=st.integers(0, 1000),
)
def test_equals_the_plain_computation(
    num_tokens, vocab_size, chunk_tokens, weights, ignored, dtype, has_teacher, num_items, seed
):
    values, labels, teacher = example(num_tokens, vocab_size, seed, dtype, ignored)
    teacher = teacher if has_teacher else None
    found, expected = both_gradients(values, labels, teacher, weights, num_items, chunk_tokens, upstream=0.5)
    relative = RELATIVE[dtype]
    torch.testing.assert_close(found[0].double(), expected[0], rtol=1e-5, atol=1e-5)
    assert found[1].dtype == dtype
    largest = max(expected[1].abs().max().item(), 1e-3)
    torch.testing.assert_close(found[1].double(), expected[1], rtol=relative, atol=relative * largest)
    torch.testing.assert_close(found[2], expected[2], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_ignored_tokens_have_no_gradient_whatever_their_logits(dtype):
    values, labels, teacher = example(dtype=dtype)
    ignored = labels == -100
    assert 0 < ignored.sum() < len(labels)
    clean = both_gradients(values, labels, teacher, MIXED, 5, 4)[0]
    values[ignored], teacher[ignored] = torch.nan, torch.inf
    broken = both_gradients(values, labels, teacher, MIXED, 5, 4)[0]
    assert (broken[1][ignored] == 0).all() and torch.equal(broken[1], clean[1])
    assert torch.equal(broken[0], clean[0]) and torch.equal(broken[2], clean[2])


def test_all_ignored():
    values, labels, teacher = example()
    leaf = values.clone().requires_grad_()
    loss, parts = token_loss(leaf * 1, torch.full_like(labels, -100), chunks_of(teacher), MIXED, 1, 4)
    loss.backward()
    assert loss == 0 and (leaf.grad == 0).all() and parts.tolist() == [0.0] * len(PARTS)


def test_num_items_may_be_a_tensor():
    values, labels, teacher = example()
    found = both_gradients(values, labels, teacher, MIXED, torch.tensor(9), 4)[0]
    expected = both_gradients(values, labels, teacher, MIXED, 9, 4)[0]
    assert all(map(torch.equal, found, expected))


def test_parts_are_unweighted_at_temperature_1_and_without_graph():
    values, labels, teacher = example(40, 5)
    loss, parts = token_loss(values.requires_grad_() * 1, labels, chunks_of(teacher), MIXED, 3, 7)
    assert loss.requires_grad and not parts.requires_grad and parts.dtype == torch.float32
    expected = plain_parts(values.detach(), labels, teacher)
    torch.testing.assert_close(parts, expected, rtol=1e-5, atol=1e-5)
    assert 0 < expected[PARTS.index("agreement")] < expected[PARTS.index("tokens")] == (labels != -100).sum()


def test_identical_models_have_no_kl_and_no_kl_gradient():
    values, labels, _ = example()
    weights = TokenWeights(kl=1.0, cross_entropy=0.0, temperature=2.0)
    loss, gradient, parts = both_gradients(values, labels, values.clone(), weights, 1, 4)[0]
    assert loss == 0 and parts[0] == 0 and parts[3] == parts[4] and (gradient == 0).all()


def test_next_token_labels():
    labels_BS = torch.tensor([[5, 6, -100, 8], [1, -100, 3, 4]])
    assert next_token_labels(labels_BS).tolist() == [6, -100, 8, -100, -100, 3, 4, -100]


class Allocations(TorchDispatchMode):
    """The largest storage that any operation makes or touches, the logits' own left out."""

    def __init__(self, *ignored: torch.Tensor):
        super().__init__()
        self.ignored = {tensor.untyped_storage().data_ptr() for tensor in ignored}
        self.largest_bytes, self.operations = 0, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        output = function(*args, **(kwargs or {}))
        self.operations += 1
        for tensor in tree_leaves(output):
            if isinstance(tensor, torch.Tensor) and tensor.untyped_storage().data_ptr() not in self.ignored:
                self.largest_bytes = max(self.largest_bytes, tensor.untyped_storage().nbytes())
        return output


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_gradient_takes_the_logits_storage_and_nothing_as_large_is_allocated(dtype):
    num_tokens, vocab_size, chunk_tokens = 64, 50, 8
    labels = example(num_tokens, vocab_size)[1]
    weight_VE = torch.randn(vocab_size, 3).to(dtype)
    hidden_NE = torch.randn(num_tokens, 3).to(dtype).requires_grad_()
    logits_NV = torch.nn.functional.linear(hidden_NE, weight_VE)
    teacher_hidden_NE = torch.randn(num_tokens, 3).to(dtype)
    seen = []
    logits_NV.register_hook(lambda gradient: seen.append(gradient.untyped_storage().data_ptr()))

    def teacher(start, stop):
        assert stop - start <= chunk_tokens
        return teacher_hidden_NE[start:stop] @ weight_VE.T

    with Allocations(logits_NV) as allocations:
        loss, _ = token_loss(logits_NV, labels, teacher, MIXED, 1, chunk_tokens)
        loss.backward()
    assert seen == [logits_NV.untyped_storage().data_ptr()] and allocations.operations > 100
    assert allocations.largest_bytes == chunk_tokens * vocab_size * torch.float32.itemsize
    assert not torch.equal(logits_NV, torch.nn.functional.linear(hidden_NE, weight_VE))


def test_the_plain_computation_would_be_noticed_by_the_same_count():
    values, labels, teacher = example(64, 50)
    logits_NV = values.requires_grad_() * 1
    with Allocations(logits_NV) as allocations:
        plain_loss(logits_NV, labels, teacher, MIXED, 1).backward()
    assert allocations.largest_bytes >= 64 * 50 * 4


@pytest.mark.parametrize("retain_graph", [False, True])
def test_second_backward_raises(retain_graph):
    values, labels, teacher = example()
    leaf = values.clone().requires_grad_()
    loss, _ = token_loss(leaf * 1, labels, chunks_of(teacher), MIXED, 1, 4)
    loss.backward(retain_graph=retain_graph)
    first = leaf.grad.clone()
    with pytest.raises(RuntimeError, match=CHANGED if retain_graph else "second time"):
        loss.backward()
    assert torch.equal(leaf.grad, first)


def before_exp(leaf):
    return leaf.exp(), 0.0


def squared_beside(leaf):
    logits = leaf * 1
    return logits, logits.square().sum()


def softmax_of_a_view(leaf):
    logits = leaf * 1
    return logits, logits[:, 2:].square().sum()


@pytest.mark.parametrize("make", [before_exp, squared_beside, softmax_of_a_view])
def test_operation_that_saved_the_logits_raises_instead_of_being_wrong(make):
    values, labels, teacher = example()
    logits, other_loss = make(values.requires_grad_())
    loss, _ = token_loss(logits, labels, chunks_of(teacher), MIXED, 1, 4)
    with pytest.raises(RuntimeError, match=CHANGED):
        (loss + other_loss).backward()


def test_operations_that_saved_something_else_are_right():
    """A soft cap keeps its own output; slices of a wider head keep nothing."""
    values, labels, teacher = example()
    gradients = []
    for function in (token_loss, plain_loss):
        leaf = values.clone().requires_grad_()
        logits = torch.nn.functional.pad(5 * torch.tanh(leaf / 5), (0, 2))[:, :11]  # of rows 13 apart
        assert not logits.is_contiguous()
        found = function(logits, labels, chunks_of(teacher) if function is token_loss else teacher, MIXED, 1)
        (found[0] if function is token_loss else found).backward()
        gradients.append(leaf.grad)
    torch.testing.assert_close(*gradients, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("requires_grad", [False, True])
def test_without_graph_the_logits_stay(requires_grad):
    values, labels, teacher = example()
    logits = values.clone().requires_grad_(requires_grad)
    before, version = values.clone(), logits._version
    with torch.no_grad():
        loss, parts = token_loss(logits, labels, chunks_of(teacher), MIXED, 4, 5)
    assert torch.equal(logits, before) and logits._version == version and not loss.requires_grad
    torch.testing.assert_close(loss.double(), plain_loss(before, labels, teacher, MIXED, 4), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(parts, plain_parts(before, labels, teacher), rtol=1e-5, atol=1e-5)


def test_frozen_logits_outside_no_grad_stay_too():
    values, labels, _ = example()
    before = values.clone()
    assert not token_loss(values, labels, None, ONLY_TEXT, 1, 5)[0].requires_grad
    assert torch.equal(values, before)


def test_extreme_logits_are_finite():
    values, labels, teacher = example(ignored=0.0)
    values, teacher = values * 1e4, teacher.neg() * 1e4
    found, expected = both_gradients(values, labels, teacher, MIXED, 1, 4)
    torch.testing.assert_close(found[0].double(), expected[0], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found[1].double(), expected[1], rtol=1e-5, atol=1e-5)
