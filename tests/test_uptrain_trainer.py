"""Uptraining equals a training loop written by hand, however its batches are split, checkpointed, stopped and resumed."""

import contextlib
import copy
import math
import shutil
from dataclasses import fields

import pytest
import torch
from peft import get_peft_model
from torch.nn.functional import cross_entropy, kl_div
from transformers import Trainer, TrainingArguments, set_seed

from hf_gqa import convert, open_donor
from hf_gqa.uptrain.checkpoints import newest_complete
from hf_gqa.uptrain.freezing import trained_names
from hf_gqa.uptrain.lora import lora_config
from hf_gqa.uptrain.objectives import OBJECTIVES
from hf_gqa.uptrain.phases import Objective, Phase, rate_of_step
from hf_gqa.uptrain.trainer import DistillationMixin

from .conformance import in_bfloat16
from .phases import (
    EPSILON,
    LENGTH,
    MIXED,
    PEFT_ASKS,
    RATE,
    ROWS,
    assert_close,
    batch_of,
    every_objective,
    losses_of,
    models_of,
    phase_of,
    rows_of,
    trainer_of,
    uptrained,
)
from .plain_training import Steps, assert_equal, values_of
from .tiny_donors import tiny_donor


CHECKPOINTING = next(
    field.name
    for field in fields(TrainingArguments)
    if field.name in ("activation_checkpointing", "gradient_checkpointing")
)


@contextlib.contextmanager
def outputs_kept(model, forced: list[torch.Tensor] | None = None):
    """What attention takes in and puts out, and layers put out, of one forward pass."""
    kept, handles = {"inputs": [], "attention_output": [], "hidden_state": []}, []

    def before(module, args, kwargs):
        kept["inputs"].append(kwargs["hidden_states"])
        return args, kwargs | ({"hidden_states": forced[len(kept["inputs"]) - 1]} if forced else {})

    for layer in model.model.layers:
        handles += [layer.self_attn.register_forward_pre_hook(before, with_kwargs=True)]
        handles += [layer.self_attn.register_forward_hook(lambda m, a, out: kept["attention_output"].append(out[0]))]
        handles += [layer.register_forward_hook(lambda m, a, out: kept["hidden_state"].append(out))]
    yield kept
    for handle in handles:
        handle.remove()


def plain_loss(student, teacher, batch: dict, objective: Objective) -> torch.Tensor:
    """Of a whole batch at once, from the definitions."""
    labels = batch["labels"][:, 1:]
    counts, tokens = labels != -100, {"input_ids": batch["input_ids"], "use_cache": False}
    with torch.no_grad(), outputs_kept(teacher) as theirs:
        target = teacher(**tokens).logits[:, :-1]
    with outputs_kept(student, theirs["inputs"] if objective.teacher_forced else None) as ours:
        logits = student(**tokens).logits[:, :-1]
    total = objective.cross_entropy * cross_entropy(logits[counts], labels[counts], reduction="sum")
    total = total + objective.teacher_choice * cross_entropy(logits[counts], target[counts].argmax(-1), reduction="sum")
    soft, target = ((each[counts] / objective.temperature).log_softmax(-1) for each in (logits, target))
    total = total + objective.kl * objective.temperature**2 * kl_div(soft, target, log_target=True, reduction="sum")
    for name in ("attention_output", "hidden_state"):
        for mine, his in zip(ours[name], theirs[name], strict=True):
            error = (mine - his).square().mean(-1)[:, :-1] / his.square().mean(-1)[:, :-1]
            total = total + getattr(objective, name) * error[counts].sum() / len(ours[name])
    return total / counts.sum()


def train_by_hand(student, teacher, phase: Phase, num_steps: int = 4, rows=None) -> list[float]:
    """AdamW with Trainer's defaults on all rows at once; the losses."""
    student.train()
    batch, losses = batch_of(rows or rows_of()), []
    names = trained_names(student, phase.train)
    trained = [tensor for name, tensor in student.named_parameters() if name in names]
    optimizer = torch.optim.AdamW(trained, lr=RATE, eps=EPSILON, weight_decay=0.0)
    for step in range(num_steps):
        optimizer.param_groups[0]["lr"] = RATE * phase.rate_at((step + 0.5) / num_steps)
        loss = plain_loss(student, teacher, batch, phase.objective)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        losses.append(loss.item())
    return losses


@every_objective
@pytest.mark.parametrize("batch_size", [4, 1, pytest.param(2, marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    ("model_type", "export", "train"), [("llama", "auto", "all"), ("gemma3_text", "bundle", "attention")]
)
def test_equals_a_loop_written_by_hand(objective, batch_size, model_type, export, train, tmp_path):
    """In one batch, or accumulated over two or four with unequal numbers of labels."""
    student, donor = models_of(model_type, export)
    by_hand = copy.deepcopy(student)
    train = "attention" if objective.teacher_forced else train
    phase = Phase(objective=objective, train=train, warmup=0.25)
    expected = train_by_hand(by_hand, donor, phase)
    trainer = uptrained(tmp_path, student, donor, (phase,), batch_size=batch_size)
    assert losses_of(trainer) == pytest.approx(expected, rel=1e-5)
    assert_close(values_of(student), values_of(by_hand))


@pytest.mark.parametrize("export", ["auto", pytest.param("bundle", marks=pytest.mark.slow)])
@every_objective
def test_checkpointed_layers_change_nothing(objective, export, tmp_path):
    found = []
    for checkpointing in (False, True):
        student, donor = models_of(export=export)
        phases = (phase_of(objective),)
        trainer = uptrained(tmp_path, student, donor, phases, args={CHECKPOINTING: checkpointing})
        found.append((losses_of(trainer), values_of(student)))
        if checkpointing:
            assert getattr(trainer.args, f"{CHECKPOINTING}_kwargs") == {"use_reentrant": False}
    assert found[1][0] == pytest.approx(found[0][0], rel=1e-6)
    assert_close(found[1][1], found[0][1])


def test_unlabelled_row_beside_others_changes_nothing(tmp_path):
    """Its micro-batch has no token that counts."""
    rows = rows_of()
    rows[3]["labels"] = torch.full_like(rows[3]["labels"], -100)
    student, donor = models_of()
    by_hand, phase = copy.deepcopy(student), Phase(objective=MIXED)
    expected = train_by_hand(by_hand, donor, phase, rows=rows)
    trainer = uptrained(tmp_path, student, donor, (phase,), rows=rows, batch_size=1)
    assert losses_of(trainer) == pytest.approx(expected, rel=1e-5)
    assert_close(values_of(student), values_of(by_hand))


@torch.no_grad()
def evaluation_by_hand(student, teacher, rows) -> dict[str, float]:
    batch = batch_of(rows)
    labels = batch["labels"][:, 1:]
    counts = labels != -100
    ours, theirs = (
        model.eval()(batch["input_ids"]).logits[:, :-1][counts].log_softmax(-1) for model in (student, teacher)
    )
    found = [cross_entropy(each, labels[counts]).item() for each in (ours, theirs)]
    return {
        "eval_loss": found[0],
        "eval_teacher_loss": found[1],
        "eval_kl_nats_per_token": kl_div(ours, theirs, log_target=True, reduction="sum").item() / counts.sum().item(),
        "eval_top1_agreement_fraction": (ours.argmax(-1) == theirs.argmax(-1)).float().mean().item(),
        "eval_gap_nats_per_token": found[0] - found[1],
    }


def test_evaluation_weighs_tokens_and_not_batches(tmp_path):
    student, donor = models_of()
    rows = rows_of(7, seed=1)
    args = {"per_device_eval_batch_size": 2}
    trainer = trainer_of(tmp_path, student, donor, (Phase(objective=MIXED),), eval_rows=rows, args=args)
    first = trainer.evaluate()
    expected = evaluation_by_hand(student, donor, rows)
    assert {name: first[name] for name in expected} == pytest.approx(expected, rel=1e-5)
    assert expected["eval_gap_nats_per_token"] * first["eval_gap_closed_fraction"] == 0
    trainer.train()
    second = trainer.evaluate()
    expected = evaluation_by_hand(student, donor, rows)
    assert {name: second[name] for name in expected} == pytest.approx(expected, rel=1e-5)
    if first["eval_gap_nats_per_token"] > 0:
        closed = 1 - second["eval_gap_nats_per_token"] / first["eval_gap_nats_per_token"]
        assert second["eval_gap_closed_fraction"] == pytest.approx(closed) and closed != 0


@torch.no_grad()
def liked_by(donor, rows: list[dict]) -> list[dict]:
    """Labels are what the donor finds likeliest, so that every student has a gap to close."""
    for row in rows:
        choices = donor(row["input_ids"].unsqueeze(0)).logits[0].argmax(-1)
        row["labels"] = torch.cat([row["input_ids"][:1], choices[:-1]])
    return rows


def test_gap_closed_counts_from_the_first_evaluation(tmp_path):
    """Of the donor as teacher of text that it likes: a student trained towards it comes closer."""
    student, donor = models_of()
    rows = liked_by(donor, rows_of(8, seed=2))
    args = {"eval_strategy": "steps", "eval_steps": 2, "learning_rate": 3e-3, "eval_on_start": True}
    trainer = uptrained(tmp_path, student, donor, (Phase(objective=MIXED),), 6, eval_rows=rows, args=args)
    found = [entry for entry in trainer.state.log_history if "eval_loss" in entry]
    gaps = [entry["eval_gap_nats_per_token"] for entry in found]
    assert [entry["step"] for entry in found] == [0, 2, 4, 6] and gaps[0] > 0
    closed = [entry["eval_gap_closed_fraction"] for entry in found]
    assert closed == pytest.approx([1 - gap / gaps[0] for gap in gaps]) and closed[-1] > 0.01


def test_model_is_its_own_perfect_student(tmp_path):
    student, _ = models_of()
    trainer = trainer_of(tmp_path, student, copy.deepcopy(student), (Phase(objective=MIXED),), eval_rows=rows_of(3))
    found = trainer.evaluate()
    assert found["eval_kl_nats_per_token"] == 0.0 and found["eval_top1_agreement_fraction"] == 1.0
    assert found["eval_gap_nats_per_token"] == 0.0 and "eval_gap_closed_fraction" not in found


def test_attention_has_a_learning_rate_of_its_own(tmp_path):
    phases = (
        Phase(share=0.5, objective=MIXED, train="attention", attention_learning_rate=3.0),
        Phase(share=0.5, objective=MIXED, learning_rate=0.5, attention_learning_rate=2.0, schedule="linear"),
    )
    rates = []

    class Rates(Steps):
        def on_pre_optimizer_step(self, args, state, control, optimizer, **kwargs):
            rates.append({group["of_attention"]: group["lr"] for group in optimizer.param_groups})

    student, donor = models_of()
    trainer = uptrained(tmp_path, student, donor, phases, 6, callbacks=[Rates()], args={"weight_decay": 0.1})
    names = {id(tensor): name for name, tensor in student.named_parameters()}
    attention = trained_names(student, "attention")
    seen = []
    for group in trainer.optimizer.param_groups:
        seen += [names[id(tensor)] for tensor in group["params"]]
        assert all((names[id(tensor)] in attention) == group["of_attention"] for tensor in group["params"])
        assert {"norm" in names[id(tensor)] for tensor in group["params"]} in ({group["weight_decay"] == 0}, set())
    assert sorted(seen) == sorted(names.values())
    for step, found in enumerate(rates):
        assert found == pytest.approx({flag: RATE * rate_of_step(phases, step, 6, flag) for flag in (False, True)})
    assert len(rates) == 6


def test_objective_does_not_change_within_a_step(tmp_path):
    """Counted by tokens, the border between two phases may lie between two micro-batches."""
    phases = (Phase(share=0.5, objective=MIXED), Phase(share=0.5, objective=Objective(cross_entropy=1.0)))
    found = []
    for known in (ROWS * LENGTH, None):
        student, donor = models_of()
        options = {"tokens_per_step": known, "args": {"max_steps": 3}}
        uptrained(tmp_path, student, donor, phases, 3, batch_size=2, **options)
        found.append(values_of(student))
    assert_equal(*found)


STAGES = (
    Phase(share=0.5, objective=Objective(attention_output=1.0, teacher_forced=True), train="attention", warmup=0.2),
    Phase(share=0.5, objective=Objective(kl=1.0, hidden_state=0.1), attention_learning_rate=2.0),
)


@pytest.mark.parametrize("stopped", [2, 3, pytest.param(5, marks=pytest.mark.slow)])
def test_stopped_and_resumed_is_the_same_bit_for_bit(stopped, tmp_path):
    """Before, at and after the border of two phases, with rows shuffled and accumulated."""
    rows, args = (
        rows_of(3 * ROWS),
        {"save_strategy": "steps", "save_steps": 1, "eval_strategy": "steps", "eval_steps": 2},
    )
    tiny_donor("llama").save_pretrained(tmp_path / "donor")
    finals = []
    for folder, resume in ((tmp_path / "whole", None), (tmp_path / "resumed", True)):
        if resume:
            checkpoint = shutil.copytree(
                tmp_path / f"whole/run/checkpoint-{stopped}", folder / f"run/checkpoint-{stopped}"
            )
            assert newest_complete(folder / "run").newest == checkpoint
        set_seed(3 if resume else 4)
        student, _ = models_of()
        donor = open_donor(tmp_path / "donor")
        options = {"rows": rows, "batch_size": 2, "eval_rows": liked_by(tiny_donor("llama"), rows_of(3)), "args": args}
        finals.append(uptrained(folder, student, donor, STAGES, 6, resume=resume, **options))
    whole, resumed = finals
    assert resumed.state.global_step == 6 and resumed.state.num_input_tokens_seen == 6 * ROWS * LENGTH
    assert_equal(values_of(resumed.model), values_of(whole.model))
    volatile = ("runtime", "per_second", "train_loss", "total_flos")
    histories = [
        [
            {k: v for k, v in entry.items() if not any(word in k for word in volatile)}
            for entry in trainer.state.log_history
        ]
        for trainer in finals
    ]
    assert histories[1] == histories[0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_teacher_from_a_folder_uses_what_is_frozen(dtype, tmp_path):
    donor = tiny_donor("llama") if dtype == torch.float32 else in_bfloat16(tiny_donor("llama"))
    donor.save_pretrained(tmp_path / "donor")
    student = convert(donor, num_key_value_heads=2)
    trainer = uptrained(tmp_path, student, tmp_path / "donor", OBJECTIVES.get("distill"), eval_rows=rows_of(2))
    memory = trainer.teacher_memory()
    attention = sum(t.nbytes for name, t in donor.named_parameters() if "self_attn" in name)
    rotary = sum(buffer.nbytes for buffer in donor.buffers())
    assert (memory.own_bytes, memory.shared_bytes) == (
        attention + rotary,
        sum(t.nbytes for t in donor.parameters()) - attention,
    )
    tokens = batch_of(rows_of())["input_ids"]
    with torch.no_grad():
        assert torch.equal(trainer.teacher(tokens).logits, donor(tokens).logits)
    losses = losses_of(trainer)  # three steps of attention matching, one of KL
    assert all(map(math.isfinite, losses)) and losses[2] < losses[0] and student.dtype == dtype


@pytest.mark.filterwarnings(PEFT_ASKS)
@every_objective
def test_student_wrapped_by_peft(objective, tmp_path):
    bare, donor = models_of()
    student = get_peft_model(bare, lora_config(bare, rank=2))
    before = values_of(student)
    phases = (Phase(objective=objective, train="attention"),)
    trainer = uptrained(tmp_path, student, donor, phases, 6, args={"learning_rate": 3e-3}, eval_rows=rows_of(2))
    losses = losses_of(trainer)
    assert losses[-1] < losses[0]
    changed = {name for name, tensor in values_of(student).items() if not torch.equal(tensor, before[name])}
    assert changed and all(".lora_" in name or ".modules_to_save." in name for name in changed)
    expected = evaluation_by_hand(bare, donor, rows_of(2))
    assert trainer.evaluate()["eval_loss"] == pytest.approx(expected["eval_loss"], rel=1e-5)


def test_native_student_of_another_family(tmp_path):
    donor = tiny_donor("gpt2", embd_pdrop=0.0, attn_pdrop=0.0, resid_pdrop=0.0)
    student = convert(donor, num_key_value_heads=1)
    assert student.config.model_type == "gpt_bigcode"
    trainer = uptrained(tmp_path, student, donor, (Phase(objective=MIXED),), 6)
    assert losses_of(trainer)[-1] < losses_of(trainer)[0]


def kept_log(base=Trainer):
    """A Trainer of somebody else's that overrides things too."""

    class Theirs(base):
        logged, batches = [], 0

        def log(self, logs, *args, **kwargs):
            self.logged.append(dict(logs))
            super().log(logs, *args, **kwargs)

        def training_step(self, *args, **kwargs):
            type(self).batches += 1
            return super().training_step(*args, **kwargs)

    return Theirs


@pytest.mark.parametrize("stages", [(Phase(objective=MIXED),), STAGES], ids=["mixed", "stages"])
def test_mixin_before_another_trainer_logs_its_keys_once(stages, tmp_path):
    theirs = kept_log()
    distilled = type("Distilled", (DistillationMixin, theirs), {})
    student, donor = models_of()
    args = {"eval_strategy": "steps", "eval_steps": 2}
    trainer = uptrained(
        tmp_path, student, donor, stages, batch_size=2, eval_rows=rows_of(2), trainer_class=distilled, args=args
    )
    assert distilled.batches == 8
    history = [{key: value for key, value in entry.items() if key != "step"} for entry in trainer.state.log_history]
    assert len(theirs.logged) == len(history) == 4 + 2 + 1
    everywhere = {"tokens_seen", "budget_fraction_used", "kv_cache_bytes_per_token"}
    token_keys = {
        "loss_kl",
        "loss_cross_entropy",
        "loss_teacher_cross_entropy",
        "gap_to_teacher",
        "top1_agreement_fraction",
    }
    losses = [entry for entry in theirs.logged if "loss" in entry]
    evaluations = [entry for entry in theirs.logged if "eval_loss" in entry]
    for step, entry in enumerate(losses):
        objective = stages[len(stages) * step // 4].objective
        expected = set() if objective.teacher_forced else set(token_keys)
        expected |= {f"loss_{name}" for name in ("attention_output", "hidden_state") if getattr(objective, name)}
        assert {key for key in entry if key.startswith("loss_") or key in token_keys} == expected
        if not objective.teacher_forced:
            gap = entry["loss_cross_entropy"] - entry["loss_teacher_cross_entropy"]
            assert entry["gap_to_teacher"] == pytest.approx(gap)
    names = {"eval_loss", "eval_teacher_loss", "eval_kl_nats_per_token", "eval_top1_agreement_fraction"}
    assert all(names | {"eval_gap_nats_per_token"} <= entry.keys() for entry in evaluations) and len(evaluations) == 2
    assert all(everywhere <= entry.keys() for entry in [*theirs.logged, *history])
    assert [entry["tokens_seen"] for entry in losses] == [48, 96, 144, 192]


def test_parts_that_are_logged_are_means_over_the_steps_since_the_last_log(tmp_path):
    student, donor = models_of()
    by_step = uptrained(tmp_path, copy.deepcopy(student), donor, (Phase(objective=MIXED),), batch_size=1)
    by_two = uptrained(tmp_path, student, donor, (Phase(objective=MIXED),), args={"logging_steps": 2})
    for key in ("loss", "loss_kl", "loss_cross_entropy", "top1_agreement_fraction"):
        each, both = ([e[key] for e in t.state.log_history if key in e] for t in (by_step, by_two))
        assert both == pytest.approx([(each[0] + each[1]) / 2, (each[2] + each[3]) / 2], rel=1e-5)
