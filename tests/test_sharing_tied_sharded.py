"""FSDP2 over students whose layers hold one weight: sharded together they train as one process does, one by one they are refused."""

import shutil

import pytest
import torch
from safetensors.torch import load_file

from hf_gqa import convert_checkpoint

from .sharing_students import deep_donor
from .two_processes import distance, facts_in, in_this_process, numbers_of, torchrun


PHASES = [{"objective": {"kl": 0.7, "cross_entropy": 0.3}, "learning_rate": 0.3, "attention_learning_rate": 1.5}]


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pair")
    deep_donor("llama").double().save_pretrained(folder / "donor")
    convert_checkpoint(folder / "donor", folder / "student", sharing="albert", share_every=3)
    return folder


@pytest.mark.slow
def test_layers_sharded_together_stay_tied(pair, tmp_path):
    scenarios = {"run": {"phases": PHASES, "steps": 4, "fsdp": {"auto_wrap_policy": "NO_WRAP"}}}
    one, two = (shutil.copytree(pair, tmp_path / way / "runs") for way in ("one", "fsdp2"))
    in_this_process(scenarios, one)
    torchrun(scenarios, two, "fsdp2")
    found, wanted = (facts_in(folder, "run") for folder in (two, one))
    assert found["sharded"] and found["world_size"] == 2 and found["refused"] == ["", ""]
    for ours, theirs in zip(found["log"], wanted["log"], strict=True):
        if "loss" in theirs:
            assert numbers_of(ours)["loss"] == pytest.approx(numbers_of(theirs)["loss"], rel=1e-6)
    weights, alone = (load_file(folder / "run.safetensors") for folder in (two, one))
    assert distance(weights, alone) < 1e-12
    start = load_file(pair / "student/model.safetensors")
    assert max((alone[name] - start[name]).abs().max().item() for name in start) > 1e-2
    name = "model.layers.{}.self_attn.q_proj.weight"
    assert torch.equal(weights[name.format(1)], weights[name.format(0)])


@pytest.mark.slow
def test_layers_wrapped_one_by_one_are_refused(pair, tmp_path):
    two = shutil.copytree(pair, tmp_path / "runs")
    with pytest.raises(
        AssertionError, match=r"wrapping layer by layer would part the two\. Set fsdp_auto_wrap_policy: NO_WRAP"
    ):
        torchrun({"run": {"phases": PHASES, "steps": 1}}, two, "fsdp2")
