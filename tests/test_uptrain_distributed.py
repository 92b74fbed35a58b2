"""Two processes train what one trains on the same rows: losses, gradients, weights, evaluation, export, resume; and docs/scale.md.

Weights are float64, so they agree to rounding; losses are fp32 sums in another order. AdamW's epsilon is large there, for it would turn
rounding of gradients near zero into steps.
"""

import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import yaml
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils import DistributedType
from safetensors.torch import load_file

import hf_gqa
from hf_gqa import convert_checkpoint
from hf_gqa.uptrain.checkpoints import newest_complete
from hf_gqa.uptrain.recipe import UptrainRecipe
from hf_gqa.uptrain.run import uptrain
from tests.distributed_run import GLOBAL_ROWS, Rows
from tests.tiny_donors import tiny_donor

from .two_processes import TESTS, distance, facts_in, free_port, in_this_process, numbers_of, torchrun


EXAMPLES = TESTS.parent / "examples"
NEEDS_EXAMPLES = pytest.mark.skipif(not EXAMPLES.is_dir(), reason="the tests run without the checkout's examples")
WRAPPERS = {"ddp": "DistributedDataParallel", "fsdp2": "FSDPLlamaForCausalLM"}
MIXED = {"kl": 0.7, "cross_entropy": 0.3}
FORCED = {"attention_output": 1.0, "teacher_forced": True}
LAYERS = {"hidden_state": 1.0, "attention_output": 0.5}
RATES = {"learning_rate": 0.3, "attention_learning_rate": 1.5}
ATTENTION_FIRST = [{"objective": FORCED, "train": "attention"}, {"objective": LAYERS | MIXED, **RATES}]
QUICK = {
    "mixed": {"phases": [{"objective": MIXED, **RATES}], "accumulation": 2, "evaluate": True},
    "phases": {"phases": ATTENTION_FIRST, "checkpointing": True, "evaluate": True, "export": True},
    "forced": {"phases": [{"objective": FORCED, "train": "attention"}], "accumulation": 2},
}
SLOW = {
    "hidden": {"phases": [{"objective": {"hidden_state": 1.0}}]},
    "layers": {"phases": [{"objective": LAYERS, "train": "attention"}], "accumulation": 2, "checkpointing": True},
    "key value": {"phases": [{"objective": FORCED, "train": "key_value"}], "checkpointing": True},
    "there and back": {"phases": [*ATTENTION_FIRST, ATTENTION_FIRST[0]], "evaluate": True},
    "poison": {"phases": [{"objective": MIXED}], "poison": 3},
    "whole": {"phases": ATTENTION_FIRST, "evaluate": True},
    "stopped": {"phases": ATTENTION_FIRST, "evaluate": True, "save_steps": 2, "stop_after": 2},
    "resumed": {"phases": ATTENTION_FIRST, "evaluate": True, "save_steps": 2, "resume": True, "folder": "stopped"},
}


def launch(command: list[str], log: Path, **environment: str) -> str:
    """Run it in a process group of its own, which nothing survives."""
    paths = [str(Path(hf_gqa.__file__).parents[1]), str(TESTS.parent)]
    settings = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": "", "GLOO_SOCKET_IFNAME": "lo"}
    settings |= {"PYTHONPATH": os.pathsep.join(paths), **environment}
    with log.open("w") as file:
        process = subprocess.Popen(
            command, env=os.environ | settings, stdout=file, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            code = process.wait(timeout=300)
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
    printed = log.read_text(encoding="utf-8", errors="replace")
    assert code == 0, f"{shlex.join(command)}\n{printed[-8000:]}"
    return printed


def accelerate(config: Path, command: list) -> str:
    """With two processes and no mixed precision, whatever the file says."""
    options = ["--config_file", str(config), "--num_processes", "2", "--mixed_precision", "no"]
    options += ["--main_process_port", free_port(), *map(str, command)]
    with tempfile.TemporaryDirectory() as folder:
        return launch([sys.executable, "-m", "accelerate.commands.launch", *options], Path(folder) / "log.txt")


@pytest.fixture(scope="module")
def pair(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("pair")
    tiny_donor("llama").double().save_pretrained(folder / "donor")
    convert_checkpoint(folder / "donor", folder / "student", num_key_value_heads=2)
    return folder


def runs_of(scenarios: dict[str, dict]):
    """A fixture: the scenarios by one process, in "one", and by two, in "ddp" and "fsdp2"."""

    @pytest.fixture(scope="module")
    def runs(pair, tmp_path_factory) -> dict[str, Path]:
        made = {}
        for wrapper in ("one", *WRAPPERS):
            folder = shutil.copytree(pair, tmp_path_factory.mktemp(wrapper) / "runs")
            made[wrapper] = in_this_process(scenarios, folder) if wrapper == "one" else folder
        for wrapper in WRAPPERS:
            torchrun(scenarios, made[wrapper], wrapper)
        return made

    return runs


quick, slow = runs_of(QUICK), runs_of(SLOW)


def assert_same_log(found: list[dict], wanted: list[dict], rel: float = 1e-6, gradient: float = 1e-10) -> None:
    assert [entry["step"] for entry in found] == [entry["step"] for entry in wanted]
    for one, other in zip(map(numbers_of, found), map(numbers_of, wanted), strict=True):
        if "train_loss" in other:
            continue  # Trainer's mean of the losses above, of this process's own steps where it resumed
        assert one.keys() == other.keys()
        if "grad_norm" in other:
            assert one.pop("grad_norm") == pytest.approx(other.pop("grad_norm"), rel=gradient)
        if "eval_gap_closed_fraction" in other:  # a quotient of small differences
            assert one.pop("eval_gap_closed_fraction") == pytest.approx(other.pop("eval_gap_closed_fraction"), abs=1e-3)
        assert one == pytest.approx(other, rel=rel, abs=10 * rel)


def assert_same_run(runs: dict[str, Path], wrapper: str, name: str) -> dict:
    found, wanted = facts_in(runs[wrapper], name), facts_in(runs["one"], name)
    assert (wanted["world_size"], wanted["wrapper"], wanted["sharded"]) == (1, "LlamaForCausalLM", False)
    assert (found["world_size"], found["wrapper"]) == (2, WRAPPERS[wrapper])
    assert found["sharded"] == (wrapper == "fsdp2") and found["agree"]
    assert_same_log(found["log"], wanted["log"])
    weights, alone = (load_file(runs[way] / f"{name}.safetensors") for way in (wrapper, "one"))
    start = load_file(runs["one"] / "student/model.safetensors")
    assert distance(weights, alone) < 1e-13
    assert max((alone[key] - start[key]).abs().max().item() for key in start) > 1e-2
    return found


def test_processes_count_unequal_numbers_of_tokens():
    counts = [int((row["labels"] != -100).sum()) for row in Rows(2 * GLOBAL_ROWS, seed=1).rows]
    for step in (counts[:GLOBAL_ROWS], counts[GLOBAL_ROWS:]):
        first, second = sum(step[: GLOBAL_ROWS // 2]), sum(step[GLOBAL_ROWS // 2 :])
        assert abs(first - second) > 0.1 * (first + second)


@pytest.mark.parametrize("name", QUICK)
@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_two_processes_train_what_one_trains(quick, wrapper, name):
    found = assert_same_run(quick, wrapper, name)
    assert found["refused"] == ["", ""]


def test_teacher_uses_the_student_of_its_process(quick):
    one, two = (facts_in(quick[way], "forced") for way in ("one", "ddp"))
    assert two["teacher_shared_bytes"] == one["teacher_shared_bytes"] > one["teacher_own_bytes"] > 0


@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_exported_student_is_that_of_one_process(quick, wrapper):
    """A second process that wrote would meet the folder of the first, and refuse."""
    found, wanted = (quick[way] / "phases/export" for way in (wrapper, "one"))
    assert {path.name for path in found.iterdir()} == {path.name for path in wanted.iterdir()}
    assert distance(load_file(found / "model.safetensors"), load_file(wanted / "model.safetensors")) < 1e-13
    exported = load_file(found / "model.safetensors")
    assert distance(exported, {name: load_file(quick[wrapper] / "phases.safetensors")[name] for name in exported}) == 0
    assert (found / "config.json").read_text() == (wanted / "config.json").read_text()
    assert [path.name for path in found.parent.iterdir()] == ["export"]


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in SLOW if name not in ("stopped", "resumed")])
@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_two_processes_train_what_one_trains_in_every_other_way(slow, wrapper, name):
    found = assert_same_run(slow, wrapper, name)
    for refusal in found["refused"]:
        assert ("the gradient is not finite" in refusal) == (name == "poison")


@pytest.mark.slow
@pytest.mark.parametrize("wrapper", ["one", *WRAPPERS])
def test_a_resumed_run_is_one_that_never_stopped(slow, wrapper):
    folder = slow[wrapper]
    assert facts_in(folder, "stopped")["log"][-1]["step"] == 2
    found, wanted = (facts_in(folder, name)["log"] for name in ("resumed", "whole"))
    losses = [[entry for entry in log if "train_loss" not in entry] for log in (found, wanted)]
    assert_same_log(*losses, rel=1e-7)
    weights = [load_file(folder / f"{name}.safetensors") for name in ("resumed", "whole")]
    assert distance(*weights) < 1e-13
    for step in (2, 4, 6):
        scan = newest_complete(only(folder / "stopped", step))
        assert scan.newest is not None and scan.facts == {"data": "rows"} and scan.skipped == ()


def only(run_dir: Path, step: int) -> Path:
    """A folder with one checkpoint of the run."""
    made = run_dir.parent / f"only-{step}"
    shutil.copytree(run_dir / f"checkpoint-{step}", made / f"checkpoint-{step}")
    return made


@NEEDS_EXAMPLES
@pytest.mark.parametrize(("name", "kind"), [("ddp", DistributedType.MULTI_GPU), ("fsdp2", DistributedType.FSDP)])
def test_example_is_a_configuration_of_accelerate(name, kind):
    path = EXAMPLES / f"accelerate/{name}.yaml"
    config = load_config_from_file(str(path))
    assert (config.distributed_type, config.mixed_precision, config.num_processes) == (kind, "bf16", 8)
    arguments, _, _ = _validate_launch_command(launch_command_parser().parse_args(["--config_file", str(path), "x.py"]))
    wanted = yaml.safe_load(path.read_text(encoding="utf-8")).get("fsdp_config", {})
    assert {key: getattr(arguments, key) for key in wanted} == wanted and arguments.use_fsdp == bool(wanted)
    known = {action.dest for action in launch_command_parser()._actions}
    assert set(wanted) <= known


@pytest.mark.slow
@NEEDS_EXAMPLES
def test_example_shards(pair, tmp_path):
    folder, path = shutil.copytree(pair, tmp_path / "runs"), EXAMPLES / "accelerate/fsdp2.yaml"
    scenarios = {name: SLOW[name] for name in ("hidden", "key value")}
    (folder / "scenarios.json").write_text(json.dumps([{"name": n, **v} for n, v in scenarios.items()]))
    accelerate(path, [TESTS / "distributed_run.py", folder / "scenarios.json", folder, "accelerate fsdp2"])
    alone = in_this_process(scenarios, shutil.copytree(pair, tmp_path / "one"))
    for name in scenarios:
        assert_same_run({"fsdp2": folder, "one": alone}, "fsdp2", name)


@pytest.fixture(scope="module")
def commanded(tmp_path_factory) -> Path:
    """A student, a recipe, and the student that `hf_gqa.uptrain` makes of them in this process with twice the batch.

    The 29 rows of the budget do not go evenly into the batches of two processes.
    """
    folder = tmp_path_factory.mktemp("commanded")
    convert_checkpoint(EXAMPLES / "donor", folder / "student", num_key_value_heads=2)
    shutil.copy(TESTS.parent / "README.md", folder / "corpus.txt")
    values = {"teacher": str(EXAMPLES / "donor"), "train_file": [str(folder / "corpus.txt")], "budget_tokens": 900}
    values |= {"sequence_length": 32, "eval_tokens": 224, "logging_steps": 1, "eval_steps": 3}
    (folder / "recipe.yaml").write_text(yaml.safe_dump(values | {"per_device_train_batch_size": 2}))
    values |= {"train_file": tuple(values["train_file"]), "per_device_train_batch_size": 4}
    uptrain(folder / "student", folder / "one", UptrainRecipe(**values))
    return folder


@pytest.mark.slow
@NEEDS_EXAMPLES
@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_command_under_accelerate_launch(commanded, tmp_path, wrapper):
    """As the examples say for CPU processes; the sharded one with the command in a script that lets gloo shard."""
    text = (EXAMPLES / f"accelerate/{wrapper}.yaml").read_text(encoding="utf-8")
    (tmp_path / "cpu.yaml").write_text(text.replace("use_cpu: false", "use_cpu: true"), encoding="utf-8")
    script = TESTS / "distributed_run.py" if wrapper == "fsdp2" else Path(sys.executable).with_name("hf-gqa")
    student, output, recipe = commanded / "student", tmp_path / "two", commanded / "recipe.yaml"
    printed = accelerate(tmp_path / "cpu.yaml", [script, "uptrain", student, output, "--config", recipe])
    assert "8 steps of 128" in printed and printed.count("Wrote ") == 1
    logs = [json.loads((folder / "uptraining.json").read_text())["log"] for folder in (output, commanded / "one")]
    for entry in (entry for log in logs for entry in log):
        entry.pop("num_input_tokens_seen")  # Trainer's, filling included
    assert_same_log(*logs, rel=1e-4, gradient=1e-4)
    weights = [load_file(folder / "model.safetensors") for folder in (output, commanded / "one")]  # in bf16
    assert distance(*weights) < 1e-3 and not (tmp_path / "two.unfinished").exists()


@pytest.mark.skipif(not (TESTS.parent / "docs").is_dir(), reason="the tests run without the checkout's documents")
def test_tables_are_what_the_script_prints():
    script = TESTS.parent / "benchmarks/scale_plan.py"
    printed = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, check=True).stdout
    assert (TESTS.parent / "docs/scale.md").read_text(encoding="utf-8").endswith(f"## The tables\n\n{printed}")
