"""`hf-gqa uptrain` and `hf-gqa teacher-logits` from folders to a folder."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest
import torch

import hf_gqa
from hf_gqa.uptrain.objectives import OBJECTIVES

from .donor_folders import files_of
from .uptrain_command import (
    BUDGET,
    LENGTH,
    STEP_TOKENS,
    arguments_of,
    loss_by_hand,
    own_cache,
    some_text,
    tensors_of,
    uptrained,
    write_folders,
)


__all__ = ["own_cache"]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Which every test of this file leaves byte for byte as they are."""
    folders = write_folders(tmp_path_factory.mktemp("folders"))
    (folders.root / "eval.txt").write_text(some_text(200, seed=1))
    before = files_of(folders.root)
    yield folders
    assert files_of(folders.root) == before


@pytest.fixture(scope="module")
def plain(tmp_path_factory, folders):
    """(output, what it says): the run that others are compared with."""
    output = tmp_path_factory.mktemp("plain") / "out"
    return output, uptrained(folders, output, eval_file=folders.root / "eval.txt")


def test_output_is_the_student_with_other_weights_and_a_report(folders, plain):
    output, _ = plain
    carried = {path.name for path in folders.student.iterdir()}
    assert {path.name for path in output.iterdir()} == carried | {"uptraining.json", "uptraining.svg"}
    for name in carried - {"model.safetensors", "conversion_manifest.json", "config.json"}:
        assert (output / name).read_bytes() == (folders.student / name).read_bytes()
    config, before = (json.loads((folder / "config.json").read_text()) for folder in (output, folders.student))
    assert config == before
    shapes = [{name: tensor.shape for name, tensor in tensors_of(f).items()} for f in (output, folders.student)]
    assert shapes[0] == shapes[1]


def test_report_counts_exactly_the_budget(plain):
    output, report = plain
    assert BUDGET % LENGTH and BUDGET % STEP_TOKENS  # the last row and the last step are not full
    assert (report["tokens_seen"], report["steps"]) == (BUDGET, -(-BUDGET // STEP_TOKENS))
    assert report["output"] == str(output) and report["kv_cache_bytes_per_token"] == 256
    trained = [entry for entry in report["log"] if "loss" in entry]
    seen = [entry["tokens_seen"] for entry in trained]
    assert seen == [*range(STEP_TOKENS, BUDGET, STEP_TOKENS), BUDGET]
    assert all(torch.tensor([entry["loss"], entry["grad_norm"]]).isfinite().all() for entry in trained)
    evaluated = [entry for entry in report["log"] if "eval_loss" in entry]
    assert [entry["tokens_seen"] for entry in evaluated] == [0, 4 * STEP_TOKENS, BUDGET, BUDGET]
    for key, entry in (("before", evaluated[0]), ("after", evaluated[-1])):
        assert report[key].items() <= entry.items()
    assert report["after"]["eval_kl_nats_per_token"] < report["before"]["eval_kl_nats_per_token"]


def test_losses_are_those_of_the_folders(folders, plain):
    output, report = plain
    text = folders.root / "eval.txt"
    for folder, loss in (
        (folders.student, report["before"]["eval_loss"]),
        (output, report["after"]["eval_loss"]),
        (folders.donor, report["after"]["eval_teacher_loss"]),
    ):
        assert loss_by_hand(folder, text) == pytest.approx(loss, abs=1e-4)


def test_plot_is_a_vector_graphic(plain):
    root = ElementTree.parse(plain[0] / "uptraining.svg").getroot()
    assert root.tag == "{http://www.w3.org/2000/svg}svg" and len(list(root.iter())) > 50


def test_manifest_says_what_happened(folders, plain):
    output, report = plain
    before, after = (json.loads((f / "conversion_manifest.json").read_text()) for f in (folders.student, output))
    assert before.get("uptraining") is None
    uptraining = after.pop("uptraining")
    assert {name: value for name, value in before.items() if name != "uptraining"} == after
    assert {name: report[name] for name in ("recipe", "tokens_seen", "steps", "before", "after")} == uptraining
    assert uptraining["recipe"]["budget_tokens"] == BUDGET


FRESH = """
import sys
sys.modules["hf_gqa"] = None
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
for folder in sys.argv[1:]:
    model, loading = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, output_loading_info=True)
    assert not any(loading.values()), loading
    tokens = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)("the cat", return_tensors="pt")["input_ids"]
    assert model.generate(tokens, max_new_tokens=3, do_sample=False).shape[1] >= tokens.shape[1]
    print(type(model).__name__, model.config.num_key_value_heads, model.dtype)
"""


def test_outputs_load_without_hf_gqa(tmp_path, plain):
    bundle = write_folders(tmp_path, torch.bfloat16, export="bundle")
    uptrained(bundle, tmp_path / "out")
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "HF_MODULES_CACHE": str(tmp_path / "modules")}
    run = subprocess.run(
        [sys.executable, "-c", FRESH, plain[0], tmp_path / "out"], env=environment, capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr
    assert run.stdout == "LlamaForCausalLM 2 torch.float32\nGQALlamaForCausalLM 2 torch.bfloat16\n"


@pytest.mark.parametrize("tied", [False, True])
def test_bfloat16_stays_and_is_what_was_evaluated(tmp_path, tied):
    folders = write_folders(tmp_path, torch.bfloat16, tie_word_embeddings=tied)
    (tmp_path / "eval.txt").write_text(some_text(200, seed=1))
    report = uptrained(folders, tmp_path / "out", eval_file=tmp_path / "eval.txt", objective="kl")
    before, after = tensors_of(folders.student), tensors_of(tmp_path / "out")
    assert {name: tensor.dtype for name, tensor in after.items()} == dict.fromkeys(before, torch.bfloat16)
    assert json.loads((tmp_path / "out/config.json").read_text())["dtype"] == "bfloat16"
    assert loss_by_hand(tmp_path / "out", tmp_path / "eval.txt") == pytest.approx(
        report["after"]["eval_loss"], abs=1e-4
    )


def changed_names(one: Path, other: Path) -> set[str]:
    first, second = tensors_of(one), tensors_of(other)
    assert first.keys() == second.keys()
    return {name for name in first if not torch.equal(first[name], second[name])}


@pytest.mark.parametrize("objective", OBJECTIVES.names())
def test_every_objective_learns(tmp_path, folders, objective):
    report = uptrained(folders, tmp_path / "out", objective=objective)
    keys = ["eval_loss"] if objective == "cross_entropy" else ["eval_kl_nats_per_token"]
    assert all(report["after"][key] < report["before"][key] for key in keys)
    attention = {name for name in tensors_of(folders.student) if "self_attn" in name}
    everything = all(phase.train == "all" for phase in OBJECTIVES.get(objective))
    changed = changed_names(folders.student, tmp_path / "out")
    assert changed == (set(tensors_of(folders.student)) if everything else attention)


@pytest.mark.parametrize("flags", [[], ["--gradient-checkpointing"], ["--bf16"], ["--attend-across-documents"]])
def test_text_alone_needs_no_teacher(tmp_path, folders, flags):
    report = uptrained(folders, tmp_path / "out", *flags, teacher=None)
    assert report["after"]["eval_loss"] < report["before"]["eval_loss"] and report["teacher_own_bytes"] is None
    assert "eval_teacher_loss" not in report["after"]


def test_adapters_are_merged_and_leave_the_rest_alone(tmp_path, folders):
    report = uptrained(folders, tmp_path / "out", lora_rank=2)
    assert changed_names(folders.student, tmp_path / "out") == {
        f"model.layers.{n}.self_attn.{p}_proj.weight" for n in range(2) for p in "qkvo"
    }
    rest = {name for name in tensors_of(folders.donor) if "self_attn" not in name}
    assert rest and not rest & changed_names(folders.student, tmp_path / "out")
    assert all(torch.equal(tensors_of(tmp_path / "out")[name], tensors_of(folders.donor)[name]) for name in rest)
    assert not list((tmp_path / "out").glob("adapter*")) and report["recipe"]["lora_rank"] == 2
    assert report["after"]["eval_kl_nats_per_token"] < report["before"]["eval_kl_nats_per_token"]


def test_only_key_and_value_projections(tmp_path, folders):
    uptrained(folders, tmp_path / "out", train="key_value")
    changed = changed_names(folders.student, tmp_path / "out")
    assert changed == {f"model.layers.{n}.self_attn.{p}_proj.weight" for n in range(2) for p in "kv"}


def test_best_is_the_one_of_the_lowest_loss(tmp_path, folders):
    """A rate at which the loss soon rises: what is written is not the last."""
    options = {"teacher": None, "learning_rate": 0.2, "eval_steps": 1, "eval_file": folders.root / "eval.txt"}
    reports = {how: uptrained(folders, tmp_path / how, export=how, **options) for how in ("last", "best")}
    during = [
        entry["eval_loss"] for entry in reports["best"]["log"] if entry.get("tokens_seen") and "eval_loss" in entry
    ]
    assert reports["best"]["after"]["eval_loss"] == pytest.approx(min(during), abs=1e-5)
    assert reports["last"]["after"]["eval_loss"] == pytest.approx(during[-2], abs=1e-5)
    assert loss_by_hand(tmp_path / "best", folders.root / "eval.txt") == pytest.approx(min(during), abs=1e-4)


def test_two_runs_are_equal_and_a_seed_makes_another(tmp_path, folders, plain):
    options = {"eval_file": folders.root / "eval.txt"}
    for name, seed in (("same", 0), ("other", 1)):
        uptrained(folders, tmp_path / name, seed=seed, **options)
    same, other, first = (tensors_of(f) for f in (tmp_path / "same", tmp_path / "other", plain[0]))
    assert all(torch.equal(same[name], first[name]) for name in first)
    assert not all(torch.equal(other[name], first[name]) for name in first)


STOPPED_RUNS = """
import hashlib, json, os, resource, shutil, signal, sys, time
from pathlib import Path

import torch

torch.set_num_threads(1)  # a fork of a process whose thread pools have started may hang
import matplotlib.backends.backend_svg
from hf_gqa import cli, staging
from hf_gqa.uptrain import checkpoints, run
from hf_gqa.uptrain.trainer import UptrainTrainer

scratch, asked = Path(sys.argv[1]), json.loads(sys.argv[2])


def kill(*args, **kwargs):
    os.kill(os.getpid(), signal.SIGKILL)


def on_call(place, name, number, act, after=False):
    original, calls = getattr(place, name), []

    def replacement(*args, **kwargs):
        calls.append(args)
        here = len(calls) == number
        if here and not after:
            act()
        result = original(*args, **kwargs)
        if here and after:
            act()
        return result

    setattr(place, name, replacement)


def fill_disk():
    resource.setrlimit(resource.RLIMIT_FSIZE, (9_000, 9_000))


def wait():
    time.sleep(60)


MOMENTS = {
    "in the second step": lambda: on_call(UptrainTrainer, "training_step", 2, kill),
    "before the first record": lambda: on_call(checkpoints, "write_record", 1, kill),
    "between checkpoints": lambda: on_call(UptrainTrainer, "training_step", 5, kill),
    "in the second checkpoint": lambda: on_call(UptrainTrainer, "_save_optimizer_and_scheduler", 2, kill),
    "before the second record": lambda: on_call(checkpoints, "write_record", 2, kill),
    "while rotating": lambda: on_call(checkpoints, "_rotate", 3, kill),
    "before the export": lambda: on_call(run, "export_student", 1, kill),
    "before the rename": lambda: on_call(staging, "_publish", 1, kill),
    "after the rename": lambda: on_call(run, "export_student", 1, kill, after=True),
    "SIGTERM": lambda: on_call(UptrainTrainer, "training_step", 5, wait),
    "SIGINT": lambda: on_call(UptrainTrainer, "training_step", 5, wait),
    "disk full at a checkpoint": lambda: on_call(checkpoints, "write_record", 1, fill_disk, after=True),
    "disk full at the end": lambda: on_call(run, "export_student", 1, fill_disk),
    "never": lambda: None,
}


def command(folder, moment, *flags):
    process = os.fork()
    if process:
        return process
    for number, name in ((1, "out"), (2, "err")):
        os.dup2(os.open(folder / name, os.O_CREAT | os.O_WRONLY | os.O_TRUNC), number)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    MOMENTS[moment]()
    sys.argv = ["hf-gqa", *asked[:2], str(folder / "run/student"), *asked[2:], *flags]
    try:
        cli.main()
    except SystemExit as end:
        os._exit(end.code or 0)
    os._exit(99)


def state(folder, process):
    code = os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
    file, names = folder / "run/student/model.safetensors", sorted(path.name for path in (folder / "run").glob("*"))
    sha256 = hashlib.sha256(file.read_bytes()).hexdigest() if file.exists() else None
    checkpoints = sorted(path.name for path in (folder / "run").glob("*.unfinished/*"))
    found = {"code": code, "sha256": sha256, "names": names, "checkpoints": checkpoints}
    return found | {"stderr": (folder / "err").read_text(), "stdout": (folder / "out").read_text()}


def stopped(moment, flags):
    folder = scratch / " ".join([moment, *flags])
    folder.mkdir()
    process = command(folder, moment, *flags)
    if moment.startswith("SIG"):
        while not list(folder.glob("run/*.unfinished/checkpoint-3/checkpoint_record.json")):
            time.sleep(0.01)
        os.kill(process, getattr(signal, moment))
    first = state(folder, process)
    if moment == "never":
        return [first]
    how = [] if moment in ("in the second step", "before the first record") else ["--resume"]
    return [first, state(folder, command(folder, "never", *how, *flags))]


print(json.dumps({" ".join([moment, *flags]): stopped(moment, flags) for moment, flags in json.loads(sys.argv[3])}))
"""


KILLED = ["in the second step", "before the first record", "between checkpoints", "in the second checkpoint"]
KILLED += ["before the second record", "while rotating", "before the export", "before the rename", "after the rename"]
OTHERS = ["SIGTERM", "SIGINT", "disk full at a checkpoint", "disk full at the end"]
KINDS = [[], ["--lora-rank", "2"], ["--streaming"], ["--objective", "echo"], ["--export", "best", "--eval-steps", "2"]]
RUNS = [(moment, []) for moment in (*KILLED, *OTHERS)]
RUNS += [(moment, kind) for kind in KINDS for moment in ("never", *(["between checkpoints"] if kind else []))]


@pytest.fixture(scope="module")
def stopped(tmp_path_factory, folders) -> dict[str, list[dict]]:
    """What runs in processes of their own left behind, stopped at every moment, and then what the next run made of it."""
    scratch = tmp_path_factory.mktemp("stopped")
    asked = list(map(str, arguments_of(folders, "-", eval_file=folders.root / "eval.txt")))
    environment = {"PYTHONPATH": str(Path(hf_gqa.__file__).parents[1]), "HF_HUB_OFFLINE": "1"}
    environment |= {"HF_DATASETS_CACHE": str(scratch / "cache"), "TOKENIZERS_PARALLELISM": "false"}
    run = subprocess.run(
        [sys.executable, "-c", STOPPED_RUNS, scratch, json.dumps([*asked[:2], *asked[3:]]), json.dumps(RUNS)],
        **{"env": os.environ | environment, "capture_output": True, "text": True, "timeout": 400},
    )
    assert run.returncode == 0, run.stderr
    return json.loads(run.stdout.strip().splitlines()[-1])


def assert_finished(last: dict, whole: dict) -> None:
    assert (last["code"], last["names"]) == (0, ["student"]), last["stderr"]
    assert all(line.startswith("Resuming from ") for line in last["stderr"].splitlines())
    assert last["sha256"] == whole["sha256"] is not None
    assert "it/s" not in last["stdout"] and "Wrote " in last["stdout"]


@pytest.mark.slow
@pytest.mark.parametrize("kind", [" ".join(kind) for kind in KINDS])
def test_killed_run_of_every_kind_ends_as_if_nothing_had_happened(stopped, kind):
    whole, (first, last) = stopped[f"never {kind}".strip()][0], stopped[f"between checkpoints {kind}".strip()]
    assert_finished(whole, whole)
    assert (first["code"], first["sha256"]) == (-signal.SIGKILL, None)
    assert_finished(last, whole)


@pytest.mark.slow
@pytest.mark.parametrize("moment", KILLED)
def test_run_killed_at_any_moment_is_resumed(stopped, moment):
    whole, (first, last) = stopped["never"][0], stopped[moment]
    assert first["code"] == -signal.SIGKILL
    if moment == "after the rename":
        assert first["sha256"] == whole["sha256"] and last["code"] == 2 and "student: exists." in last["stderr"]
    else:
        assert first["sha256"] is None and "student" not in first["names"]
        assert_finished(last, whole)


@pytest.mark.slow
@pytest.mark.parametrize(("moment", "codes"), [("SIGTERM", [128 + signal.SIGTERM]), ("SIGINT", [1, 130])])
def test_run_that_is_asked_to_end_can_be_resumed(stopped, moment, codes):
    first, last = stopped[moment]
    assert first["code"] in codes and "Traceback" not in first["stderr"] and first["names"] == ["student.unfinished"]
    assert_finished(last, stopped["never"][0])


@pytest.mark.slow
@pytest.mark.parametrize(("moment", "kept"), [("at a checkpoint", "checkpoint-3"), ("at the end", "checkpoint-8")])
def test_full_disk_is_one_message_and_the_run_can_be_resumed(stopped, moment, kept):
    first, last = stopped[f"disk full {moment}"]
    assert first["code"] == 3 and first["names"] == ["student.unfinished"] and kept in first["checkpoints"]
    assert first["stderr"].startswith("hf-gqa: ") and first["stderr"].count("\n") == 1, first["stderr"]
    assert_finished(last, stopped["never"][0])
