"""Mixtures of experts on disk: every layout that transformers loads, and experts that pass through bit for bit."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from hf_gqa import Refusal, convert, convert_checkpoint, open_donor

from .conformance import assert_same_tensors, logits_of
from .tiny_donors import tiny_donor


MIXTURES = ["mixtral", "qwen3_moe"]
LAYOUTS = ["published", "of the class"]
every_mixture = pytest.mark.parametrize("model_type", MIXTURES)
every_layout = pytest.mark.parametrize("layout", LAYOUTS)


def stored_donor(model_type: str, layout: str, folder: Path):
    """A donor on disk with each expert by itself, as published and as `save_pretrained` writes it, or as in memory."""
    donor = tiny_donor(model_type)
    donor.save_pretrained(folder)
    names = load_file(folder / "model.safetensors").keys()
    assert any(".experts.3." in name for name in names) and not any("gate_up_proj" in name for name in names)
    if layout != "published":
        save_file(donor.state_dict(), folder / "model.safetensors", metadata={"format": "pt"})
    return donor


@every_mixture
@every_layout
@pytest.mark.parametrize("export", ["native", "bundle"])
def test_experts_pass_through_and_the_student_loads(model_type, layout, export, tmp_path):
    donor = stored_donor(model_type, layout, tmp_path / "donor")
    convert_checkpoint(tmp_path / "donor", tmp_path / "student", num_key_value_heads=2, export=export)
    before, after = (load_file(tmp_path / folder / "model.safetensors") for folder in ("donor", "student"))
    assert after.keys() == before.keys()
    outside = [name for name in before if "_proj" not in name or "experts" in name]
    assert len(outside) > 10 or layout != "published"
    assert_same_tensors({name: after[name] for name in outside}, {name: before[name] for name in outside})
    expected = convert(donor, num_key_value_heads=2, export=export)
    student, loading = AutoModelForCausalLM.from_pretrained(tmp_path / "student", output_loading_info=True)
    assert type(student) is type(expected) and not any(loading.values())
    assert_same_tensors(student.state_dict(), expected.state_dict())
    assert torch.equal(logits_of(student), logits_of(expected))


@pytest.mark.slow
@every_mixture
def test_bundle_keeps_its_experts_when_it_is_saved_again(model_type, tmp_path):
    donor = stored_donor(model_type, "published", tmp_path / "donor")
    convert_checkpoint(tmp_path / "donor", tmp_path / "student", num_key_value_heads=2, export="bundle")
    program = (
        "import json, sys; sys.modules['hf_gqa'] = None\n"
        "from transformers import AutoModelForCausalLM\n"
        "load = lambda f: AutoModelForCausalLM.from_pretrained(f, trust_remote_code=True, output_loading_info=True)\n"
        "student, loading = load('student'); assert not any(loading.values()), loading\n"
        "student.save_pretrained('again'); again, loading = load('again'); assert not any(loading.values()), loading\n"
        "assert all((p == q).all() for p, q in zip(student.parameters(), again.parameters(), strict=True))\n"
        "print(json.dumps(type(again).__name__))"
    )
    environment = os.environ | {"HF_MODULES_CACHE": str(tmp_path / "modules"), "PYTHONPATH": "", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, cwd=tmp_path, env=environment, check=False
    )
    assert done.returncode == 0, done.stderr
    assert (
        json.loads(done.stdout.splitlines()[-1])
        == type(convert(donor, num_key_value_heads=2, export="bundle")).__name__
    )
    assert (
        load_file(tmp_path / "again" / "model.safetensors").keys()
        == load_file(tmp_path / "donor" / "model.safetensors").keys()
    )


@every_mixture
def test_tied_experts_are_refused_where_they_are_stored_one_by_one(model_type, tmp_path):
    donor = stored_donor(model_type, "published", tmp_path / "donor")
    plan = {"num_key_value_heads": 2, "share_every": 2}
    with pytest.raises(Refusal, match=r"^sharing = albert: ties feed-forwards, .* Use albert_attention, or convert"):
        convert_checkpoint(tmp_path / "donor", tmp_path / "student", sharing="albert", **plan)
    convert_checkpoint(tmp_path / "donor", tmp_path / "student", sharing="albert_attention", **plan)
    expected = convert(donor, sharing="albert_attention", **plan)
    student = AutoModelForCausalLM.from_pretrained(tmp_path / "student")
    assert torch.equal(logits_of(student), logits_of(expected))


@every_mixture
def test_a_missing_expert_is_refused(model_type, tmp_path):
    stored_donor(model_type, "published", tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    lost = next(name for name in tensors if ".experts.2." in name)
    save_file({name: t for name, t in tensors.items() if name != lost}, tmp_path / "model.safetensors")
    with pytest.raises(Refusal, match=rf"'{lost.removeprefix('model.')}' of .* is missing"):
        open_donor(tmp_path)


@every_mixture
def test_experts_in_two_layouts_are_refused(model_type, tmp_path):
    donor = stored_donor(model_type, "published", tmp_path)
    name = "model.layers.0.mlp.experts.gate_up_proj"
    tensors = load_file(tmp_path / "model.safetensors") | {name: donor.state_dict()[name]}
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(Refusal, match=rf"'{name}' is no tensor of"):
        open_donor(tmp_path)
