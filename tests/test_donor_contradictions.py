"""Donors whose files contradict each other, or say more than a conversion reads: right, or refused; never in silence."""

import json
import os

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from hf_gqa import convert_checkpoint, open_donor, verify

from .command_line import assert_refused
from .donor_folders import edit_json, write_donor, write_sharded_donor


def config_text(folder) -> str:
    return (folder / "config.json").read_bytes().decode()


@pytest.mark.parametrize("rope", [{"rope_scaling": {"type": "linear", "factor": 4.0}}, {}])
def test_native_student_s_config_is_the_donor_s_but_for_the_plan_byte_for_byte(tmp_path, rope):
    """Also in nested values, spaces, the order of keys and characters that JSON could write otherwise."""
    donor = write_donor(tmp_path / "donor")
    values = json.loads(config_text(donor))
    unsorted = dict(reversed(values.items())) | rope | {"note": "\u00e4", "nested": {"b": [1, 2], "a": None}}
    if rope:
        del unsorted["rope_parameters"]
    text = json.dumps(unsorted, indent=3, ensure_ascii=False).replace('"note": ', '"note":   ') + "\r\n"
    (donor / "config.json").write_bytes(text.encode())
    convert_checkpoint(donor, tmp_path / "student", num_key_value_heads=2)
    assert config_text(tmp_path / "student") == text.replace('"num_key_value_heads": 4', '"num_key_value_heads": 2')
    assert config_text(donor) == text


def test_keys_that_a_donor_lacks_or_that_name_its_code_are_added_and_removed(tmp_path):
    donor = write_donor(tmp_path / "donor")
    edit_json(donor / "config.json", remove=("num_key_value_heads",), auto_map={"AutoModel": "a.B"}, _name_or_path="x")
    convert_checkpoint(donor, tmp_path / "student", num_key_value_heads=2, weights_only=True)
    before, after = json.loads(config_text(donor)), json.loads(config_text(tmp_path / "student"))
    assert after == {k: v for k, v in before.items() if k not in ("auto_map", "_name_or_path")} | {
        "num_key_value_heads": 2
    }
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "student").config.num_key_value_heads == 2


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")  # peft's
def test_an_adapter_beside_the_weights_is_refused_with_the_lines_that_merge_it(tmp_path):
    donor = write_donor(tmp_path / "donor")
    model = AutoModelForCausalLM.from_pretrained(donor)
    get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"])).save_pretrained(tmp_path / "adapter")
    words = ["adapter_config.json: here is an adapter (peft)", ".merge_and_unload().save_pretrained('merged')"]
    assert_refused(tmp_path / "adapter", tmp_path, *words)
    for file in (tmp_path / "adapter").glob("adapter_*"):
        os.link(file, donor / file.name)
    assert_refused(donor, tmp_path, *words)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"sliding_window": 6}, ["sliding_window = 6 changes attention", "'llama' has no such field", "mistral"]),
        ({"num_labels": 2**62}, ["num_labels = 4,611,686,018,427,387,904, allowed are 1,000,000"]),
        ({"num_labels": 10**20}, ["config.json: not readable JSON (it holds a whole number of 67 bits"]),
        ({"partial_rotary_factor": {"a": 1}}, ["what its configuration says of rotary positions cannot be read"]),
    ],
)
def test_configuration_that_no_class_can_follow_is_refused(tmp_path, changes, words):
    donor = write_donor(tmp_path / "donor")
    edit_json(donor / "config.json", **changes)
    assert_refused(donor, tmp_path, *words)


def test_index_that_transformers_would_stumble_over_is_refused(tmp_path):
    donor = write_sharded_donor(tmp_path / "donor")
    edit_json(donor / "model.safetensors.index.json", metadata=["a list"])
    assert_refused(donor, tmp_path, "index.json: 'metadata' is no object")


def test_verify_says_that_a_student_was_resized(tmp_path):
    donor = write_donor(tmp_path / "donor")
    convert_checkpoint(donor, tmp_path / "student", num_key_value_heads=2)
    student = AutoModelForCausalLM.from_pretrained(tmp_path / "student")
    student.resize_token_embeddings(120, mean_resizing=False)
    student.save_pretrained(tmp_path / "student")
    failed = [check for check in verify(tmp_path / "student", open_donor(donor)) if check.passed is False]
    assert [check.detail for check in failed] == ["the student predicts 120 tokens, the donor 99: it was resized since"]


@pytest.mark.parametrize("calibrated", [False, True])
def test_tied_donor_that_stores_only_its_head_converts_as_the_one_that_stores_the_embedding(tmp_path, calibrated):
    """transformers loads both alike."""
    donor = write_donor(tmp_path / "donor", tie_word_embeddings=True)
    plan = {"num_key_value_heads": 2}
    if calibrated:
        plan |= {"method": "group,fold,refit", "calibration": torch.arange(192).remainder(97).view(8, 24)}
    convert_checkpoint(donor, tmp_path / "expected", **plan)
    tensors = load_file(donor / "model.safetensors")
    tensors["lm_head.weight"] = tensors.pop("model.embed_tokens.weight")
    save_file(tensors, donor / "model.safetensors", metadata={"format": "pt"})
    convert_checkpoint(donor, tmp_path / "student", **plan)
    found, expected = (AutoModelForCausalLM.from_pretrained(tmp_path / name) for name in ("student", "expected"))
    for (name, one), other in zip(found.state_dict().items(), expected.state_dict().values(), strict=True):
        assert torch.equal(one, other), name
