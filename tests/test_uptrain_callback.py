"""Any Trainer with the callback: it ends with the budget, trains what the phase says, and leaves a student behind."""

import json
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, Trainer, TrainerCallback

from hf_gqa import Refusal, convert_checkpoint, open_donor, verify
from hf_gqa.convert.manifest import Manifest
from hf_gqa.uptrain.callback import NonFiniteGradient, UptrainCallback, cache_facts, resolve_budget
from hf_gqa.uptrain.freezing import trained_names
from hf_gqa.uptrain.phases import Phase

from .fresh_process import run_python
from .phases import LENGTH, TEXT, arguments, refused
from .plain_training import Steps, assert_equal, student_of, trained, values_of
from .tiny_donors import tiny_donor


@pytest.mark.parametrize(("batch_size", "accumulation"), [(1, 1), (2, 1), (2, 2), (4, 2), (1, 3)])
@pytest.mark.parametrize("known", [False, True])
@pytest.mark.parametrize("left_over", [0, 1, -1])
def test_ends_with_the_last_whole_step_of_the_budget(batch_size, accumulation, known, left_over, tmp_path):
    step_tokens, num_steps = batch_size * accumulation * LENGTH, 3
    budget = num_steps * step_tokens + left_over
    trainer = trained(
        tmp_path, num_rows=24, budget_tokens=budget, tokens_per_step=step_tokens if known else None,
        args={"per_device_train_batch_size": batch_size, "gradient_accumulation_steps": accumulation},
    )  # fmt: skip
    expected = num_steps if left_over >= 0 else num_steps - 1
    assert trainer.state.global_step == expected
    assert trainer.state.num_input_tokens_seen == expected * step_tokens <= budget
    if known:
        assert trainer.args.max_steps == trainer.state.max_steps == expected


def test_schedule_ends_with_the_budget(tmp_path):
    steps = Steps()
    trained(
        tmp_path, budget_tokens=5 * 24 + 7, tokens_per_step=24, callbacks=[steps],
        args={"lr_scheduler_type": "linear", "learning_rate": 1.0},
    )  # fmt: skip
    assert steps.rates == pytest.approx([1.0, 0.8, 0.6, 0.4, 0.2])


def test_budget_as_a_fraction(tmp_path):
    trainer = trained(tmp_path, budget_fraction=0.05, pretraining_tokens=20 * 3 * 24)
    assert trainer.state.global_step == 3
    assert trainer.state.log_history[0]["budget_fraction_used"] == pytest.approx(1 / 3)


def test_ends_with_data_takes_the_last_smaller_step(tmp_path):
    trainer = trained(tmp_path, num_rows=5, budget_tokens=5 * LENGTH, ends_with_data=True, args={"num_train_epochs": 1})
    assert trainer.state.global_step == 3 and trainer.state.num_input_tokens_seen == 5 * LENGTH


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ((None, None, None), "budget: say how long to train, by budget_tokens or by budget_fraction of the donor's "
         "pre-training."),
        ((5, 0.1, 5), "budget: say how long to train, by budget_tokens or by budget_fraction of the donor's pre-training."),
        ((None, 0.05, None), "budget_fraction = 0.05: of how many tokens? Checkpoints do not say what they were trained "
         "on: give pretraining_tokens, or the budget as budget_tokens."),
        ((None, -0.5, 10), "budget_fraction = -0.5 of pretraining_tokens = 10 is no budget. Use positive numbers; the GQA "
         "paper uses 0.05."),
        ((None, float("nan"), 10), "budget_fraction = nan of pretraining_tokens = 10 is no budget. Use positive numbers; "
         "the GQA paper uses 0.05."),
        ((None, 0.05, 0), "budget_fraction = 0.05 of pretraining_tokens = 0 is no budget. Use positive numbers; the GQA "
         "paper uses 0.05."),
        ((None, 0.001, 10), "budget_tokens = 0 is no budget. Use a positive whole number of tokens."),
        *(((value, None, None), f"budget_tokens = {value!r} is no budget. Use a positive whole number of tokens.")
          for value in (0, -3, 2.5, True, "9")),
    ],
)  # fmt: skip
def test_budget_is_refused(values, message):
    assert refused(resolve_budget, *values) == message


def test_budget_is_resolved():
    assert resolve_budget(7, None, None) == 7 and resolve_budget(None, 0.05, 1000) == 50


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"export": "first"}, "export = 'first' is unknown. Use one of last, best."),
        ({"tokens_per_step": 2048}, "budget_tokens = 1,200 is less than one step of 2,048 tokens. Raise the budget, or make "
         "the batch smaller."),
    ],
)  # fmt: skip
def test_callback_is_refused(options, message):
    assert refused(UptrainCallback, budget_tokens=1200, **options) == message


def test_existing_export_dir_is_refused_at_once(tmp_path):
    message = f"{tmp_path}: exists. Give another folder, or overwrite=True to replace it."
    assert refused(UptrainCallback, budget_tokens=1, export_dir=tmp_path) == message
    UptrainCallback(budget_tokens=1, export_dir=tmp_path, overwrite=True)


def test_best_without_evaluation_is_refused(tmp_path):
    message = "export = best: nothing is evaluated (eval_strategy = 'no'). Set eval_strategy, or export last."
    assert refused(trained, tmp_path, budget_tokens=24, export="best", export_dir=tmp_path / "student") == message


@pytest.mark.parametrize("name", ["activation_checkpointing", "gradient_checkpointing"])
def test_reentrant_checkpointing_is_refused(name, tmp_path):
    if not hasattr(arguments(tmp_path), name):
        pytest.skip(f"this transformers has no {name}")
    kwargs = {"use_reentrant": True}
    args = arguments(tmp_path)
    setattr(args, f"{name}_kwargs", kwargs)
    with pytest.raises(Refusal) as refusal:
        Trainer(model=student_of(), args=args, callbacks=[UptrainCallback(budget_tokens=24)])
    assert str(refusal.value) == (
        f"{name}_kwargs = {kwargs}: reentrant checkpointing gives silently wrong gradients where layers share states or "
        "are matched to the teacher's. Use {'use_reentrant': False}."
    )


PHASES = (
    Phase(share=0.5, objective=TEXT, train="key_value"),
    Phase(share=0.25, objective=TEXT, train="attention"),
    Phase(share=0.25, objective=TEXT),
)


@pytest.mark.parametrize("known", [False, True])
@pytest.mark.parametrize("export", ["auto", "bundle"])
@pytest.mark.parametrize("accumulation", [1, 2])
def test_phases_train_what_they_say(known, export, accumulation, tmp_path):
    model, steps = student_of(export=export), Steps()
    model.model.embed_tokens.weight.requires_grad_(False)  # the user's own choice stays
    step_tokens = 24 * accumulation
    trained(
        tmp_path, model, budget_tokens=8 * step_tokens, tokens_per_step=step_tokens if known else None, phases=PHASES,
        callbacks=[steps], args={"gradient_accumulation_steps": accumulation},
    )  # fmt: skip
    names = {
        name: trained_names(model, name) - {"model.embed_tokens.weight"} for name in ("all", "attention", "key_value")
    }
    assert steps.with_gradient == [names["key_value"]] * 4 + [names["attention"]] * 2 + [names["all"]] * 2
    assert {name for name, tensor in model.named_parameters() if tensor.requires_grad} == names["all"]


def test_every_log_says_what_was_seen_and_what_the_cache_takes(tmp_path):
    seen = []

    class Tracker(TrainerCallback):
        def on_log(self, args, state, control, logs, **kwargs):
            seen.append(dict(logs))

    model = student_of()
    trainer = trained(
        tmp_path, model, budget_tokens=3 * 24, callbacks=[Tracker()], args={"eval_strategy": "steps", "eval_steps": 1}
    )
    history = trainer.state.log_history
    cache_bytes = 2 * 2 * 2 * 8 * 4  # keys and values, layers, heads, head_dim, float32
    assert cache_facts(model) == {"kv_cache_bytes_per_token": cache_bytes}
    for entry in [*history, *seen]:
        assert entry["kv_cache_bytes_per_token"] == cache_bytes
        assert entry["tokens_seen"] == entry["num_input_tokens_seen"]
        assert entry["budget_fraction_used"] == entry["tokens_seen"] / 72
    losses = [entry for entry in history if "loss" in entry]
    assert [entry["tokens_seen"] for entry in losses] == [24, 48, 72]


def test_resumed_run_goes_on_counting(tmp_path):
    budget = 6 * 24
    whole = trained(tmp_path / "a", budget_tokens=budget, args={"save_strategy": "steps", "save_steps": 4})
    resumed = trained(
        tmp_path / "b", budget_tokens=budget, resume=str(tmp_path / "a/run/checkpoint-4"), args={"save_steps": 4}
    )
    assert resumed.state.global_step == whole.state.global_step == 6
    assert resumed.state.num_input_tokens_seen == budget
    assert_equal(values_of(resumed.model), values_of(whole.model))


def test_resumed_run_whose_budget_is_spent_is_refused(tmp_path):
    """Trainer would make one more step."""
    saved = {"save_strategy": "steps", "save_steps": 4}
    trained(tmp_path, budget_tokens=4 * 24, args=saved)
    message = "budget_tokens = 96: all of them have been seen, so there is nothing to resume. Raise the budget."
    assert (
        refused(trained, tmp_path, budget_tokens=96, resume=str(tmp_path / "run/checkpoint-4"), args=saved) == message
    )
    more = trained(tmp_path, budget_tokens=5 * 24, resume=str(tmp_path / "run/checkpoint-4"), args=saved)
    assert more.state.num_input_tokens_seen == 5 * 24


class Poisoned(Trainer):
    """The loss of the third step is not a number."""

    def compute_loss(self, model, inputs, *args, **kwargs):
        loss = super().compute_loss(model, inputs, *args, **kwargs)
        return loss * float("nan") if self.state.global_step == 2 else loss


@pytest.mark.parametrize("max_grad_norm", [0.0, 1.0])
def test_gradient_that_is_not_finite_stops_before_the_update(max_grad_norm, tmp_path):
    after_two, model = [], student_of()

    class Keep(TrainerCallback):
        def on_step_end(self, args, state, control, model, **kwargs):
            after_two.append(values_of(model))

    with pytest.raises(NonFiniteGradient) as refusal:
        trained(
            tmp_path, model, budget_tokens=5 * 24, callbacks=[Keep()], trainer_class=Poisoned,
            args={"max_grad_norm": max_grad_norm},
        )  # fmt: skip
    assert str(refusal.value) == (
        "step 3 (batch 3 of this pass over the data, 72 tokens seen): the gradient is not finite. The weights are still "
        f"those of step 2; checkpoints in {tmp_path / 'run'} are untouched. Start again with a lower learning rate, or look at "
        "the batch."
    )
    assert isinstance(refusal.value, Refusal) and len(after_two) == 2
    assert_equal(values_of(model), after_two[-1])


@pytest.fixture(scope="module")
def students(tmp_path_factory):
    """Folders of donors and students; read only."""
    folder = tmp_path_factory.mktemp("students")
    for model_type in ("llama", "gpt2"):  # gpt2's head is tied to its embedding
        tiny_donor(model_type).save_pretrained(folder / model_type)
        convert_checkpoint(folder / model_type, folder / f"{model_type}-bundle", num_key_value_heads=2, export="bundle")
    convert_checkpoint(folder / "llama", folder / "llama-native", num_key_value_heads=2)
    (folder / "llama-native/LICENSE").write_text("as you like")
    return folder


LOADED_ALONE = """
import json, sys
sys.modules["hf_gqa"] = None
import torch
from transformers import AutoModelForCausalLM, Cache

found = []
for folder in sys.argv[1:]:
    model, loading = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, output_loading_info=True)
    assert not any(loading.values()), loading
    with torch.no_grad():
        output = model.eval()(torch.arange(3, 23).unsqueeze(0))
    kept = any(isinstance(value, Cache) for value in output.values())
    found.append([str(model.dtype), model.config.use_cache, kept, output.logits.float().tolist()])
print(json.dumps(found))
"""


@torch.no_grad()
def logits_of(model) -> torch.Tensor:
    return model.eval()(torch.arange(3, 23).unsqueeze(0)).logits.float()


EXPORTED = [
    (name, dtype) for name in ("llama-native", "llama-bundle", "gpt2-bundle") for dtype in (None, torch.bfloat16)
]


def test_exported_student_is_the_trained_model_without_this_package(students, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))
    models, folders = [], [tmp_path / f"{name}-{dtype}" for name, dtype in EXPORTED]
    for folder, (name, dtype) in zip(folders, EXPORTED, strict=True):
        model = AutoModelForCausalLM.from_pretrained(students / name)
        before = values_of(model)
        options = {"export_dir": folder / "out", "export_dtype": dtype, "source": students / name}
        trained(folder, model, budget_tokens=2 * 24, **options)
        assert not any(torch.equal(tensor, before[key]) for key, tensor in model.named_parameters())
        assert model.dtype == torch.float32 and model.config.use_cache is True  # which Trainer had turned off
        models.append(model.to(dtype).float() if dtype else model)
    found = run_python(LOADED_ALONE, *(folder / "out" for folder in folders))
    for folder, (name, dtype), model, found_alone in zip(folders, EXPORTED, models, found, strict=True):
        dtype_alone, use_cache, kept, logits = found_alone
        assert dtype_alone == str(dtype or torch.float32) and use_cache and kept
        expected, relative = logits_of(model), 2**-5 if dtype else 1e-5
        torch.testing.assert_close(torch.tensor(logits), expected, rtol=0, atol=relative * expected.abs().max().item())
        config = json.loads((folder / "out/config.json").read_text(encoding="utf-8"))
        assert config["use_cache"] is True and config["dtype"] == dtype_alone.removeprefix("torch.")
        state = model.state_dict()
        for key, tensor in load_file(folder / "out/model.safetensors").items():
            assert torch.equal(tensor, state[key].to(dtype or torch.float32)), key
        code = sorted(path.name for path in (students / name).glob("*.py"))
        assert sorted(path.name for path in (folder / "out").glob("*.py")) == code
        assert bool(code) == name.endswith("bundle")


@pytest.mark.usefixtures("warm_verification")
@pytest.mark.parametrize("name", ["llama-bundle", pytest.param("llama-native", marks=pytest.mark.slow)])
def test_manifest_tells_of_uptraining_and_verify_passes(students, name, tmp_path):
    out = tmp_path / "student"
    model = AutoModelForCausalLM.from_pretrained(students / name)  # the callback finds the source by itself
    trained(tmp_path, model, budget_tokens=2 * 24 + 5, export_dir=out)
    manifest, before = Manifest.read(out), Manifest.read(students / name)
    assert before.uptraining is None and manifest.uptraining == {"tokens_seen": 48, "steps": 2}
    assert replace(manifest, uptraining=None) == before
    assert (out / "LICENSE").exists() == (students / name / "LICENSE").exists()
    checks = {check.name: check.passed for check in verify(out, open_donor(students / "llama"))}
    assert checks.pop("equals the donor's merged heads") is None
    assert set(checks.values()) == {True} and len(checks) >= 6


class BadThen(Trainer):
    """Its evaluations give these losses, one after the other."""

    losses = []

    def evaluation_loop(self, *args, **kwargs):
        output = super().evaluation_loop(*args, **kwargs)
        output.metrics["eval_loss"] = self.losses[self.state.global_step - 1]
        return output


@pytest.mark.parametrize(("losses", "best"), [([5, 3, 4, 3], 2), ([1, 2, 3, 4], 1), ([float("nan"), 9, 8, 7], 4)])
def test_best_is_exported(losses, best, tmp_path):
    after = []

    class Keep(TrainerCallback):
        def on_step_end(self, args, state, control, model, **kwargs):
            after.append(values_of(model))

    trainer_class = type("Given", (BadThen,), {"losses": losses})
    trained(
        tmp_path, budget_tokens=4 * 24, export="best", export_dir=tmp_path / "out", callbacks=[Keep()],
        trainer_class=trainer_class, args={"eval_strategy": "steps", "eval_steps": 1},
    )  # fmt: skip
    assert_equal(values_of(AutoModelForCausalLM.from_pretrained(tmp_path / "out")), after[best - 1])


def test_best_without_a_finite_loss_is_the_last(tmp_path):
    trainer_class = type("Given", (BadThen,), {"losses": [float("nan")] * 2})
    trainer = trained(
        tmp_path, budget_tokens=2 * 24, export="best", export_dir=tmp_path / "out", trainer_class=trainer_class,
        args={"eval_strategy": "steps", "eval_steps": 1},
    )  # fmt: skip
    assert_equal(values_of(AutoModelForCausalLM.from_pretrained(tmp_path / "out")), values_of(trainer.model))


def test_overwrite_replaces_the_folder_at_one_stroke(tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "old").write_text("old")
    trained(tmp_path, budget_tokens=24, export_dir=out, overwrite=True)
    assert not (out / "old").exists() and (out / "model.safetensors").is_file()


def test_resumed_run_does_not_export_worse_than_the_best_so_far(tmp_path):
    """The best of before the interruption is known from the checkpoint."""
    options = {"budget_tokens": 4 * 24, "export": "best", "export_dir": tmp_path / "out"}
    options["args"] = {"eval_strategy": "steps", "eval_steps": 1, "save_strategy": "steps", "save_steps": 2}
    first = type("First", (BadThen,), {"losses": [5, 3, 9, 9]})
    trained(tmp_path, trainer_class=first, **options | {"budget_tokens": 2 * 24})
    best = values_of(AutoModelForCausalLM.from_pretrained(tmp_path / "out"))
    resume = str(tmp_path / "run/checkpoint-2")
    trained(tmp_path, trainer_class=first, resume=resume, overwrite=True, **options)
    assert_equal(values_of(AutoModelForCausalLM.from_pretrained(tmp_path / "out")), best)
