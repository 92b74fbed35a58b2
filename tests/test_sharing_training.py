"""Students whose layers share are uptrained like any other: EchoAtt's stages, attention alone, sharded over two processes."""

import shutil

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from hf_gqa import convert_checkpoint
from hf_gqa.uptrain.freezing import trained_names
from hf_gqa.uptrain.objectives.distill import PHASES as ATTENTION_FIRST
from hf_gqa.uptrain.objectives.echo import PHASES as ECHO

from .sharing_students import deep_donor, sharing_student
from .two_processes import distance, facts_in, in_this_process, numbers_of, torchrun


STUDENTS = {
    "echo": {"sharing": "echo", "shared_layers": [2, 3, 5]},
    "cross": {"sharing": "cross_layer_kv", "shared_layers": [3, 4, 5], "num_key_value_heads": 2},
}
PHASES = {"echo": ECHO, "cross": ATTENTION_FIRST}
FASTER = {"learning_rate": 0.3, "attention_learning_rate": 1.5}
WRAPPERS = ("one", "fsdp2")


@pytest.fixture(scope="module", params=STUDENTS)
def runs(request, tmp_path_factory) -> dict:
    """The same training by one process and by two that shard the student, with checkpointing."""
    folder = tmp_path_factory.mktemp("pair")
    deep_donor("llama").double().save_pretrained(folder / "donor")
    convert_checkpoint(folder / "donor", folder / "student", **STUDENTS[request.param])
    phases = [phase.to_dict() | FASTER for phase in PHASES[request.param]]
    scenarios = {"run": {"phases": phases, "steps": 5, "checkpointing": True}}
    made = {way: shutil.copytree(folder, tmp_path_factory.mktemp(way) / "runs") for way in WRAPPERS}
    in_this_process(scenarios, made["one"])
    torchrun(scenarios, made["fsdp2"], "fsdp2")
    return made


@pytest.mark.slow
def test_two_processes_train_what_one_trains(runs):
    one, two = (facts_in(runs[way], "run") for way in WRAPPERS)
    assert (one["world_size"], two["world_size"], two["sharded"]) == (1, 2, True)
    assert not one["refusal"] and two["refused"] == ["", ""]
    for found, wanted in zip(two["log"], one["log"], strict=True):
        if "loss" in wanted:
            assert numbers_of(found)["loss"] == pytest.approx(numbers_of(wanted)["loss"], rel=1e-6)
    alone, sharded = (load_file(runs[way] / "run.safetensors") for way in WRAPPERS)
    assert distance(sharded, alone) < 1e-12
    start = load_file(runs["one"] / "student/model.safetensors")
    assert max((alone[name] - start[name]).abs().max().item() for name in start) > 1e-2
    losses = [entry["loss"] for entry in one["log"] if "loss" in entry]
    assert all(torch.isfinite(torch.tensor(losses)))


@pytest.mark.slow
def test_trained_student_loads(runs):
    """What is saved of training is a student like the one it began with."""
    trained = load_file(runs["one"] / "run.safetensors")
    student = AutoModelForCausalLM.from_pretrained(runs["one"] / "student", dtype=torch.float64)
    assert trained.keys() == student.state_dict().keys()


@pytest.mark.parametrize("plan", ["echo", "cross-layer", "albert"])
def test_attention_alone_is_what_a_phase_trains(plan):
    student = sharing_student("llama", plan)
    trained = trained_names(student, "attention")
    assert trained == {name for name, _ in student.named_parameters() if ".self_attn." in name}
    values = {name for name in trained if ".k_proj." in name or ".v_proj." in name}
    assert trained_names(student, "key_value") == values
