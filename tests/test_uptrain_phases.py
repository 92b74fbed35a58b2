"""Objectives, phases and their rates are what they say; every ready-made objective trains a student towards itself."""

import copy
import dataclasses
import json
import math
import re

import pytest
import torch
from datasets import Dataset
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import TrainingArguments

from hf_gqa import convert
from hf_gqa.uptrain.callback import UptrainCallback
from hf_gqa.uptrain.freezing import trained_names
from hf_gqa.uptrain.objectives import OBJECTIVES
from hf_gqa.uptrain.phases import SCHEDULES, TRAINED, WEIGHTS, Objective, Phase, locate, rate_of_step
from hf_gqa.uptrain.stored_teacher import StoredTeacher
from hf_gqa.uptrain.trainer import UptrainTrainer
from hf_gqa.uptrain.write_teacher_logits import write_teacher_logits

from .phases import LENGTH, TEXT, assert_close, data_set, losses_of, models_of, refused, rows_of, uptrained
from .tiny_donors import SOME_MODEL_TYPES, VOCAB_SIZE, tiny_donor


ALL_WEIGHTS = "kl, cross_entropy, teacher_choice, attention_output, hidden_state"
OBJECTIVE_KEYS = f"{ALL_WEIGHTS}, temperature, teacher_forced"
PHASE_KEYS = "share, objective, train, learning_rate, attention_learning_rate, warmup, schedule"


@pytest.mark.parametrize("name", [*WEIGHTS, "temperature"])
@pytest.mark.parametrize("value", [-0.1, math.nan, math.inf, True, "1", None])
def test_objective_refuses_what_is_no_weight(name, value):
    message = f"objective: {name} = {value!r} is not a number from 0. Use 0 or more."
    assert refused(Objective, **{name: value}) == message


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (
            {"kl": 1.0, "temperature": 0},
            "objective: temperature = 0 has no softmax. Use a number above 0, usually 1.",
        ),
        ({}, f"objective: every weight is 0, so there is nothing to learn. Set one of {ALL_WEIGHTS}."),
        *(
            (
                values | {"teacher_forced": True},
                "objective: teacher_forced gives the student's layers inputs that are not its own, so only "
                "attention_output means anything. Set the other weights to 0.",
            )
            for values in ({"kl": 1.0}, {"attention_output": 1.0, "cross_entropy": 0.1}, {"hidden_state": 1.0})
        ),
    ],
)
def test_objective_refuses_what_means_nothing(values, message):
    assert refused(Objective, **values) == message


def test_what_an_objective_needs():
    for name in WEIGHTS:
        objective = Objective(**{name: 1})
        assert objective.needs_teacher == (name != "cross_entropy")
        assert objective.matches_layers == (name in ("attention_output", "hidden_state"))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"train": "mlp"}, "phase: train = 'mlp' is unknown. Use one of all, attention, key_value."),
        ({"schedule": "step"}, "phase: schedule = 'step' is unknown. Use one of cosine, linear, constant."),
        ({"share": 0}, "phase: share = 0 would do nothing. Use a positive number."),
        ({"share": math.inf}, "phase: share = inf would do nothing. Use a positive number."),
        ({"learning_rate": -1}, "phase: learning_rate = -1 would do nothing. Use a positive number."),
        (
            {"attention_learning_rate": 0.0},
            "phase: attention_learning_rate = 0.0 would do nothing. Use a positive number.",
        ),
        ({"warmup": 1}, "phase: warmup = 1 is a share of the phase. Use a number from 0 to below 1."),
        ({"warmup": -0.1}, "phase: warmup = -0.1 is a share of the phase. Use a number from 0 to below 1."),
        ({"objective": {"kl": 1, "k": 2}}, f"objective: unknown key 'k'. Known: {OBJECTIVE_KEYS}."),
        ({"objective": {"kl": -1}}, "objective: kl = -1 is not a number from 0. Use 0 or more."),
        ({"objective": {}}, f"objective: every weight is 0, so there is nothing to learn. Set one of {ALL_WEIGHTS}."),
        ({"rate": 1, "b": 2}, f"phase: unknown key 'b'. Known: {PHASE_KEYS}."),
    ],
)
def test_phase_refuses(values, message):
    assert refused(Phase.from_dict, {"objective": {"kl": 1.0}} | values) == message


def test_teacher_forced_phase_trains_attention_alone():
    assert refused(Phase, objective=Objective(attention_output=1.0, teacher_forced=True)) == (
        "phase: teacher_forced teaches attention modules only, so train = 'all' would leave the rest to weight decay. Use "
        "train = 'attention' or 'key_value'."
    )


@pytest.mark.parametrize("values", [None, [], "kl", 3])
def test_phase_refuses_what_is_no_object(values):
    message = f"phase: got {values!r}, expected an object with keys of {PHASE_KEYS}."
    assert refused(Phase.from_dict, values) == message


def test_phase_refuses_to_be_without_objective():
    message = refused(Phase.from_dict, {"share": 1})
    assert re.fullmatch(rf"phase: .*missing .*'objective'\. Known keys: {PHASE_KEYS}\.", message)


@pytest.mark.parametrize("objective", ["kl", None, ("kl",)])
def test_phase_refuses_an_objective_of_another_kind(objective):
    message = f"phase: objective = {objective!r} is not weights, such as {{'kl': 1.0}}. Write them out."
    assert refused(Phase.from_dict, {"objective": objective}) == message


def test_phase_is_frozen_and_keyword_only():
    with pytest.raises(dataclasses.FrozenInstanceError):
        Phase(objective=TEXT).share = 2
    with pytest.raises(TypeError):
        Phase(1.0, TEXT)


@settings(max_examples=50, deadline=None, derandomize=True)
@given(
    share=st.floats(0.01, 10),
    objective=st.builds(Objective, kl=st.floats(0.1, 2), hidden_state=st.floats(0, 2), temperature=st.floats(0.1, 4)),
    train=st.sampled_from(TRAINED),
    attention_learning_rate=st.none() | st.floats(0.1, 5),
    warmup=st.floats(0, 0.99),
    schedule=st.sampled_from(SCHEDULES),
)
def test_round_trip(**fields):
    phase = Phase(**fields)
    assert Phase.from_dict(json.loads(json.dumps(phase.to_dict()))) == phase
    assert phase.attention_learning_rate == (fields["attention_learning_rate"] or phase.learning_rate)


def phases_of(*shares, **fields) -> tuple[Phase, ...]:
    return tuple(Phase(share=share, objective=TEXT, **fields) for share in shares)


def test_locate():
    assert [locate(phases_of(1), progress) for progress in (0, 0.5, 1.0)] == [0, 0, 0]
    phases = phases_of(2, 1, 1)
    found = [locate(phases, progress) for progress in (0, 0.49, 0.5, 0.74, 0.75, 0.99, 1.0, 1.5)]
    assert found == [0, 0, 1, 1, 2, 2, 2, 2]


@pytest.mark.parametrize("shares", [(0.1, 0.2, 0.7), (1 / 3, 1 / 3, 1 / 3), (0.7, 0.2, 0.1), (1e-3, 1e3)])
@pytest.mark.parametrize("num_steps", [10, 30, 90])
def test_steps_of_each_phase_are_its_share(shares, num_steps):
    """Whatever the sums of floating-point shares are."""
    phases = phases_of(*shares)
    found = [locate(phases, step / num_steps) for step in range(num_steps)]
    assert found == sorted(found)
    for index, share in enumerate(shares):
        expected = share / sum(shares) * num_steps
        assert abs(found.count(index) - expected) < (1e-6 if abs(expected - round(expected)) < 1e-6 else 1)


def test_rate_at():
    phase = Phase(objective=TEXT, learning_rate=2.0, attention_learning_rate=6.0, warmup=0.2)
    assert [phase.rate_at(progress) for progress in (0.0, 0.1, 0.2)] == [0.0, 1.0, 2.0]
    assert phase.rate_at(0.2 - 1e-9) == pytest.approx(phase.rate_at(0.2), abs=1e-6)
    assert phase.rate_at(0.4) == pytest.approx(1 + math.cos(math.pi / 4))
    assert phase.rate_at(0.6) == pytest.approx(1.0) and phase.rate_at(1.0) == pytest.approx(0.0)
    assert phase.rate_at(0.1, of_attention=True) == pytest.approx(3.0)
    linear = Phase(objective=TEXT, schedule="linear", warmup=0.2)
    assert [linear.rate_at(progress) for progress in (0.2, 0.4, 1.0)] == pytest.approx([1.0, 0.75, 0.0])
    constant = Phase(objective=TEXT, schedule="constant", warmup=0)
    assert [constant.rate_at(progress) for progress in (0.0, 0.5, 1.0)] == [1.0, 1.0, 1.0]


@settings(max_examples=100, deadline=None, derandomize=True)
@given(
    shares=st.lists(st.floats(0.05, 3), min_size=1, max_size=4),
    num_steps=st.integers(1, 200),
    warmup=st.floats(0, 0.9),
    schedule=st.sampled_from(SCHEDULES),
)
def test_no_step_has_rate_0_and_none_exceeds_the_peak(shares, num_steps, warmup, schedule):
    phases = phases_of(*shares, warmup=warmup, schedule=schedule, learning_rate=0.5, attention_learning_rate=1.5)
    for step in range(num_steps):
        rate = rate_of_step(phases, step, num_steps)
        in_whole_phase = all(share / sum(shares) * num_steps >= 1 for share in shares)
        assert 0 <= rate <= 0.5 and (rate > 0 or not in_whole_phase)
        assert rate_of_step(phases, step, num_steps, of_attention=True) == pytest.approx(3 * rate)


def test_rate_of_each_step_of_two_phases():
    """By hand: the middles of 4 and of 6 steps."""
    first = Phase(
        share=4, objective=TEXT, learning_rate=2.0, attention_learning_rate=4.0, warmup=0.5, schedule="linear"
    )
    phases = first, Phase(share=6, objective=TEXT, warmup=0, schedule="cosine")
    cosines = [(1 + math.cos(math.pi * (step + 0.5) / 6)) / 2 for step in range(6)]
    found = [rate_of_step(phases, step, 10) for step in range(10)]
    assert found == pytest.approx([0.5, 1.5, 1.5, 0.5, *cosines])
    found = [rate_of_step(phases, step, 10, of_attention=True) for step in range(10)]
    assert found == pytest.approx([1.0, 3.0, 3.0, 1.0, *cosines])


@pytest.mark.parametrize("model_type", SOME_MODEL_TYPES)
def test_trained_names(model_type):
    donor = tiny_donor(model_type)
    for student in (convert(donor, num_key_value_heads=2, export="bundle"), donor):
        everything = {name for name, _ in student.named_parameters()}
        attention = {name for name in everything if ".attn." in name or ".self_attn." in name}
        parts = ("c_attn",) if model_type == "gpt2" and student is donor else ("k_proj", "v_proj")
        key_value = {name for name in attention if name.split(".")[-2] in parts}
        assert trained_names(student, "all") == everything
        assert trained_names(student, "attention") == attention != everything
        assert trained_names(student, "key_value") == key_value and len(key_value) >= 2 * len(parts)


def test_training_nothing_is_refused():
    student = tiny_donor("llama")
    student.model.layers.requires_grad_(False)
    assert refused(trained_names, student, "key_value") == (
        "train = key_value: no such parameter of this model requires a gradient. Unfreeze them, or train something else."
    )
    assert trained_names(student, "all") == {name for name, _ in student.named_parameters()}


@pytest.mark.parametrize("name", OBJECTIVES.names())
def test_ready_made_objective_is_a_tuple_of_phases(name):
    phases = OBJECTIVES.get(name)
    assert isinstance(phases, tuple) and phases and all(type(phase) is Phase for phase in phases)
    assert "Source" in OBJECTIVES.module(name).__doc__
    assert tuple(Phase.from_dict(json.loads(json.dumps(phase.to_dict()))) for phase in phases) == phases


def test_unknown_objective_is_refused():
    known = ", ".join(OBJECTIVES.names())
    message = f"objective 'distil' is unknown. Did you mean 'distill'? Known: {known}."
    assert refused(OBJECTIVES.get, "distil") == message


CASES = [(name, number) for name in OBJECTIVES.names() for number in range(len(OBJECTIVES.get(name)))]


@pytest.mark.parametrize(("name", "number"), CASES, ids=[f"{name}-{number + 1}" for name, number in CASES])
@pytest.mark.parametrize("export", ["auto", pytest.param("bundle", marks=pytest.mark.slow)])
def test_loss_of_every_phase_of_every_ready_made_objective_falls(name, number, export, tmp_path):
    """On the same rows over and over, by the loss that it minimizes itself, recomputed before and after."""
    phase = dataclasses.replace(OBJECTIVES.get(name)[number], share=1.0)
    donor = tiny_donor("llama")
    student = convert(donor, num_key_value_heads=2, export=export)
    before = {name: tensor.clone() for name, tensor in student.state_dict().items()}
    rows, tokens_per_step = data_set(4), 4 * 12
    args = TrainingArguments(
        output_dir=str(tmp_path), per_device_train_batch_size=4, num_train_epochs=100, learning_rate=2e-3,
        logging_steps=1, use_cpu=True, disable_tqdm=True, save_strategy="no", report_to="none",
    )  # fmt: skip
    uptrain = UptrainCallback(budget_tokens=12 * tokens_per_step, tokens_per_step=tokens_per_step, phases=(phase,))
    trainer = UptrainTrainer(
        model=student, args=args, train_dataset=rows, uptrain=uptrain,
        teacher=donor if phase.objective.needs_teacher else None,
    )  # fmt: skip
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert len(losses) == 12 and losses[-1] < 0.9 * losses[0]
    trained = trained_names(student, phase.train)
    changed = {name for name, tensor in student.named_parameters() if not torch.equal(tensor, before[name])}
    assert changed and changed <= trained


def packed(rows) -> Dataset:
    ids = [row["input_ids"].tolist() for row in rows]
    return Dataset.from_dict({"input_ids": ids, "position_ids": [list(range(LENGTH))] * len(rows)})


@pytest.mark.parametrize("text", [0.0, 0.5], ids=["kl", "kl_and_text"])
@pytest.mark.parametrize("batch_size", [4, 1])
def test_stored_teacher_of_the_whole_vocabulary_is_the_live_one(text, batch_size, tmp_path):
    student, donor = models_of()
    rows = [row | {"row": torch.tensor(number)} for number, row in enumerate(rows_of())]
    write_teacher_logits(donor, packed(rows), tmp_path / "logits", top_k=VOCAB_SIZE, donor_id="tiny")
    stored = StoredTeacher.open(tmp_path / "logits", packed(rows), vocab_size=VOCAB_SIZE)
    phases, found = (Phase(objective=Objective(kl=1.0, cross_entropy=text)),), []
    for teacher in (donor, stored):
        model = copy.deepcopy(student)
        options = {"batch_size": batch_size, "args": {"optim": "sgd", "learning_rate": 0.05}}
        trainer = uptrained(tmp_path, model, teacher, phases, rows=rows, eval_rows=rows, **options)
        evaluated = trainer.evaluate()
        kl = [entry["loss_kl"] for entry in trainer.state.log_history if "loss_kl" in entry]
        found.append((losses_of(trainer), kl, evaluated["eval_loss"], dict(model.named_parameters())))
    assert found[1][0] == pytest.approx(found[0][0], rel=2e-3) and found[1][1] == pytest.approx(found[0][1], rel=2e-3)
    assert found[1][2] == pytest.approx(found[0][2], rel=1e-3)
    assert_close(found[1][3], found[0][3], 2e-4)
    assert max((tensor - student.get_parameter(name)).abs().max() for name, tensor in found[0][3].items()) > 2e-3
