"""The output appears complete or not at all, whatever stops the run; the donor is only read."""

import ctypes
import json
import os
import shutil
import signal
import subprocess
import sys
from collections import namedtuple
from pathlib import Path

import pytest
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import hf_gqa
from hf_gqa import Refusal, convert_checkpoint
from hf_gqa.export import write_student
from hf_gqa.staging import staged_folder

from .command_line import assert_one_message, run_cli
from .donor_folders import files_of, write_sharded_donor


STOPPED_RUNS = """
import hashlib, json, os, resource, shutil, signal, sys, time
from pathlib import Path

import torch

torch.set_num_threads(1)  # a fork of a process whose thread pools have started may hang
from hf_gqa import cli, convert_checkpoint
from hf_gqa.export import write_student

scratch, donor = map(Path, sys.argv[1:])
save_file = write_student.save_file


def kill(*args, **kwargs):
    os.kill(os.getpid(), signal.SIGKILL)


def kill_in_a_file(tensors, file, **kwargs):
    Path(file).write_bytes(b"half")
    kill()


def wait_after_a_file(tensors, file, **kwargs):
    save_file(tensors, file, **kwargs)
    time.sleep(60)


def on_call(module, name, number, act):
    original, calls = getattr(module, name), []

    def replacement(*args, **kwargs):
        calls.append(args)
        return (act if len(calls) == number else original)(*args, **kwargs)

    setattr(module, name, replacement)


def fill_disk():
    resource.setrlimit(resource.RLIMIT_FSIZE, (15_000, 15_000))


MOMENTS = {
    "before the first shard": lambda: on_call(write_student, "save_file", 1, kill),
    "in the third shard": lambda: on_call(write_student, "save_file", 3, kill_in_a_file),
    "while carrying files": lambda: on_call(shutil, "copyfile", 1, kill),
    "while flushing": lambda: on_call(os, "fsync", 2, kill),
    "before the rename": lambda: on_call(os, "rename", 2, kill),
    "between two renames": lambda: on_call(os, "rename", 3, kill),
    "while removing the old": lambda: on_call(shutil, "rmtree", 1, kill),
    "SIGTERM": lambda: on_call(write_student, "save_file", 2, wait_after_a_file),
    "SIGINT": lambda: on_call(write_student, "save_file", 2, wait_after_a_file),
    "disk full": fill_disk,
}


def contents(folder):
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.iterdir()}


def student_in(folder):
    if not (folder / "student").exists():
        return "absent"
    found = contents(folder / "student")
    return next((name for name in ("old", "new") if found == contents(scratch / name)), "damaged")


def child(moment, folder):
    for number, name in ((1, "out"), (2, "err")):
        os.dup2(os.open(folder / name, os.O_CREAT | os.O_WRONLY), number)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    MOMENTS[moment]()
    heads = ("--num-key-value-heads", "2")
    sys.argv = ["hf-gqa", "convert", str(donor), str(folder / "student"), *heads, "--overwrite"]
    try:
        cli.main()
    except SystemExit as end:
        os._exit(end.code or 0)
    os._exit(99)


def run(moment, existing):
    folder = scratch / f"{moment}, {existing}"
    folder.mkdir()
    if existing == "replacing":
        shutil.copytree(scratch / "old", folder / "student")
    process = os.fork()
    if process == 0:
        child(moment, folder)
    if moment.startswith("SIG"):
        while len(list(folder.glob(".student.partial-*/*.safetensors"))) < 2:
            time.sleep(0.01)
        os.kill(process, getattr(signal, moment))
    found = {"code": os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])}
    found |= {"student": student_in(folder), "stderr": (folder / "err").read_text()}
    found["hidden"] = len(list(folder.glob(".*")))
    convert_checkpoint(donor, folder / "student", num_key_value_heads=2, overwrite=True)
    return found | {"next": student_in(folder), "next hidden": len(list(folder.glob(".*")))}


convert_checkpoint(donor, scratch / "old", num_key_value_heads=1)
convert_checkpoint(donor, scratch / "new", num_key_value_heads=2)
print(json.dumps({f"{m}, {e}": run(m, e) for m in MOMENTS for e in ("replacing", "fresh")}))
"""
KILLED = ("before the first shard", "in the third shard", "while carrying files", "while flushing")


@pytest.fixture
def donor(tmp_path):
    """A donor of many shards, of which the bytes and the times of writing must stay as they are."""
    donor = write_sharded_donor(tmp_path / "donors" / "donor")
    (donor / "tokenizer.json").write_text("{}")
    before = files_of(donor)
    yield donor
    assert files_of(donor) == before


def hidden_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if path.name.startswith("."))


def heads_of(student: Path) -> int:
    return json.loads((student / "config.json").read_text())["num_key_value_heads"]


def assert_complete(student: Path) -> None:
    files = {path.name for path in student.iterdir()}
    assert {"config.json", "conversion_manifest.json", "tokenizer.json", "model.safetensors.index.json"} <= files
    AutoModelForCausalLM.from_pretrained(student)
    listed = json.loads((student / "model.safetensors.index.json").read_text())["weight_map"]
    assert {
        name: file for file in files if file.endswith(".safetensors") for name in load_file(student / file)
    } == listed


def test_output_that_exists_is_refused_and_overwrite_replaces_it(tmp_path, donor):
    output = tmp_path / "student"
    convert_checkpoint(donor, output, num_key_value_heads=1)
    (output / "notes.txt").write_text("old")
    before = files_of(output)
    arguments = ["convert", donor, output, "--num-key-value-heads", 2]
    assert_one_message(run_cli(*arguments), 2, f"{output}: exists.", "--overwrite to replace it")
    assert files_of(output) == before
    assert run_cli(*arguments, "--overwrite").exit_code == 0
    assert heads_of(output) == 2 and not (output / "notes.txt").exists()
    assert_complete(output)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["donors", "student"]


def test_overwrite_of_what_is_no_model_is_refused(tmp_path, donor):
    output, file = tmp_path / "thesis", tmp_path / "file"
    output.mkdir()
    (output / "chapter.txt").write_text("years of work")
    file.write_text("x")
    with pytest.raises(Refusal, match=r"thesis: holds no config\.json, so it is no model .* Remove it first\."):
        convert_checkpoint(donor, output, num_key_value_heads=2, overwrite=True)
    with pytest.raises(Refusal, match=r"file: exists and is not a folder\. Give another output\."):
        convert_checkpoint(donor, file, num_key_value_heads=2, overwrite=True)
    assert (output / "chapter.txt").read_text() == "years of work" and file.read_text() == "x"
    (output / "chapter.txt").unlink()
    convert_checkpoint(donor, output, num_key_value_heads=2, overwrite=True)  # an empty folder is nobody's
    assert_complete(output)


@pytest.mark.parametrize("place", ["donors/donor", "donors", "donors/donor/sub", "link", "link/sub", "donors/../link"])
def test_output_that_touches_the_donor_is_refused(tmp_path, donor, place):
    (tmp_path / "link").symlink_to(donor, target_is_directory=True)
    (tmp_path / "donors/config.json").write_text("{}")
    with pytest.raises(Refusal, match=r"overlaps the donor's folder .*\. Write the student somewhere else\."):
        convert_checkpoint(donor, tmp_path / place, num_key_value_heads=2, overwrite=True)


def test_dry_run_refuses_what_the_run_would_refuse(tmp_path, donor):
    result = run_cli("convert", donor, donor / "sub", "--num-key-value-heads", 2, "--dry-run")
    assert_one_message(result, 2, "overlaps the donor's folder")


def test_too_little_space_is_noticed_before_anything_is_written(tmp_path, donor, monkeypatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10**6, 10**6 - 100, 100))
    result = run_cli("convert", donor, tmp_path / "a" / "student", "--num-key-value-heads", 2)
    assert_one_message(result, 3, "needs ", "bytes, 100 are free. Nothing was written: make room", "a/student")
    assert not (tmp_path / "a").exists()


@pytest.mark.parametrize("existing", [False, True])
@pytest.mark.parametrize("error", [KeyboardInterrupt(), OSError(28, "No space left on device"), ValueError("a defect")])
def test_an_exception_while_writing_leaves_nothing_behind(tmp_path, donor, monkeypatch, error, existing):
    output = tmp_path / "student"
    if existing:
        convert_checkpoint(donor, output, num_key_value_heads=1)
    before = files_of(tmp_path)
    save_file, calls = write_student.save_file, []

    def failing(tensors, file, **kwargs):
        save_file(tensors, file, **kwargs)
        calls.append(file)
        if len(calls) == 3:
            raise error

    monkeypatch.setattr(write_student, "save_file", failing)
    with pytest.raises(type(error)):
        convert_checkpoint(donor, output, num_key_value_heads=2, overwrite=True)
    assert len(calls) == 3 and files_of(tmp_path) == before and hidden_in(tmp_path) == []


def test_staging_folder_of_a_live_run_is_left_alone_and_of_a_dead_one_is_removed(tmp_path, donor):
    output, dead = tmp_path / "student", tmp_path / ".student.partial-dead"
    dead.mkdir()
    (dead / "model.safetensors").write_text("half")
    other = tmp_path / ".student2.partial-dead"
    other.mkdir()
    with pytest.raises(RuntimeError, match="the live run ends"), staged_folder(output, overwrite=False) as live:
        (live / "model.safetensors").write_text("the live run's")
        assert not dead.exists()
        convert_checkpoint(donor, output, num_key_value_heads=2)
        assert (live / "model.safetensors").read_text() == "the live run's"
        raise RuntimeError("the live run ends")
    assert_complete(output)
    assert hidden_in(tmp_path) == [other.name]  # of another output: not ours to remove


def test_leftovers_of_an_output_whose_name_looks_like_a_pattern_are_removed(tmp_path, donor):
    leftover, innocent = tmp_path / ".student[1].partial-dead", tmp_path / ".student1.partial-dead"
    leftover.mkdir()
    innocent.mkdir()
    convert_checkpoint(donor, tmp_path / "student[1]", num_key_value_heads=2)
    assert hidden_in(tmp_path) == [innocent.name]


def test_output_that_appears_meanwhile_is_not_replaced_unasked(tmp_path, donor, monkeypatch):
    output = tmp_path / "student"
    save_file = write_student.save_file

    def with_competitor(tensors, file, **kwargs):
        output.mkdir(exist_ok=True)
        (output / "config.json").write_text("another run's")
        save_file(tensors, file, **kwargs)

    monkeypatch.setattr(write_student, "save_file", with_competitor)
    with pytest.raises((Refusal, OSError), match="exists"):
        convert_checkpoint(donor, output, num_key_value_heads=2)
    assert (output / "config.json").read_text() == "another run's" and hidden_in(tmp_path) == []


def test_output_has_the_permissions_that_umask_gives(tmp_path, donor):
    mask = os.umask(0o027)
    try:
        convert_checkpoint(donor, tmp_path / "student", num_key_value_heads=2)
    finally:
        os.umask(mask)
    assert (tmp_path / "student").stat().st_mode & 0o777 == 0o750
    assert {path.stat().st_mode & 0o777 for path in (tmp_path / "student").iterdir()} == {0o640}


def refuse(*args, **kwargs):
    raise OSError("not to be had here")


def test_overwrite_where_folders_cannot_be_exchanged(tmp_path, donor, monkeypatch):
    monkeypatch.setattr(ctypes, "CDLL", refuse)
    for heads in (1, 2):
        convert_checkpoint(donor, tmp_path / "student", num_key_value_heads=heads, overwrite=True)
        assert heads_of(tmp_path / "student") == heads and hidden_in(tmp_path) == []
    assert_complete(tmp_path / "student")


def test_failing_rename_where_folders_cannot_be_exchanged_keeps_the_old_student(tmp_path, donor, monkeypatch):
    convert_checkpoint(donor, tmp_path / "student", num_key_value_heads=1)
    before = files_of(tmp_path)
    rename = os.rename
    monkeypatch.setattr(ctypes, "CDLL", refuse)
    monkeypatch.setattr(
        os, "rename", lambda a, b: refuse() if "partial" in str(a) and "replaced" not in str(a) else rename(a, b)
    )
    with pytest.raises(OSError, match="not to be had here"):
        convert_checkpoint(donor, tmp_path / "student", num_key_value_heads=2, overwrite=True)
    assert files_of(tmp_path) == before and hidden_in(tmp_path) == []


@pytest.fixture(scope="module")
def stopped(tmp_path_factory) -> dict[str, dict]:
    """What runs of the command in processes of their own left behind, stopped at every moment."""
    scratch = tmp_path_factory.mktemp("stopped")
    donor = write_sharded_donor(scratch / "donor")
    (donor / "tokenizer.json").write_text("{}")
    before = files_of(donor)
    run = subprocess.run(
        [sys.executable, "-c", STOPPED_RUNS, str(scratch), str(donor)],
        env=os.environ | {"PYTHONPATH": str(Path(hf_gqa.__file__).parents[1]), "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert run.returncode == 0, run.stderr
    assert files_of(donor) == before
    return json.loads(run.stdout.strip().splitlines()[-1])


@pytest.mark.slow
@pytest.mark.parametrize(("existing", "kept"), [("fresh", "absent"), ("replacing", "old")])
@pytest.mark.parametrize("moment", KILLED)
def test_killed_run_leaves_the_output_as_it_was_and_the_next_one_cleans_up(stopped, moment, existing, kept):
    found = stopped[f"{moment}, {existing}"]
    assert found["code"] == -signal.SIGKILL
    assert (found["student"], found["hidden"]) == (kept, 1)
    assert (found["next"], found["next hidden"]) == ("new", 0)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("run", "student"), [("before the rename, fresh", "absent"), ("while removing the old, replacing", "new")]
)
def test_run_killed_while_publishing_leaves_no_half(stopped, run, student):
    found = stopped[run]
    assert (found["code"], found["student"], found["hidden"]) == (-signal.SIGKILL, student, 1)
    assert (found["next"], found["next hidden"]) == ("new", 0)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="only Linux exchanges two folders at one stroke")
def test_there_is_no_moment_without_an_output_while_one_is_replaced(stopped):
    found = stopped["between two renames, replacing"]
    assert (found["code"], found["student"], found["hidden"]) == (0, "new", 0)


@pytest.mark.slow
@pytest.mark.parametrize(("existing", "kept"), [("fresh", "absent"), ("replacing", "old")])
@pytest.mark.parametrize(("moment", "codes"), [("SIGTERM", [128 + signal.SIGTERM]), ("SIGINT", [1, 130])])
def test_run_that_is_asked_to_end_leaves_nothing_behind(stopped, moment, codes, existing, kept):
    found = stopped[f"{moment}, {existing}"]
    assert found["code"] in codes and "Traceback" not in found["stderr"]
    assert (found["student"], found["hidden"]) == (kept, 0)


@pytest.mark.slow
@pytest.mark.parametrize(("existing", "kept"), [("fresh", "absent"), ("replacing", "old")])
def test_full_disk_is_one_message_and_leaves_nothing_behind(stopped, existing, kept):
    found = stopped[f"disk full, {existing}"]
    assert found["code"] == 3 and (found["student"], found["hidden"]) == (kept, 0)
    assert found["stderr"].startswith("hf-gqa: [Errno ") and found["stderr"].count("\n") == 1
    assert "writing failed" in found["stderr"] and "Nothing was left behind" in found["stderr"]
