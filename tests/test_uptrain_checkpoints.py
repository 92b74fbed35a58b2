"""Checkpoints are complete or not there; what is torn is skipped with its reason; a resumed run equals one that never stopped."""

import json
import os
import random
import re
import resource
import shutil
import signal
import time
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch
from safetensors.torch import load_file
from transformers import Trainer, TrainerState, TrainingArguments

from hf_gqa.refusal import Refusal
from hf_gqa.staging import file_sha256
from hf_gqa.uptrain import checkpoints
from hf_gqa.uptrain.checkpoints import RECORD_FILE, CheckpointScan, CompleteCheckpointsMixin, newest_complete
from tests.tiny_donors import tiny_donor, tokens_and_mask
from tests.warm_process import warm_processes


STEPS, LAST = 4, "checkpoint-4"
FACTS = {"plan": {"num_key_value_heads": 2, "method": "mean_pool"}, "data": "sha256:12"}
WEIGHTS, OPTIMIZER, STATE = "model.safetensors", "optimizer.pt", "trainer_state.json"
SAVED = {WEIGHTS, OPTIMIZER, STATE, "config.json", "generation_config.json", "scheduler.pt", "rng_state.pth"}
SAVED |= {"training_args.bin"}


class Uptrainer(CompleteCheckpointsMixin, Trainer):
    """The smallest use of the mixin."""

    facts = FACTS

    def checkpoint_facts(self) -> dict:
        return self.facts


def trainer_in(output_dir: Path, trainer_class=Uptrainer, callbacks=(), **changes) -> Trainer:
    """A tiny Llama whose dropout draws random numbers, so that a lost random state shows."""
    torch.manual_seed(0)
    options = {"save_steps": 1, "per_device_train_batch_size": 2, "learning_rate": 1e-2, "logging_strategy": "no"}
    options |= {"use_cpu": True, "report_to": [], "disable_tqdm": True, "max_steps": STEPS}
    rows = [{"input_ids": row, "labels": row} for row in tokens_and_mask(batch=16, length=12)[0]]
    arguments = TrainingArguments(str(output_dir), **options | changes)
    model = tiny_donor("llama", attention_dropout=0.2)
    return trainer_class(model, arguments, train_dataset=rows, callbacks=list(callbacks))


def equal(one, other) -> bool:
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(equal(one[key], other[key]) for key in one)
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(equal, one, other))
    return torch.equal(one, other) if isinstance(one, torch.Tensor) else one == other


def state_in(folder: Path) -> dict:
    """Parameters, optimizer and schedule of a checkpoint."""
    saved = {name: torch.load(folder / f"{name}.pt", weights_only=True) for name in ("optimizer", "scheduler")}
    return saved | {"parameters": load_file(folder / WEIGHTS)}


def read_record(folder: Path) -> dict:
    return json.loads((folder / RECORD_FILE).read_text())


def names_in(folder: Path) -> set[str]:
    return {path.name for path in folder.glob("*")}


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    """The run that nothing interrupted: a checkpoint of each step."""
    output = tmp_path_factory.mktemp("whole")
    trainer_in(output).train()
    assert names_in(output) == {f"checkpoint-{step}" for step in range(1, STEPS + 1)}
    return output


@pytest.fixture
def run(tmp_path, whole) -> Path:
    """A copy of its checkpoints 2 and 3."""
    for step in (2, 3):
        shutil.copytree(whole / f"checkpoint-{step}", tmp_path / f"run/checkpoint-{step}")
    return tmp_path / "run"


def assert_whole(output: Path, whole: Path, alone: bool = False) -> None:
    assert newest_complete(output).newest == output / LAST and (names_in(output) == {LAST} or not alone)
    assert equal(state_in(output / LAST), state_in(whole / LAST))


def test_record_says_what_the_checkpoint_consists_of(whole):
    record = read_record(whole / "checkpoint-2")
    assert (record["format"], record["global_step"], record["facts"]) == (1, 2, FACTS)
    assert set(record["files"]) == names_in(whole / "checkpoint-2") - {RECORD_FILE} == SAVED
    for name, recorded in record["files"].items():
        path = whole / "checkpoint-2" / name
        assert recorded == {"bytes": path.stat().st_size, "sha256": file_sha256(path)}
    assert newest_complete(whole) == CheckpointScan(whole / LAST, FACTS, ())


def test_the_record_covers_sub_folders_and_is_written_after_everything_is_on_disk(run, monkeypatch):
    os.makedirs(run / "checkpoint-3/shards")
    (run / "checkpoint-3/shards/0.pt").write_bytes(b"12")
    flushed, replace, flush = [], os.replace, checkpoints.flush
    for module in ("uptrain.checkpoints", "staging"):
        monkeypatch.setattr(f"hf_gqa.{module}.flush", lambda path: (flushed.append(path.name), flush(path)))
    monkeypatch.setattr(os, "replace", lambda a, b: (flushed.append("renamed"), replace(a, b)))
    checkpoints.write_record(run / "checkpoint-3", {"plan": "b"})
    before, after = flushed[: flushed.index("renamed")], flushed[flushed.index("renamed") + 1 :]
    assert set(before) == {*SAVED, "shards", "0.pt", "checkpoint-3", f".{RECORD_FILE}.partial"}
    assert before[-1] == f".{RECORD_FILE}.partial" and after == ["checkpoint-3", "run"]
    assert read_record(run / "checkpoint-3")["files"].keys() == {*SAVED, "shards/0.pt"}
    assert newest_complete(run) == CheckpointScan(run / "checkpoint-3", {"plan": "b"}, ())


def flip_a_bit(folder: Path) -> None:
    data = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).write_bytes(data[:-1] + bytes([data[-1] ^ 1]))


def change_record(folder: Path, **changes) -> None:
    (folder / RECORD_FILE).write_text(json.dumps(read_record(folder) | changes))


UNFINISHED, UNREADABLE = "no record: the save did not finish", f"{RECORD_FILE}: cannot be read"
FILE, NO_OPTIMIZER = {"bytes": 12, "sha256": ""}, r"no state of the optimizer was saved \(save_only_model\)"
DAMAGES = [
    (lambda folder: os.truncate(folder / WEIGHTS, 1024), rf"{WEIGHTS}: 1,024 bytes, recorded \d\d,\d\d\d"),
    (lambda folder: (folder / OPTIMIZER).unlink(), f"{OPTIMIZER}: missing"),
    (lambda folder: (folder / STATE).unlink(), f"{STATE}: missing"),
    (flip_a_bit, rf"{WEIGHTS}: the bytes are not those recorded \(sha256\)"),
    (lambda folder: [path.unlink() for path in folder.iterdir()], UNFINISHED),
    (lambda folder: (folder / RECORD_FILE).unlink(), UNFINISHED),
    (lambda folder: change_record(folder, format=2), f"{RECORD_FILE}: format 2, this version reads 1"),
    (lambda folder: change_record(folder, global_step=9), f"{RECORD_FILE}: of step 9"),
    (lambda folder: os.truncate(folder / RECORD_FILE, 99), UNREADABLE),
    (lambda folder: (folder / RECORD_FILE).write_bytes(b"\xff\xfe\x00"), UNREADABLE),
    (lambda folder: (folder / RECORD_FILE).write_text("[" * 10**5), UNREADABLE),
    (lambda folder: change_record(folder, files=None), UNREADABLE),
    (lambda folder: change_record(folder, files={OPTIMIZER: 12}), UNREADABLE),
    (lambda folder: change_record(folder, files={OPTIMIZER: FILE}), f"{STATE}: missing, and not recorded"),
    (lambda folder: change_record(folder, files={STATE: FILE}), NO_OPTIMIZER),
]


@pytest.mark.parametrize(("damage", "reason"), DAMAGES, ids=range(len(DAMAGES)))
def test_damaged_checkpoint_is_skipped_with_its_reason_and_refused_when_asked_for(run, damage, reason):
    damage(run / "checkpoint-3")
    scan = newest_complete(run)
    assert (scan.newest, scan.facts) == (run / "checkpoint-2", FACTS)
    ((name, found),) = scan.skipped
    assert name == "checkpoint-3" and re.fullmatch(reason, found)
    with pytest.raises(Refusal) as refusal:
        trainer_in(run).train(resume_from_checkpoint=str(run / "checkpoint-3"))
    assert str(refusal.value) == (
        f"{run}/checkpoint-3: cannot be resumed, {found}. "
        "Give a complete checkpoint, or resume_from_checkpoint=True for the newest of them."
    )


def test_what_is_no_checkpoint_is_ignored_and_steps_are_compared_as_numbers(run):
    change_record((run / "checkpoint-3").rename(run / "checkpoint-12"), global_step=12)
    (run / "checkpoint-12/notes.txt").write_text("mine")
    (run / "checkpoint-20.old").mkdir()
    (run / "checkpoint-30").write_text("a file")
    assert newest_complete(run) == CheckpointScan(run / "checkpoint-12", FACTS, ())
    assert newest_complete(run / "nowhere") == CheckpointScan(None, None, ())


def test_resumed_run_says_what_it_skipped(run, whole, caplog):
    (run / "checkpoint-3" / OPTIMIZER).unlink()
    (run / "checkpoint-5").mkdir()
    trainer_in(run, save_total_limit=1).train(resume_from_checkpoint=True)
    skipped = f"checkpoint-5: {UNFINISHED}; checkpoint-3: {OPTIMIZER}: missing"
    assert caplog.messages == [f"Resuming from {run}/checkpoint-2. Not complete and skipped: {skipped}."]
    assert_whole(run, whole, alone=True)


@pytest.mark.parametrize("step", range(1, STEPS + 1))
def test_k_steps_and_the_others_equal_all_steps(tmp_path, whole, step):
    shutil.copytree(whole / f"checkpoint-{step}", tmp_path / f"mine-{step}")  # under any name
    trainer = trainer_in(tmp_path / "run")
    trainer.train(resume_from_checkpoint=tmp_path / f"mine-{step}")
    saved, last = {path.name for path in tmp_path.glob("run/*")}, state_in(whole / LAST)
    assert saved == {f"checkpoint-{later}" for later in range(step + 1, STEPS + 1)}
    assert step == STEPS or equal(state_in(tmp_path / "run" / LAST), last)
    assert equal(dict(trainer.model.state_dict()), last["parameters"])
    assert equal(trainer.optimizer.state_dict(), last["optimizer"])


def test_nothing_to_resume_is_refused(tmp_path):
    trainer = trainer_in(tmp_path)
    with pytest.raises(Refusal, match=r": holds no complete checkpoint\. Train without resume_from_checkpoint\.$"):
        trainer.train(resume_from_checkpoint=True)
    with pytest.raises(Refusal, match=r"/nowhere: cannot be resumed, no such folder\. Give a complete checkpoint"):
        trainer.train(resume_from_checkpoint=str(tmp_path / "nowhere"))
    (tmp_path / "checkpoint-2").mkdir()
    with pytest.raises(Refusal, match=rf"no complete checkpoint: checkpoint-2: {UNFINISHED}\. Train without"):
        trainer.train(resume_from_checkpoint=True)


def test_another_run_is_not_resumed(run):
    trainer = trainer_in(run)
    trainer.facts = {**FACTS, "plan": {"num_key_value_heads": 1, "method": "mean_pool"}, "teacher": "x/y"}
    with pytest.raises(Refusal) as refusal:
        trainer.train(resume_from_checkpoint=True)
    assert str(refusal.value) == (
        f"{run}/checkpoint-3: resuming with another plan or data: plan.num_key_value_heads was 2 when it was saved and is "
        '1 now; teacher was absent when it was saved and is "x/y" now. '
        "Resume with what it was saved with, or train into another output_dir."
    )


def test_facts_are_json(tmp_path):
    scan = CheckpointScan(Path("checkpoint-1"), {"rows": [1, 2], "by": {"1": None}}, ())
    checkpoints.check_same_run(scan, {"rows": (1, 2), "by": {1: None}})
    checkpoints.check_same_run(CheckpointScan(None, None, ()), {"rows": 3})
    with pytest.raises(Refusal, match=r": rows was \[1, 2\] when it was saved and is \[1, 3\] now\. Resume"):
        checkpoints.check_same_run(scan, {"rows": [1, 3], "by": {1: None}})
    trainer = trainer_in(tmp_path)
    trainer.facts = {"plan": {1, 2}}
    with pytest.raises(TypeError, match="set is not JSON serializable"):
        trainer.train()
    assert trainer.state.global_step == 0  # and not at the first save


NO_SPACE = OSError(28, "No space left on device")


class Killed(BaseException):
    """Nothing but a `finally` runs after it."""


def tear(folder, **options):
    if Path(folder).exists():
        (Path(folder) / OPTIMIZER).unlink()
        raise Killed


def at_third_step(patch, trainer: Trainer, owner, name: str, act) -> None:
    original = getattr(owner, name)

    def replacement(*args, **kwargs):
        return (act if trainer.state.global_step == 3 else original)(*args, **kwargs)

    patch.setattr(owner, name, replacement)


MOMENTS = {
    "before the weights": (Trainer, "save_model", Mock(side_effect=Killed), 2),
    "before the state": (TrainerState, "save_to_json", Mock(side_effect=Killed), 2),
    "before the record": (checkpoints, "write_record", Mock(side_effect=Killed), 2),
    "while hashing": (checkpoints, "file_sha256", Mock(side_effect=Killed), 2),
    "before the rename": (os, "replace", Mock(side_effect=Killed), 2),
    "before the rotation": (checkpoints, "_rotate", Mock(side_effect=Killed), 3),
    "in the rotation": (shutil, "rmtree", tear, 3),
}


@pytest.mark.parametrize("moment", MOMENTS)
def test_there_is_always_a_complete_checkpoint(tmp_path, whole, monkeypatch, moment):
    owner, name, act, newest = MOMENTS[moment]
    trainer = trainer_in(tmp_path, save_total_limit=1)
    with monkeypatch.context() as patch, pytest.raises(Killed):
        at_third_step(patch, trainer, owner, name, act)
        trainer.train()
    assert newest_complete(tmp_path).newest == tmp_path / f"checkpoint-{newest}"
    trainer_in(tmp_path, save_total_limit=1).train(resume_from_checkpoint=True)
    assert_whole(tmp_path, whole, alone=True)
    arguments = torch.load(tmp_path / LAST / "training_args.bin", weights_only=False)
    assert arguments.save_total_limit == trainer.args.save_total_limit == 1


def test_earlier_save_of_the_same_step_is_kept_until_the_new_one_is_complete(run, whole, monkeypatch):
    shutil.rmtree(run / "checkpoint-2")
    trainer = trainer_in(run, save_total_limit=1)
    for error, shown in ((NO_SPACE, "could not be saved"), (RuntimeError("a defect"), "^a defect$"), (Killed(), None)):
        assert newest_complete(run).newest == run / "checkpoint-3" and names_in(run) == {"checkpoint-3"}
        with monkeypatch.context() as patch, pytest.raises(type(error), match=shown):
            at_third_step(patch, trainer, checkpoints, "write_record", Mock(side_effect=error))
            trainer.train(resume_from_checkpoint=whole / "checkpoint-2")
    aside = CheckpointScan(run / "_replaced-checkpoint-3", FACTS, (("checkpoint-3", UNFINISHED),))
    assert newest_complete(run) == aside
    trainer_in(run, save_total_limit=1).train(resume_from_checkpoint=True)
    assert_whole(run, whole, alone=True)


def test_saving_over_a_torn_checkpoint_keeps_nothing_of_it(tmp_path, whole):
    (tmp_path / "checkpoint-3/old").mkdir(parents=True)
    for name in ("model-00001-of-00002.safetensors", f".{RECORD_FILE}.partial", "old/optimizer.bin"):
        (tmp_path / "checkpoint-3" / name).write_text("torn")
    trainer_in(tmp_path).train()
    assert names_in(tmp_path / "checkpoint-3") == {*SAVED, RECORD_FILE}
    assert_whole(tmp_path, whole)


@pytest.mark.parametrize("first", [False, True])
def test_failed_save_leaves_the_earlier_checkpoint_and_says_how_to_go_on(tmp_path, monkeypatch, first):
    trainer = trainer_in(tmp_path, save_total_limit=1, save_steps=3 if first else 1)
    at_third_step(monkeypatch, trainer, Trainer, "_save_rng_state", Mock(side_effect=NO_SPACE))
    with pytest.raises(OSError) as failure:
        trainer.train()
    kept = "There is no" if first else "The newest"
    kept += " complete checkpoint." if first else f" complete checkpoint is {tmp_path}/checkpoint-2."
    go_on = "train again without resume_from_checkpoint." if first else "go on with resume_from_checkpoint=True."
    assert re.sub(r"[\d,]+ bytes", "N bytes", str(failure.value)) == (
        f"{tmp_path}/checkpoint-3: step 3 could not be saved: [Errno 28] No space left on device (N bytes are free). "
        f"Nothing of it was left behind. {kept} Make room or mend what failed, then {go_on}"
    )
    assert names_in(tmp_path) == (set() if first else {"checkpoint-2"}) and trainer.args.save_total_limit == 1


@pytest.mark.parametrize(("limit", "removed"), [(None, ""), (0, ""), (1, "259"), (2, "259"), (3, "59"), (4, "5")])
def test_rotation_prefers_what_is_recorded(tmp_path, limit, removed):
    """Saved: 4. Best: 1. Torn, left by a killed run: 5 and 9, which a rotation by number would keep."""
    for step in "12459":
        (tmp_path / f"checkpoint-{step}").mkdir()
        if step < "5":
            checkpoints.write_record(tmp_path / f"checkpoint-{step}", {})
    checkpoints._rotate(tmp_path, tmp_path / "checkpoint-4", limit, "elsewhere/checkpoint-1")
    assert names_in(tmp_path) == {f"checkpoint-{step}" for step in "12459" if step not in removed}


def test_callback_records_the_checkpoints_of_any_trainer(tmp_path, whole):
    trainer_in(tmp_path, Trainer, callbacks=[checkpoints.CompleteCheckpoints(FACTS)]).train()
    assert_whole(tmp_path, whole)
    assert newest_complete(tmp_path).facts == FACTS


def train_or_say(folder: Path, limit_bytes: int | None) -> None:
    """Train or resume; what failed is then in a file beside the folder. From the third save on no file may exceed the limit."""
    torch.set_num_threads(1)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
    trainer = trainer_in(folder, save_total_limit=1)
    if limit_bytes:
        limits = resource.RLIMIT_FSIZE, (limit_bytes, resource.RLIM_INFINITY)
        at_third_step(pytest.MonkeyPatch(), trainer, checkpoints, "_set_aside", lambda _: resource.setrlimit(*limits))
    try:
        trainer.train(resume_from_checkpoint=newest_complete(folder).newest is not None)
    except OSError as error:
        folder.with_suffix(".txt").write_text(str(error))
        os._exit(3)


@pytest.fixture(scope="module")
def in_a_process():
    """Runs `train_or_say` in a fork of a process that has imported all; kills it after some seconds, or `in_save`."""

    def run(folder: Path, limit_bytes: int | None = None, seconds: float = 60, in_save: bool = False) -> int:
        process = warm_processes().Process(target=train_or_say, args=(folder, limit_bytes))
        process.start()
        while in_save and process.is_alive() and len(names_in(folder)) < 2:
            time.sleep(0.001)
        process.join(0 if in_save else seconds)
        process.kill()
        process.join()
        return process.exitcode

    return run


@pytest.mark.parametrize(("limit_bytes", "why"), [(50_000, "File too large"), (150_000, "inline_container")])
def test_full_disk_is_one_message_and_the_run_goes_on(in_a_process, tmp_path, whole, limit_bytes, why):
    """Too little for the weights, of which safetensors complains; enough for them, too little for torch's optimizer."""
    run = tmp_path / "run"
    assert in_a_process(run, limit_bytes) == 3
    message = (tmp_path / "run.txt").read_text()
    assert message.startswith(f"{run}/checkpoint-3: step 3 could not be saved: ") and why in message
    assert f"The newest complete checkpoint is {run}/checkpoint-2. Make room" in message and "\n" not in message
    assert names_in(run) == {"checkpoint-2"}
    assert in_a_process(run) == 0
    assert_whole(run, whole)


@pytest.mark.parametrize(("runs", "kills"), [(1, 3), pytest.param(5, 3, marks=pytest.mark.slow)])
def test_killed_runs_resume_to_the_whole_one(in_a_process, tmp_path, whole, runs, kills):
    in_a_process(tmp_path / "imported")
    begun, draw, torn = time.monotonic(), random.Random(runs), in_a_process(tmp_path / "timed")
    run_seconds = time.monotonic() - begun
    for folder, step in [(tmp_path / str(number), 0) for number in range(runs)]:
        for kill in range(kills + 1):
            seconds = draw.uniform(0.2, 0.9) * run_seconds if kill < kills else 60
            code = in_a_process(folder, seconds=seconds, in_save=kill == 0)
            earlier, step = step, checkpoints._step_of(newest_complete(folder).newest or Path("checkpoint-0"))
            assert step >= earlier and code in (0, -signal.SIGKILL), "a complete checkpoint was lost"
            torn += code != 0 and len(names_in(folder)) > 1
        assert_whole(folder, whole)
        last_rotated = earlier < STEPS  # else a kill hit the last rotation, and maybe earlier ones
        assert code == 0 and names_in(folder) <= ({LAST} if last_rotated else {f"checkpoint-{n}" for n in "1234"})
    assert torn or runs == 1, "no kill hit a save"
