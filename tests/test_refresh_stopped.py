"""Whatever stops a refresh, the folder is whole, old or new, and the next run leaves nothing beside it."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

import hf_gqa


pytestmark = pytest.mark.slow  # runs that are stopped and waited for
OLD_BUNDLE = Path(__file__).parent / "old_bundles" / "decoder"
STOPPED_RUNS = """
import ctypes, hashlib, json, os, resource, shutil, signal, sys, time
from pathlib import Path

import torch

torch.set_num_threads(1)  # a fork of a process whose thread pools have started may hang
from hf_gqa import cli, staging
from hf_gqa.export import refresh

scratch, bundle = map(Path, sys.argv[1:])
refresh.verify = lambda folder: []  # which takes a process of its own


def kill(*args, **kwargs):
    os.kill(os.getpid(), signal.SIGKILL)


def wait(*args, **kwargs):
    time.sleep(60)


def on_call(module, name, number, act):
    original, calls = getattr(module, name), []

    def replacement(*args, **kwargs):
        calls.append(args)
        return (act if len(calls) == number else original)(*args, **kwargs)

    setattr(module, name, replacement)


def without_exchange():
    def refuse(*args, **kwargs):
        raise OSError("not to be had here")

    ctypes.CDLL = refuse
    on_call(os, "rename", 4, kill)


MOMENTS = {
    "before the first link": lambda: on_call(os, "link", 1, kill),
    "after some links": lambda: on_call(os, "link", 2, kill),
    "before config.json": lambda: on_call(refresh, "with_members", 1, kill),
    "before the manifest": lambda: on_call(refresh, "with_members", 2, kill),
    "in verify": lambda: setattr(refresh, "verify", kill),
    "while flushing": lambda: on_call(os, "fsync", 3, kill),
    "before the exchange": lambda: on_call(staging, "_publish", 1, kill),
    "while removing the old": lambda: on_call(shutil, "rmtree", 1, kill),
    "between two renames": without_exchange,
    "SIGTERM": lambda: setattr(refresh, "verify", wait),
    "SIGINT": lambda: setattr(refresh, "verify", wait),
    "disk full": lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (1_400, 1_400)),
}


def contents(folder):
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.iterdir()}


def bundle_in(folder):
    if not (folder / "bundle").exists():
        return "absent"
    found = contents(folder / "bundle")
    return next((name for name in ("old", "new") if found == contents(scratch / name)), "damaged")


def child(moment, folder):
    for number, name in ((1, "out"), (2, "err")):
        os.dup2(os.open(folder / name, os.O_CREAT | os.O_WRONLY), number)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    MOMENTS[moment]()
    sys.argv = ["hf-gqa", "refresh", str(folder / "bundle")]
    try:
        cli.main()
    except SystemExit as end:
        os._exit(end.code or 0)
    os._exit(99)


def run(moment):
    folder = scratch / moment
    shutil.copytree(bundle, folder / "bundle")
    process = os.fork()
    if process == 0:
        child(moment, folder)
    if moment.startswith("SIG"):
        while not list(folder.glob(".bundle.partial-*/conversion_manifest.json")):
            time.sleep(0.01)
        os.kill(process, getattr(signal, moment))
    found = {"code": os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])}
    hidden = list(folder.glob(".*"))
    found |= {"bundle": bundle_in(folder), "stderr": (folder / "err").read_text(), "hidden": len(hidden)}
    if found["bundle"] == "absent":
        moved = next(path / "replaced" for path in hidden if (path / "replaced").is_dir())
        os.rename(moved, folder / "bundle")
        found["moved back"] = bundle_in(folder)
    refresh.refresh(folder / "bundle")
    return found | {"next": bundle_in(folder), "next hidden": len(list(folder.glob(".*")))}


shutil.copytree(bundle, scratch / "old")
shutil.copytree(bundle, scratch / "new")
refresh.refresh(scratch / "new")
print(json.dumps({moment: run(moment) for moment in MOMENTS}))
"""
KILLED_BEFORE = (
    *("before the first link", "after some links", "before config.json", "before the manifest", "in verify"),
    *("while flushing", "before the exchange"),
)


@pytest.fixture(scope="module")
def stopped(tmp_path_factory) -> dict[str, dict]:
    """What runs of the command in processes of their own left behind, stopped at every moment."""
    scratch = tmp_path_factory.mktemp("stopped")
    run = subprocess.run(
        [sys.executable, "-c", STOPPED_RUNS, str(scratch), str(OLD_BUNDLE)],
        env=os.environ | {"PYTHONPATH": str(Path(hf_gqa.__file__).parents[1]), "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert run.returncode == 0, run.stderr
    return json.loads(run.stdout.strip().splitlines()[-1])


@pytest.mark.parametrize("moment", KILLED_BEFORE)
def test_killed_before_it_is_done_the_old_bundle_is_whole(stopped, moment):
    found = stopped[moment]
    assert (found["code"], found["bundle"], found["hidden"]) == (-signal.SIGKILL, "old", 1)
    assert (found["next"], found["next hidden"]) == ("new", 0)


def test_killed_when_it_is_done_the_new_bundle_is_whole(stopped):
    """And the next run, which has nothing else to do, removes the old one."""
    found = stopped["while removing the old"]
    assert (found["code"], found["bundle"], found["hidden"]) == (-signal.SIGKILL, "new", 1)
    assert (found["next"], found["next hidden"]) == ("new", 0)


def test_killed_where_folders_cannot_be_exchanged_nothing_is_lost(stopped):
    """A moment without a folder cannot be avoided there; what to move back is said (test_refresh_bad_input.py)."""
    found = stopped["between two renames"]
    assert (found["code"], found["bundle"], found["moved back"]) == (-signal.SIGKILL, "absent", "old")
    assert (found["next"], found["next hidden"]) == ("new", 0)


@pytest.mark.parametrize(("moment", "codes"), [("SIGTERM", [128 + signal.SIGTERM]), ("SIGINT", [1, 130])])
def test_run_that_is_asked_to_end_leaves_nothing_behind(stopped, moment, codes):
    found = stopped[moment]
    assert found["code"] in codes and "Traceback" not in found["stderr"]
    assert (found["bundle"], found["hidden"], found["next"]) == ("old", 0, "new")


def test_full_disk_is_one_message_and_leaves_nothing_behind(stopped):
    found = stopped["disk full"]
    assert (found["code"], found["bundle"], found["hidden"]) == (3, "old", 0)
    assert found["stderr"].startswith("hf-gqa: [Errno ") and found["stderr"].count("\n") == 1
    assert (found["next"], found["next hidden"]) == ("new", 0)
