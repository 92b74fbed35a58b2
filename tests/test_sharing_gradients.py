"""Every family, every way of sharing: gradients are those of the donor made to share, with and without checkpointing."""

import copy

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from hf_gqa.convert.donor import donor_from_model
from hf_gqa.runtime.layer_plan import read_rows
from hf_gqa.weights.head_tensors import read_heads

from .conformance import DROPOUTS, assert_close_for_float32, every_attention
from .gradients import enable_checkpointing, gradients
from .sharing_students import every_family, of_each_storage_a_case, oracle_of, sharing_student
from .tiny_donors import NUM_ATTENTION_HEADS, tokens_and_mask


HEADS = ("query", "key", "value")


def loss_gradients(model) -> dict[str, torch.Tensor]:
    """By name below the base model; parameters that a borrower keeps without using them have none."""
    model.zero_grad()
    tokens, mask = tokens_and_mask()
    labels = tokens.masked_fill(mask == 0, -100)
    labels[:, 1:].masked_fill_(mask[:, :-1] == 0, -100)
    model(tokens, attention_mask=mask, labels=labels, use_cache=False).loss.backward()
    return {
        name: torch.zeros_like(parameter) if parameter.grad is None else parameter.grad.clone()
        for name, parameter in model.base_model.named_parameters()
    }


def canonical(model, found: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Gradients of heads by layer and kind, whatever the family calls and fuses them; of copies of a head, the sum."""
    opened = donor_from_model(model) if not hasattr(model.config, "layer_plan") else None
    layout = opened.layout if opened else type(model.base_model).attention_class.donor_layout.unfused("")
    rest = dict(found)
    for layer_idx in range(model.config.num_hidden_layers):
        path = layout.attention.format(layer_idx=layer_idx)
        if layout.fused is None:
            continue
        names = [name for name in found if name.startswith(f"{path}.{layout.fused}.")]
        read = read_heads(layout, lambda name, path=path: found.get(f"{path}.{name}"), NUM_ATTENTION_HEADS, 8)
        for name in names:
            del rest[name]
        for state, tensors in zip(
            HEADS,
            (
                (read.query_HDE, read.query_bias_HD),
                (read.key_KDE, read.key_bias_KD),
                (read.value_KDE, read.value_bias_KD),
            ),
            strict=True,
        ):
            for kind, tensor in zip(("weight", "bias"), tensors, strict=True):
                if tensor is not None:
                    rest[f"{path}.{state[0]}_proj.{kind}"] = tensor.flatten(0, 1)
    return rest


def borrowed_norms(layout, rows) -> dict[str, str]:
    """Norms that borrowers of the donor made to share still have, as copies of the lender's."""
    names = {"query_from": layout.query_norm, "key_from": layout.key_norm}
    return {
        f"{layout.mixing_module(layer_idx)}.{norm}.{kind}": f"{layout.mixing_module(lender)}.{norm}.{kind}"
        for layer_idx, row in enumerate(rows)
        for column, norm in names.items()
        if norm is not None and (lender := getattr(row, column)) is not None
        for kind in ("weight", "bias")
    }


@of_each_storage_a_case
@every_attention
def test_gradients_are_those_of_the_donor_made_to_share(model_type, plan, attention):
    student, oracle = sharing_student(model_type, plan, attention), oracle_of(model_type, plan, attention)
    found, expected = loss_gradients(student), canonical(oracle, loss_gradients(oracle))
    rows = read_rows(student.config)
    groups = NUM_ATTENTION_HEADS // rows[0].num_key_value_heads
    tied = student.base_model.tied_layers
    assert found.keys().isdisjoint(tied)
    tied = tied | borrowed_norms(type(student.base_model).attention_class.donor_layout, rows)
    for name, gradient in found.items():
        reference = expected[name] + sum(
            expected[other] for other, lender in tied.items() if lender == name and other in expected
        )
        if reference.shape != gradient.shape:  # copies of a head
            head_dim = len(gradient) // rows[0].num_key_value_heads
            reference = reference.unflatten(0, (-1, groups, head_dim)).sum(1).flatten(0, 1)
        assert_close_for_float32(gradient, reference)
    lent = [n for n in range(len(rows)) if any(n in (r.key_from, r.value_from) for r in rows)]
    assert lent or plan.startswith("albert")


@of_each_storage_a_case
def test_gradient_checkpointing_changes_no_gradient(model_type, plan):
    student = copy.deepcopy(sharing_student(model_type, plan, **dict.fromkeys(DROPOUTS, 0.2))).train()
    torch.manual_seed(0)
    expected = gradients(student)
    enable_checkpointing(student)
    torch.manual_seed(0)
    found = gradients(student)
    for name, gradient in expected.items():
        assert_close_for_float32(found[name], gradient)  # summed over lender and borrowers in another order


@every_family
@pytest.mark.parametrize("plan", ["mixed"])
def test_reentrant_checkpointing_is_refused(model_type, plan):
    student = sharing_student(model_type, plan)
    enable = getattr(student, "activation_checkpointing_enable", None) or student.gradient_checkpointing_enable
    for model in (student, student.base_model):
        enable = getattr(model, enable.__name__)
        with pytest.raises(ValueError, match=r"use_reentrant = True .* Use \{'use_reentrant': False\}\."):
            enable({"use_reentrant": True})
        assert not any(getattr(module, "gradient_checkpointing", False) for module in model.modules())


def test_reentrant_checkpointing_by_other_means_is_refused():
    """Whoever wraps blocks without asking the model is found out by the first lender."""
    student = sharing_student("llama", "echo")
    tokens, _ = tokens_and_mask()
    layer = student.base_model.layers[1]
    forward = layer.forward
    layer.forward = lambda hidden, **kwargs: checkpoint(
        lambda inner: forward(inner, **kwargs), hidden, use_reentrant=True
    )
    try:
        with pytest.raises(ValueError, match="use_reentrant = True"):
            student(tokens, labels=tokens)
    finally:
        layer.forward = forward
