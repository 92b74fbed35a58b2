"""Borrowers that are fitted to what is lent to them: what is exact, what gets nearer, what is refused."""

from dataclasses import replace
from itertools import permutations

import pytest
import torch
from transformers import AutoModelForCausalLM

from hf_gqa import Refusal, convert, convert_checkpoint
from hf_gqa.convert.donor import donor_from_model
from hf_gqa.convert.surgery import layer_heads
from hf_gqa.export.sharing_words import sharing_notes
from hf_gqa.runtime.layer_plan import LayerPlan, read_rows
from hf_gqa.weights.assignment import cheapest_assignment
from hf_gqa.weights.head_tensors import write_heads

from .command_line import assert_one_message, run_cli
from .conformance import assert_same_tensors, logits_of
from .donor_folders import write_donor
from .sharing_students import FAMILIES, deep_donor
from .students_on_disk import assert_same_student
from .tiny_donors import VOCAB_SIZE, of_each_storage


PLANS = {
    "echo": {"sharing": "echo", "shared_layers": [2, 3, 5]},
    "cross": {"sharing": "cross_layer_kv", "shared_layers": [2, 3, 5]},
    "echo of two": {"sharing": "echo", "share_every": 3, "num_key_value_heads": 2},
    "cross of two": {"sharing": "cross_layer_kv", "share_every": 3, "num_key_value_heads": 2},
    "keys": {"layer_plan": [{"num_key_value_heads": 4, **row} for row in ({}, {}, {"key_from": 0}, {}, {}, {})]},
    "values": {"layer_plan": [{"num_key_value_heads": 4, **row} for row in ({}, {}, {"value_from": 0}, {}, {}, {})]},
}
every_plan = pytest.mark.parametrize("plan", PLANS)
NEARER = [("llama", plan) for plan in PLANS] + [("gpt2", "echo"), ("gpt2", "cross of two"), ("gemma3_text", "cross")]


def rows(count: int = 40, seed: int = 1) -> torch.Tensor:
    return torch.randint(3, VOCAB_SIZE, (count, 24), generator=torch.Generator().manual_seed(seed))


def fitted(donor, plan: str, **changes):
    return convert(donor, **PLANS[plan], **changes, shared_init="fit", calibration=rows())


@torch.no_grad()
def distance(student, donor) -> float:
    """Mean KL from the donor's predictions on rows that nobody fitted to."""
    theirs, ours = (model.eval()(rows(8, seed=2)).logits.float().log_softmax(-1) for model in (donor, student))
    return float((theirs.exp() * (theirs - ours)).sum(-1).mean())


def with_echoing_layer(model_type: str, pattern: str, order: tuple[int, ...] = (2, 0, 3, 1)):
    """A donor whose third layer has the attention of its first, its inputs too, with heads in another order.

    What precedes it adds nothing: borrowing is exact, once heads are matched.
    """
    donor = deep_donor(model_type)
    opened = donor_from_model(donor)
    heads = dict(layer_heads(opened))
    for layer_idx in (0, 1):
        block = donor.base_model.get_submodule(opened.layout.attention.format(layer_idx=layer_idx).rpartition(".")[0])
        for name, parameter in block.named_parameters():
            if any(part in name for part in ("o_proj", "down_proj", "c_proj")):
                parameter.data.zero_()
    path = opened.layout.attention.format(layer_idx=2)
    norms = [opened.layout.attention.format(layer_idx=n).rpartition(".")[0] for n in (0, 2)]
    for (name, theirs), (_, ours) in zip(
        *(donor.base_model.get_submodule(n).named_parameters() for n in norms), strict=True
    ):
        if name.startswith(("input_layernorm", "ln_1")):
            ours.data.copy_(theirs)
    moved = replace(heads[0], output_EHD=heads[2].output_EHD)
    if pattern == "echo":
        moved = replace(moved, value_KDE=heads[2].value_KDE, value_bias_KD=heads[2].value_bias_KD)
    for name, tensor in write_heads(opened.layout, moved.reordered(list(order))).items():
        donor.base_model.get_submodule(path).get_parameter(name).data.copy_(tensor)
    return donor


@pytest.mark.parametrize("model_type", ["llama", "gpt2"])
@pytest.mark.parametrize("pattern", ["echo", "cross_layer_kv"])
def test_heads_in_another_order_are_found(model_type, pattern):
    donor = with_echoing_layer(model_type, pattern)
    table = [
        {},
        {},
        {"query_from": 0, "key_from": 0} if pattern == "echo" else {"key_from": 0, "value_from": 0},
        {},
        {},
        {},
    ]
    plan = {"layer_plan": [{"num_key_value_heads": 4, **row} for row in table]}
    own = convert(donor, **plan)
    fit = convert(donor, **plan, shared_init="fit", calibration=rows())
    assert distance(own, donor) > 0.01
    assert distance(fit, donor) < 1e-6


@pytest.mark.parametrize(("model_type", "plan"), NEARER)
def test_fitting_brings_the_student_nearer(model_type, plan):
    donor = deep_donor(model_type)
    assert distance(fitted(donor, plan), donor) < 0.98 * distance(convert(donor, **PLANS[plan]), donor)


@pytest.mark.parametrize("model_type", [name for name in of_each_storage(FAMILIES) if name not in ("llama", "gpt2")])
def test_lenders_and_all_outside_attention_stay(model_type):
    donor = deep_donor(model_type)
    own, fit = convert(donor, **PLANS["cross"]), fitted(donor, "cross")
    assert torch.isfinite(logits_of(fit, padded=True)).all()
    layout = type(fit.base_model).attention_class.donor_layout
    borrowers = [n for n, row in enumerate(read_rows(fit.config)) if row.borrows]
    inside = tuple(f"{layout.mixing_module(n)}." for n in borrowers)
    outputs = tuple(f"{layout.attention.format(layer_idx=n)}.{layout.output}." for n in borrowers)
    before, after = own.base_model.state_dict(), fit.base_model.state_dict()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed and all(name.startswith((*inside, *outputs)) for name in changed)


@every_plan
def test_on_disk_as_in_memory(plan, tmp_path):
    donor = deep_donor("llama")
    donor.save_pretrained(tmp_path / "donor")
    convert_checkpoint(tmp_path / "donor", tmp_path / "student", **PLANS[plan], shared_init="fit", calibration=rows())
    assert_same_student(tmp_path / "student", fitted(donor, plan))


def test_experts_stored_one_by_one_are_no_obstacle(tmp_path):
    donor = deep_donor("mixtral")
    donor.save_pretrained(tmp_path / "donor")
    convert_checkpoint(
        tmp_path / "donor", tmp_path / "student", **PLANS["cross"], shared_init="fit", calibration=rows()
    )
    student = AutoModelForCausalLM.from_pretrained(tmp_path / "student")
    assert torch.equal(logits_of(student), logits_of(fitted(donor, "cross")))


def test_the_same_text_gives_the_same_student():
    one, two = (fitted(deep_donor("llama"), "cross of two") for _ in range(2))
    assert_same_tensors(one.state_dict(), two.state_dict())


@pytest.mark.slow
def test_commands_fit_and_verify(tmp_path):
    deep_donor("gpt2").save_pretrained(tmp_path / "donor")
    for plan, fields in {"echo": PLANS["echo"], "cross of two": PLANS["cross of two"]}.items():
        student = tmp_path / plan
        convert_checkpoint(tmp_path / "donor", student, **fields, shared_init="fit", calibration=rows())
        result = run_cli("verify", student, "--donor", tmp_path / "donor")
        assert result.exit_code == 0, result.output
        assert "borrowers as they were fitted" in " ".join(result.output.split())


def test_command_without_text_is_refused(tmp_path):
    options = ["--sharing", "echo", "--shared-layers", "1", "--shared-init", "fit"]
    result = run_cli("convert", write_donor(tmp_path / "donor"), tmp_path / "student", *options)
    assert_one_message(result, 2, "shared_init = fit", "--calibration or --calibration-tokens")
    assert not (tmp_path / "student").exists()


@pytest.mark.parametrize(
    ("model_type", "plan", "message"),
    [
        (
            "llama",
            {"sharing": "albert", "share_every": 2},
            "shared_init = fit: layer 1 computes with the weights of another, which cannot fit one layer more than the other. "
            "Use shared_init = own or mean.",
        ),
        (
            "llama",
            {"num_key_value_heads": 2},
            "shared_init = fit: fits layers to what they borrow, and none borrows. Use shared_init = own.",
        ),
        ("stablelm", PLANS["echo"], "layers of a stablelm cannot lend each other queries"),
    ],
)
def test_plans_that_leave_nothing_to_fit_are_refused(model_type, plan, message):
    with pytest.raises(Refusal) as refused:
        convert(deep_donor(model_type), **plan, shared_init="fit", calibration=rows())
    assert message in str(refused.value)


def test_notes_say_which_layers_are_fitted():
    table = [LayerPlan(num_key_value_heads=4, **row) for row in ({}, {"query_from": 0, "key_from": 0}, {})]
    own, fit = sharing_notes(table), sharing_notes(table, "fit")
    assert fit[: len(own)] == own and len(fit) == len(own) + 1
    assert fit[-1].startswith("Layer 1 of 0 to 2: fitted on calibration text to what is lent")


def test_no_text_is_refused():
    with pytest.raises(Refusal) as refused:
        convert(deep_donor("llama"), **PLANS["echo"], shared_init="fit")
    assert str(refused.value) == (
        "shared_init = fit: fits borrowers to what the donor computes on text, and there is none. Give --calibration or "
        "--calibration-tokens (calibration= in Python), or use shared_init = own."
    )


@pytest.mark.parametrize("size", range(6))
def test_assignment_is_the_cheapest(size):
    generator = torch.Generator().manual_seed(size)
    for _ in range(20):
        cost = torch.randint(-3, 4, (size, size), generator=generator).tolist()
        found = cheapest_assignment(cost)
        assert sorted(found) == list(range(size))
        best = min(sum(cost[row][order[row]] for row in range(size)) for order in permutations(range(size)))
        assert sum(cost[row][found[row]] for row in range(size)) == best
