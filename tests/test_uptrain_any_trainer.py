"""Whatever a Trainer script does, budget, phases, rates and facts hold, or it is told that they cannot."""

import copy
import json
import logging
import shutil

import pytest
from datasets import Dataset
from transformers import AutoModelForCausalLM, Trainer, TrainerCallback

from hf_gqa import convert, open_donor
from hf_gqa.uptrain.callback import UptrainCallback, batches_of_step, loss_to_compare
from hf_gqa.uptrain.objectives import OBJECTIVES
from hf_gqa.uptrain.phases import Objective, Phase
from hf_gqa.uptrain.trainer import DistillationMixin, UptrainTrainer

from .conformance import DROPOUTS
from .phases import (
    LENGTH,
    MIXED,
    TEXT,
    arguments,
    assert_close,
    data_set,
    losses_of,
    models_of,
    refused,
    rows_of,
    uptrained,
)
from .plain_training import Steps, assert_equal, student_of, trained, values_of
from .tiny_donors import tiny_donor
from .tiny_tokenizer import letter_tokenizer


FORCED = Phase(objective=Objective(attention_output=1.0, teacher_forced=True), train="attention")
KL = Phase(objective=Objective(kl=1.0))


@pytest.fixture
def warnings_of(caplog):
    """What transformers' loggers say; they do not propagate."""
    logger = logging.getLogger("transformers")
    logger.addHandler(caplog.handler)
    yield lambda: [record.message for record in caplog.records if record.levelno >= logging.WARNING]
    logger.removeHandler(caplog.handler)


def test_callback_added_later_is_refused(tmp_path):
    """Nothing would be counted, and the run would go on for ever."""
    trainer = Trainer(model=student_of(), args=arguments(tmp_path), train_dataset=data_set(8))
    trainer.add_callback(UptrainCallback(budget_tokens=24))
    assert "Give it to Trainer in callbacks=[...], not to add_callback." in refused(trainer.train)
    assert trainer.state.global_step == 0


@pytest.mark.parametrize(
    ("phase", "what"),
    [
        (KL, "objective"),
        (Phase(objective=TEXT, learning_rate=0.5), "learning rate"),
        (Phase(objective=TEXT, attention_learning_rate=2.0), "learning rate"),
    ],
)
def test_phase_that_a_plain_trainer_cannot_follow_is_refused(phase, what, tmp_path):
    message = refused(trained, tmp_path, budget_tokens=48, phases=(Phase(objective=TEXT), phase))
    assert message.startswith("phase 2: a callback can neither") and f"its {what} would be passed over" in message


@pytest.mark.parametrize("objective", ["distill", "echo"])
def test_rates_follow_the_tokens_where_the_number_of_steps_is_not_known(objective, tmp_path):
    """Of data that would last for hundreds of steps more."""
    rates, phases = {}, OBJECTIVES.get(objective)
    for known in (True, False):
        student, donor = models_of()
        steps = Steps()
        options = {} if known else {"tokens_per_step": None}
        trainer = uptrained(tmp_path, student, donor, phases, 12, rows=rows_of(400), callbacks=[steps], **options)
        assert trainer.state.global_step == 12 and (trainer.state.max_steps == 12) == known
        rates[known] = steps.rates
    assert rates[False][1:] == pytest.approx(rates[True][1:], rel=1e-6)
    assert rates[False][0] < rates[True][0]


def test_steps_of_other_sizes_than_said_are_refused(tmp_path):
    message = refused(trained, tmp_path, budget_tokens=200, tokens_per_step=20)
    assert message.startswith("tokens_per_step = 20, but the first step had 24 (rows x their length x")


def test_what_is_said_to_be_seen_was_seen(tmp_path):
    """The next step is taken to be as large as the last; here it is ten times that."""
    rows = [row for length in (2, 20, 2) for row in data_set(2, length)]
    order = {"train_sampling_strategy": "sequential", "num_train_epochs": 1}
    trainer = trained(tmp_path, rows=rows, budget_tokens=9, args=order)
    assert trainer.state.num_input_tokens_seen == 4 + 40
    losses = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1]["tokens_seen"] == 44 and losses[-1]["budget_fraction_used"] == pytest.approx(44 / 9)


def test_data_that_end_before_the_budget_are_told_of(tmp_path, warnings_of):
    args = {"num_train_epochs": 1}
    trained(tmp_path, num_rows=4, budget_tokens=10 * 24, args=args)
    assert any(said.startswith("Trained on 48 of 240 tokens: the data, max_steps or another") for said in warnings_of())


def test_budget_that_is_spent_is_told_of_by_nobody(tmp_path, warnings_of):
    trained(tmp_path, budget_tokens=3 * 24 + 5)
    assert not [said for said in warnings_of() if said.startswith("Trained on")]


def test_each_of_several_evaluation_sets_has_its_facts(tmp_path):
    student, donor = models_of()
    sets = {"stories": rows_of(3, seed=4), "code": rows_of(2, seed=5)}
    args = {"eval_strategy": "steps", "eval_steps": 2}
    trainer = uptrained(tmp_path, student, donor, (KL,), eval_rows=sets, args=args)
    for name, rows in sets.items():
        entries = [entry for entry in trainer.state.log_history if f"eval_{name}_loss" in entry]
        gap = [entry[f"eval_{name}_gap_nats_per_token"] for entry in entries]
        closed = [entry.get(f"eval_{name}_gap_closed_fraction") for entry in entries]
        assert closed == ([0, pytest.approx(1 - gap[1] / gap[0])] if gap[0] > 0 else [None, None])
        alone = trainer.evaluate(rows)
        for fact in ("loss", "teacher_loss", "kl_nats_per_token", "top1_agreement_fraction"):
            assert entries[1][f"eval_{name}_{fact}"] == pytest.approx(alone[f"eval_{fact}"], rel=1e-6)


class Given(Trainer):
    """Its evaluations give these losses, one after the other."""

    losses = {"eval_code": [5, 3, 4, 6], "eval_stories": [1, 2, 3, 4]}

    def evaluation_loop(self, *args, metric_key_prefix: str, **kwargs):
        output = super().evaluation_loop(*args, metric_key_prefix=metric_key_prefix, **kwargs)
        output.metrics[f"{metric_key_prefix}_loss"] = self.losses[metric_key_prefix][self.state.global_step - 1]
        return output


@pytest.mark.parametrize(("named", "best"), [("eval_code_loss", 2), ("code_loss", 2), ("stories_loss", 1), (None, 4)])
def test_best_of_several_evaluation_sets_is_that_of_the_one_named(named, best, tmp_path, warnings_of):
    after = []

    class Keep(TrainerCallback):
        def on_step_end(self, args, state, control, model, **kwargs):
            after.append(values_of(model))

    uptrain = UptrainCallback(budget_tokens=4 * 2 * LENGTH, export="best", export_dir=tmp_path / "out")
    args = arguments(tmp_path, eval_strategy="steps", eval_steps=1, metric_for_best_model=named)
    sets = {"code": data_set(2, seed=5), "stories": data_set(2, seed=4)}
    Given(student_of(), args, train_dataset=data_set(8), eval_dataset=sets, callbacks=[uptrain, Keep()]).train()
    assert_equal(values_of(AutoModelForCausalLM.from_pretrained(tmp_path / "out")), after[best - 1])
    told = [said for said in warnings_of() if "no evaluation gave eval_loss. The last student is written." in said]
    assert bool(told) == (named is None)


@pytest.mark.parametrize(
    ("named", "loss"),
    [(None, "eval_loss"), ("loss", "eval_loss"), ("a_loss", "eval_a_loss"), ("accuracy", "eval_loss")],
)
def test_loss_that_is_compared(named, loss, tmp_path):
    assert loss_to_compare(arguments(tmp_path, metric_for_best_model=named)) == loss


def test_cache_is_used_again_after_training(tmp_path):
    trainer = trained(tmp_path, budget_tokens=24)
    assert trainer.model.config.use_cache is True
    trainer.save_model(str(tmp_path / "saved"))
    assert json.loads((tmp_path / "saved/config.json").read_text())["use_cache"] is True


@pytest.mark.parametrize(
    ("accumulated", "batches", "step", "words"),
    [
        (1, 4, 2, "batch 3 of this pass over the data"),
        (1, 4, 9, "batch 2 of this pass over the data"),
        (2, 4, 3, "batches 3 to 4 of this pass over the data"),
        (2, 5, 5, "batch 5 of this pass over the data"),
        (3, None, 2, "batches 7 to 9"),
    ],
)
def test_batches_of_a_step(accumulated, batches, step, words, tmp_path):
    args = arguments(tmp_path, gradient_accumulation_steps=accumulated)
    assert batches_of_step(args, step, None if batches is None else [None] * batches) == words


@pytest.mark.parametrize("change", ["data", "number of rows", "phases"])
def test_resuming_a_script_with_something_else_is_refused(change, tmp_path):
    args = {"save_strategy": "steps", "save_steps": 2}
    student, donor = models_of()
    uptrained(tmp_path, student, donor, (KL,), 2, args=args)
    rows = {"data": rows_of(seed=9), "number of rows": rows_of(5)}.get(change, rows_of())
    phases = (Phase(objective=MIXED),) if change == "phases" else (KL,)
    student, donor = models_of()
    message = refused(uptrained, tmp_path, student, donor, phases, 4, rows=rows, args=args, resume=True)
    assert (
        "resuming with another plan or data: " in message and ("phases" if change == "phases" else "data.") in message
    )
    trainer = uptrained(tmp_path, *models_of(), (KL,), 4, args=args, resume=True)
    assert trainer.state.global_step == 4  # with more tokens of the same


def test_teacher_that_reads_other_tokens_is_refused(tmp_path):
    donor, tokenizer = tiny_donor("llama"), letter_tokenizer()
    donor.save_pretrained(tmp_path / "donor")
    tokenizer.save_pretrained(tmp_path / "donor")
    file = tmp_path / "donor/tokenizer.json"
    read = json.loads(file.read_text())
    vocabulary = read["model"]["vocab"]
    one, other = [token for token in vocabulary if len(token) == 1][:2]
    vocabulary[one], vocabulary[other] = vocabulary[other], vocabulary[one]
    options = {"train_dataset": rows_of(), "processing_class": tokenizer, "teacher": tmp_path / "donor"}

    def make():
        uptrain = UptrainCallback(budget_tokens=48)
        return UptrainTrainer(student_of(), arguments(tmp_path), uptrain=uptrain, **options)

    make()
    file.write_text(json.dumps(read))
    assert refused(make).startswith("teacher donor: its tokenizer is not the student's (they differ on ")


def test_dropout_is_off_where_attention_is_matched(tmp_path):
    """A student that is its teacher has nothing to learn there; behind the whole model dropout stays what it is."""
    donor = tiny_donor("gpt2", **dict.fromkeys(DROPOUTS, 0.3))
    trainer = uptrained(tmp_path, copy.deepcopy(donor), donor, (FORCED, KL))
    matched, distilled = losses_of(trainer)[:2], losses_of(trainer)[2:]
    assert max(matched) < 1e-10 < 1e-2 < min(distilled)
    assert all(module.training for module in trainer.model.modules())


@pytest.mark.parametrize("given", [{"model": "folder"}, {"model_init": student_of}, {"model": None}])
def test_model_that_is_not_there_yet_is_refused(given, tmp_path):
    options = {"uptrain": UptrainCallback(budget_tokens=48), "args": arguments(tmp_path), "train_dataset": rows_of()}
    assert "is no model in memory" in refused(UptrainTrainer, **given, **options)


def test_stream_needs_no_max_steps(tmp_path):
    stream = Dataset.from_list([{name: values.tolist() for name, values in row.items()} for row in rows_of(8)])
    student, donor = models_of()
    trainer = uptrained(tmp_path, student, donor, (KL,), 2, rows=stream.to_iterable_dataset())
    assert trainer.state.global_step == trainer.args.max_steps == 2


@pytest.mark.parametrize("phase", [FORCED, Phase(objective=MIXED)], ids=["forced", "mixed"])
@pytest.mark.parametrize("offloaded", ["model.layers.1", "model.embed_tokens"])
def test_teacher_that_is_spread_teaches_the_same(phase, offloaded, tmp_path):
    """Here over the CPU and the disk, which a device map can do without accelerators too."""
    donor = tiny_donor("llama")
    donor.save_pretrained(tmp_path / "donor")
    places = dict.fromkeys(("model.embed_tokens", "model.layers.0", "model.layers.1", "model.norm", "lm_head"), "cpu")
    places |= {"model.rotary_emb": "cpu", offloaded: "disk"}
    spread = type(donor).from_pretrained(tmp_path / "donor", device_map=places, offload_folder=tmp_path / "offloaded")
    found = []
    for teacher in (donor, spread):
        student = convert(donor, num_key_value_heads=2)
        trainer = uptrained(tmp_path, student, teacher, (phase,))
        found.append((losses_of(trainer), values_of(student)))
    assert found[0][0] == pytest.approx(found[1][0], rel=1e-6)
    assert_equal(found[0][1], found[1][1])


TEXTS = ["the cat sat on the mat and saw a rat ", "a dog ran to the old red barn "]


@pytest.mark.filterwarnings("ignore")  # of what it calls by older names
@pytest.mark.parametrize("objective", ["distill", "cross_entropy"])
def test_trainers_of_trl(objective, tmp_path):
    """The real SFTTrainer, with texts as they are: distilled by the mixin, and with the callback alone."""
    trl = pytest.importorskip("trl")
    donor, tokenizer = tiny_donor("llama"), letter_tokenizer()
    tokenizer.eos_token = tokenizer.pad_token = "<s>"
    donor.save_pretrained(tmp_path / "donor")
    tokenizer.save_pretrained(tmp_path / "donor")
    data = Dataset.from_list([{"text": text * 3} for text in TEXTS * 16])
    args = {"per_device_train_batch_size": 2, "max_length": LENGTH, "use_cpu": True, "report_to": "none", "bf16": False}
    args |= {"logging_steps": 1, "disable_tqdm": True, "save_strategy": "no", "learning_rate": 1e-3}
    made = {"train_dataset": data, "eval_dataset": data.select(range(4)), "processing_class": tokenizer}
    distilled = type("Distilled", (DistillationMixin, trl.SFTTrainer), {})
    trainer = distilled(
        model=student_of(),
        args=trl.SFTConfig(str(tmp_path / "run"), eval_strategy="steps", eval_steps=4, **args),
        teacher=open_donor(tmp_path / "donor"),
        uptrain=UptrainCallback(
            budget_tokens=8 * 2 * LENGTH, phases=OBJECTIVES.get(objective), export_dir=tmp_path / "student"
        ),
        **made,
    )
    trainer.train()
    assert (trainer.state.global_step, trainer.state.num_input_tokens_seen) == (8, 8 * 2 * LENGTH)
    evaluated = [entry for entry in trainer.state.log_history if "eval_loss" in entry]
    assert len(evaluated) == 2 and all("eval_kl_nats_per_token" in entry for entry in evaluated)
    assert (tmp_path / "student/model.safetensors").is_file()
    plain = trl.SFTTrainer(
        student_of(),
        trl.SFTConfig(str(tmp_path / "plain"), **args),
        callbacks=[UptrainCallback(budget_tokens=50)],
        **made,
    )
    plain.train()
    assert plain.state.num_input_tokens_seen == 2 * 2 * LENGTH


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("gcc") is None, reason="torch compiles for a CPU with a C compiler")
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("phases", [(FORCED, KL), (Phase(objective=MIXED),)], ids=["distill", "mixed"])
def test_compiled_student_learns_the_same(phases, tmp_path):
    found = []
    for compiled in (False, True):
        student, donor = models_of()
        trainer = uptrained(tmp_path, student, donor, phases, args={"torch_compile": compiled})
        found.append((losses_of(trainer), values_of(student)))
    assert found[1][0] == pytest.approx(found[0][0], rel=1e-5)
    assert_close(found[1][1], found[0][1], atol=1e-5)
