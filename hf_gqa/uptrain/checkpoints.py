"""Checkpoints of a training run that are complete or not there: a record written last, and a resume that believes nothing else.

Trainer resumes from the highest checkpoint number, whatever is in it, and goes on with a fresh optimizer where the optimizer's file is
missing; with `save_total_limit` it removes the old checkpoint before anything has looked at the new one.
"""

import json
import os
import re
import shutil
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list
from safetensors import SafetensorError
from transformers import TrainerCallback
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
from transformers.utils import logging

from ..reading import read_json
from ..refusal import Refusal
from ..staging import file_sha256, flush, publish_file


logger = logging.get_logger(__name__)
RECORD_FILE = "checkpoint_record.json"
RECORD_FORMAT = 1
UNFINISHED_RECORD = f".{RECORD_FILE}.partial"
STATE_FILE, ARGUMENTS_FILE = "trainer_state.json", "training_args.bin"
REPLACED = (
    "_replaced-"  # Trainer pushes nothing that begins with an underscore and rotates only what begins with checkpoint-
)
FOLDER_NAME = re.compile(rf"({REPLACED})?{PREFIX_CHECKPOINT_DIR}-(\d+)")
TORCH_WRITER = ("inline_container", "PytorchStreamWriter")  # what the RuntimeError of a failed torch.save names


class _Incomplete(Exception):
    """Why a folder is no complete checkpoint."""


@dataclass(frozen=True, slots=True)
class CheckpointScan:
    """What was found in a folder of checkpoints.

    Args:
        newest: the complete checkpoint of the highest step; None if there is none.
        facts: what the run that saved it said of itself.
        skipped: (name, reason) of each newer folder that is not complete.
    """

    newest: Path | None
    facts: dict | None
    skipped: tuple[tuple[str, str], ...]

    def reasons(self) -> str:
        return "; ".join(f"{name}: {reason}" for name, reason in self.skipped)


def write_record(folder: Path, facts: dict) -> None:
    """Flush a checkpoint to disk and write, last of all, what it consists of: from then on it is complete.

    Args:
        folder: the checkpoint, `checkpoint-<global step>`.
        facts: JSON of the caller that a run which resumes must agree with, such as the plan or a fingerprint of the data.

    Raises:
        OSError: the disk did not take it.
    """
    folder = Path(folder)
    step = _step_of(folder)
    assert step is not None, f"{folder} is not named after a step"
    (folder / RECORD_FILE).unlink(missing_ok=True)
    (folder / UNFINISHED_RECORD).unlink(missing_ok=True)
    paths = sorted(folder.rglob("*"))
    for path in [*paths, folder]:
        flush(path)
    files = {
        path.relative_to(folder).as_posix(): {"bytes": path.stat().st_size, "sha256": file_sha256(path)}
        for path in paths
        if path.is_file()
    }
    record = {"format": RECORD_FORMAT, "global_step": step, "files": files, "facts": facts}
    unfinished = folder / UNFINISHED_RECORD
    unfinished.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    publish_file(unfinished, folder / RECORD_FILE)
    flush(folder.parent)


def newest_complete(output_dir: str | Path) -> CheckpointScan:
    """The checkpoint of the highest step of which every recorded file has its recorded size and bytes.

    Files are hashed, never unpickled. Files that the record does not know are ignored.
    """
    return _scan(_checkpoints(Path(output_dir)))


def check_same_run(scan: CheckpointScan, facts: dict) -> None:
    """Refuse to resume a checkpoint that a run with other facts saved.

    Args:
        facts: those of the run that wants to resume; compared as the JSON that they are recorded as.

    Raises:
        Refusal: naming each fact that differs, and both values.
    """
    if scan.newest is None:
        return
    differing = list(_differences(scan.facts, json.loads(json.dumps(facts))))
    if differing:
        found = "; ".join(
            f"{key} was {saved} when it was saved and is {wanted} now" for key, saved, wanted in differing
        )
        raise Refusal(
            f"{scan.newest}: resuming with another plan or data: {found}. "
            "Resume with what it was saved with, or train into another output_dir."
        )


class CompleteCheckpoints(TrainerCallback):
    """Records the checkpoints of any Trainer, so that `newest_complete` can tell whole ones from torn ones.

    Trainer has then already removed the old checkpoints that exceed `save_total_limit`: a run killed between the two leaves none
    that is recorded. `CompleteCheckpointsMixin` closes that gap. Use one of the two.

    Args:
        facts: as in `write_record`.
    """

    def __init__(self, facts: dict | None = None):
        self.facts = facts or {}

    def on_save(self, args, state, control, **kwargs):
        PartialState().wait_for_everyone()
        if args.should_save:
            write_record(Path(args.output_dir) / f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}", self.facts)


class CompleteCheckpointsMixin:
    """Put before Trainer: saves completely or not at all, rotates only afterwards, resumes only what is complete.

    `class Uptrainer(CompleteCheckpointsMixin, Trainer)`. There is always a complete checkpoint on disk once the first was saved.
    """

    def checkpoint_facts(self) -> dict:
        """JSON that a run which resumes must agree with; override it."""
        return {}

    def train(self, resume_from_checkpoint=None, trial=None, ignore_keys_for_eval=None):
        """As Trainer's; True resumes the newest complete checkpoint, and a path must be a complete one.

        Raises:
            Refusal: there is no complete checkpoint to resume, or another run saved it.
        """
        json.dumps(self.checkpoint_facts())  # fails now and not at the first save
        if resume_from_checkpoint not in (None, False):
            resume_from_checkpoint = str(self._complete_checkpoint(resume_from_checkpoint))
        return super().train(resume_from_checkpoint, trial=trial, ignore_keys_for_eval=ignore_keys_for_eval)

    def _init_training_state(self, max_steps, num_update_steps_per_epoch, num_train_epochs, *others):
        """Trainer's, but a run that was killed after its last step has none left; Trainer would make one more."""
        left = super()._init_training_state(max_steps, num_update_steps_per_epoch, num_train_epochs, *others)
        return (num_train_epochs, 0) if self.state.global_step >= max_steps else left

    def _complete_checkpoint(self, wanted: bool | str | Path) -> Path:
        scans = [None]
        if self.is_world_process_zero():  # one process hashes for all
            scans = [newest_complete(self.args.output_dir) if wanted is True else _scan([Path(wanted)])]
        scan = broadcast_object_list(scans)[0]
        if scan.newest is None and wanted is True:
            found = f": {scan.reasons()}" if scan.skipped else ""
            raise Refusal(
                f"{self.args.output_dir}: holds no complete checkpoint{found}. Train without resume_from_checkpoint."
            )
        if scan.newest is None:
            raise Refusal(
                f"{wanted}: cannot be resumed, {scan.skipped[0][1]}. "
                "Give a complete checkpoint, or resume_from_checkpoint=True for the newest of them."
            )
        if scan.skipped and self.is_world_process_zero():
            logger.warning(f"Resuming from {scan.newest}. Not complete and skipped: {scan.reasons()}.")
        check_same_run(scan, self.checkpoint_facts())
        return scan.newest

    def _save_checkpoint(self, model, trial):
        """Trainer's, of which the rotation waits until the new checkpoint is recorded."""
        step, run_dir = self.state.global_step, Path(self._get_output_dir(trial=trial))
        folder, limit = run_dir / f"{PREFIX_CHECKPOINT_DIR}-{step}", self.args.save_total_limit
        processes, saves = PartialState(), self.args.should_save
        if saves:
            _set_aside(folder)
        processes.wait_for_everyone()
        try:
            self.args.save_total_limit = None
            super()._save_checkpoint(model, trial)
            self.args.save_total_limit = limit
            processes.wait_for_everyone()  # each writes its own random state
            if saves:
                torch.save(self.args, folder / ARGUMENTS_FILE)  # with the limit that the user gave
                write_record(folder, self.checkpoint_facts())
        except Exception as error:
            if saves:
                _put_back(folder)
            if not _is_failed_write(error):
                raise
            raise OSError(_say_what_failed(folder, step, error)) from error
        finally:
            self.args.save_total_limit = limit
        if saves:
            shutil.rmtree(_place_aside(folder), ignore_errors=True)
            _rotate(run_dir, folder, limit, self.state.best_model_checkpoint)


def _step_of(folder: Path) -> int | None:
    match = FOLDER_NAME.fullmatch(folder.name)
    return int(match[2]) if match else None


def _checkpoints(run_dir: Path) -> list[Path]:
    """Those of the highest steps first, and one that was set aside after the one that replaces it."""
    found = [path for path in run_dir.glob("*") if _step_of(path) is not None and path.is_dir()]
    return sorted(found, key=lambda path: (_step_of(path), not path.name.startswith(REPLACED)), reverse=True)


def _scan(folders: Iterable[Path]) -> CheckpointScan:
    skipped = []
    for folder in folders:
        try:
            record = _complete_record(folder)
        except (_Incomplete, OSError) as error:
            skipped.append((folder.name, str(error)))
        else:
            return CheckpointScan(folder, record["facts"], tuple(skipped))
    return CheckpointScan(None, None, tuple(skipped))


def _complete_record(folder: Path) -> dict:
    record = _read_record(folder)
    files = record["files"]
    if _step_of(folder) not in (None, record["global_step"]):  # None: a copy under a name of the user's
        raise _Incomplete(f"{RECORD_FILE}: of step {record['global_step']}")
    if STATE_FILE not in files:
        raise _Incomplete(f"{STATE_FILE}: missing, and not recorded")
    if not any("optim" in name for name in files):
        raise _Incomplete("no state of the optimizer was saved (save_only_model)")
    for name, recorded in files.items():
        if not (folder / name).is_file():
            raise _Incomplete(f"{name}: missing")
        size_bytes = (folder / name).stat().st_size
        if size_bytes != recorded["bytes"]:
            raise _Incomplete(f"{name}: {size_bytes:,} bytes, recorded {recorded['bytes']:,}")
    for name, recorded in files.items():
        if file_sha256(folder / name) != recorded["sha256"]:
            raise _Incomplete(f"{name}: the bytes are not those recorded (sha256)")
    return record


def _read_record(folder: Path) -> dict:
    """The record, of the right shape."""
    if not folder.is_dir():
        raise _Incomplete("no such folder")
    if not (folder / RECORD_FILE).is_file():
        raise _Incomplete("no record: the save did not finish")
    try:
        record = read_json(folder / RECORD_FILE)
        if record["format"] != RECORD_FORMAT:
            raise _Incomplete(f"{RECORD_FILE}: format {record['format']}, this version reads {RECORD_FORMAT}")
        shaped = isinstance(record["facts"], dict) and isinstance(record["global_step"], int)
        for recorded in record["files"].values():
            shaped &= isinstance(recorded["bytes"], int) and isinstance(recorded["sha256"], str)
    except (ValueError, KeyError, TypeError, AttributeError):
        shaped = False
    if not shaped:
        raise _Incomplete(f"{RECORD_FILE}: cannot be read")
    return record


def _differences(saved: object, wanted: object, key: str = "") -> Iterator[tuple[str, str, str]]:
    """(dotted key, value when saved, value now); both as JSON."""
    if isinstance(saved, dict) and isinstance(wanted, dict):
        for name in sorted(saved.keys() | wanted.keys()):
            inner = f"{key}.{name}" if key else name
            if name in saved and name in wanted:
                yield from _differences(saved[name], wanted[name], inner)
            else:
                both = [json.dumps(facts[name]) if name in facts else "absent" for facts in (saved, wanted)]
                yield inner, *both
    elif saved != wanted:
        yield key, json.dumps(saved), json.dumps(wanted)


def _place_aside(folder: Path) -> Path:
    return folder.with_name(REPLACED + folder.name)


def _set_aside(folder: Path) -> None:
    """Make way for a checkpoint of the same step: a recorded one is kept until that is recorded, a torn one is removed."""
    if (folder / RECORD_FILE).exists():
        shutil.rmtree(_place_aside(folder), ignore_errors=True)
        os.rename(folder, _place_aside(folder))
    elif folder.exists():
        shutil.rmtree(folder)


def _put_back(folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    if _place_aside(folder).exists():
        os.rename(_place_aside(folder), folder)


def _rotate(run_dir: Path, saved: Path, limit: int | None, best: str | None) -> None:
    """Keep `limit` checkpoints: the one just saved, the best, then recorded ones of the highest steps.

    transformers' own rotation protects the last by modification time or number, which may be a torn one that a killed run left.
    """
    if limit is None or limit <= 0:
        return
    kept = {saved.name, Path(best).name if best and (run_dir / Path(best).name).is_dir() else saved.name}
    old = [folder for folder in _checkpoints(run_dir) if folder.name not in kept]
    old.sort(key=lambda folder: (folder / RECORD_FILE).exists(), reverse=True)
    for folder in reversed(old[max(limit - len(kept), 0) :]):
        shutil.rmtree(folder, ignore_errors=True)


def _is_failed_write(error: Exception) -> bool:
    from_torch = isinstance(error, RuntimeError) and any(name in str(error) for name in TORCH_WRITER)
    return from_torch or isinstance(error, OSError | SafetensorError)


def _say_what_failed(folder: Path, step: int, error: Exception) -> str:
    why = (str(error).splitlines() or [repr(error)])[0].rstrip(". ")
    newest = newest_complete(folder.parent).newest
    free_bytes = shutil.disk_usage(folder.parent).free
    kept = f"The newest complete checkpoint is {newest}" if newest else "There is no complete checkpoint"
    go_on = "go on with resume_from_checkpoint=True" if newest else "train again without resume_from_checkpoint"
    return (
        f"{folder}: step {step} could not be saved: {why} ({free_bytes:,} bytes are free). Nothing of it was left behind. "
        f"{kept}. Make room or mend what failed, then {go_on}."
    )
