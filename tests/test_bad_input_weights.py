"""Weights that must be refused, and old or odd ones that must not be."""

import json
import pickle
import shutil
import struct
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from hf_gqa.cli.printing import SYSTEM_FAILED

from .command_line import assert_one_message, assert_refused, run_cli
from .donor_folders import edit_json, files_of, write_donor
from .donor_folders import write_sharded_donor as sharded_donor


INDEX = "model.safetensors.index.json"
KEY = "model.layers.1.self_attn.k_proj.weight"
MLP = "model.layers.1.mlp.up_proj.weight"


class Bomb:
    """Unpickling it makes a folder."""

    def __init__(self, marker: Path):
        self.marker = marker

    def __reduce__(self):
        return Path.mkdir, (self.marker,)


def edit_tensors(donor: Path, change) -> Path:
    """Apply `change` to the dictionary of the donor's tensors and write it back."""
    tensors = load_file(donor / "model.safetensors")
    change(tensors)
    save_file(tensors, donor / "model.safetensors", metadata={"format": "pt"})
    return donor


def edit_weight_map(donor: Path, change) -> Path:
    weight_map = json.loads((donor / INDEX).read_text())["weight_map"]
    change(weight_map)
    edit_json(donor / INDEX, weight_map=weight_map)
    return donor


def converts(donor: Path, output: Path) -> dict[str, torch.Tensor]:
    result = run_cli("convert", donor, output, "--num-key-value-heads", 2)
    assert result.exit_code == 0, result.stderr
    return {name: tensor for file in output.glob("*.safetensors") for name, tensor in load_file(file).items()}


@pytest.mark.parametrize("command", ["inspect", "convert", "verify"])
def test_pickled_weights_are_refused_and_never_unpickled(tmp_path, command):
    donor, marker = write_donor(tmp_path / "donor"), tmp_path / "marker"
    (donor / "pytorch_model.bin").write_bytes(pickle.dumps(Bomb(marker)))
    pickle.loads((donor / "pytorch_model.bin").read_bytes())
    marker.rmdir()  # so the bomb is armed
    student = tmp_path / "student"
    converts(donor, student)
    assert not (student / "pytorch_model.bin").exists()  # beside safetensors it is neither read nor carried along
    (donor / "model.safetensors").unlink()
    before = files_of(tmp_path)
    arguments = {
        "inspect": ["inspect", donor],
        "convert": ["convert", donor, tmp_path / "new", "--num-key-value-heads", 2],
        "verify": ["verify", student, "--donor", donor],
    }
    result = run_cli(*arguments[command])
    words = ["the weights are pickled (pytorch_model.bin)", "unpickling runs whatever code", "writes safetensors"]
    assert_one_message(result, 2, *words)
    assert files_of(tmp_path) == before and not marker.exists()


def test_no_weights_are_refused(tmp_path):
    donor = write_donor(tmp_path / "donor")
    (donor / "model.safetensors").unlink()
    assert_refused(donor, tmp_path, "no weights. Expected model.safetensors or model.safetensors.index.json")


@pytest.mark.parametrize(
    "damage",
    [
        lambda good: good[:-100],
        lambda good: good[:200],
        lambda good: good[:3],
        lambda good: b"",
        lambda good: bytes(range(256)) * 8,
        lambda good: struct.pack("<Q", 2**62) + good[8:],
        lambda good: struct.pack("<Q", 16) + b'{"a": [1, 2, 3]}' + good[8:],
    ],
    ids=["last bytes", "header only", "three bytes", "empty", "garbage", "huge header", "header of something else"],
)
def test_damaged_safetensors_file_is_refused(tmp_path, damage):
    donor = write_donor(tmp_path / "donor")
    file = donor / "model.safetensors"
    file.write_bytes(damage(file.read_bytes()))
    words = ["model.safetensors: not a readable safetensors file (", "truncated or corrupt", "download it again"]
    assert_refused(donor, tmp_path, *words)


def test_damaged_shard_is_refused_by_name(tmp_path):
    donor = sharded_donor(tmp_path / "donor")
    shard = sorted(donor.glob("model-*.safetensors"))[1]
    shard.write_bytes(shard.read_bytes()[:-8])
    assert_refused(donor, tmp_path, f"{shard.name}: not a readable safetensors file (")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("{", ["index.json: not readable JSON (", "Download the donor again"]),
        ("[]", ["index.json: not an index (", "Expected an object with 'weight_map'"]),
        ("{}", ["index.json: not an index (", "Expected an object with 'weight_map'"]),
        ('{"weight_map": ["a"]}', ["index.json: not an index ("]),
        ('{"weight_map": {"a": [1]}}', ["index.json: not an index ("]),
        ('{"weight_map": {}}', ["'weight_map' is empty"]),
        ('{"weight_map": {"a": 7}}', ["shard 7 is not a file name inside the folder"]),
    ],
)
def test_index_is_refused(tmp_path, text, words):
    donor = sharded_donor(tmp_path / "donor")
    (donor / INDEX).write_text(text)
    assert_refused(donor, tmp_path, *words)


@pytest.mark.parametrize("place", ["{other}/model.safetensors", "../other/model.safetensors", "sub/model.safetensors"])
def test_index_that_leaves_the_folder_is_not_followed(tmp_path, place):
    donor, other = sharded_donor(tmp_path / "donor"), write_donor(tmp_path / "other")
    shutil.copytree(other, donor / "sub")
    file = place.format(other=other)
    edit_weight_map(donor, lambda weight_map: weight_map.update({KEY: file}))
    assert_refused(donor, tmp_path, f"shard '{file}' is not a file name inside the folder. Refusing to follow it.")


def test_index_that_names_a_missing_shard_is_refused(tmp_path):
    donor = sharded_donor(tmp_path / "donor")
    shard = sorted(donor.glob("model-*.safetensors"))[1]
    shard.unlink()
    assert_refused(donor, tmp_path, f"{INDEX}: shard '{shard.name}' is missing. Download the donor again.")


def test_index_that_names_a_tensor_the_shard_lacks_is_refused(tmp_path):
    donor = sharded_donor(tmp_path / "donor")
    last = max(path.name for path in donor.glob("model-*.safetensors"))
    edit_weight_map(donor, lambda weight_map: weight_map.update(more=last))
    assert_refused(donor, tmp_path, f"says that 'more' is in {last}, which does not hold it (1 such tensors)")


def test_index_that_omits_a_tensor_is_refused(tmp_path):
    donor = sharded_donor(tmp_path / "donor")
    edit_weight_map(donor, lambda weight_map: weight_map.pop(KEY))
    assert_refused(donor, tmp_path, f"{INDEX}: does not list '{KEY}', which model-000", "download both again")


def test_tensor_that_two_shards_hold_is_refused(tmp_path):
    """Which of the two is the donor's cannot be known."""
    donor = sharded_donor(tmp_path / "donor")
    weight_map = json.loads((donor / INDEX).read_text())["weight_map"]
    other = next(file for file in sorted(set(weight_map.values())) if file != weight_map[KEY])
    tensors = load_file(donor / other) | {KEY: torch.zeros(32, 32)}
    save_file(tensors, donor / other, metadata={"format": "pt"})
    assert_refused(donor, tmp_path, KEY, other, weight_map[KEY])


def test_tensor_under_two_names_is_refused(tmp_path):
    """With and without the base model's prefix: which of the two is the donor's cannot be known."""
    donor = write_donor(tmp_path / "donor")
    edit_tensors(donor, lambda tensors: tensors.update({KEY.removeprefix("model."): torch.zeros(32, 32)}))
    assert_refused(donor, tmp_path, KEY)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("name", [KEY, MLP])
def test_nan_and_inf_are_refused(tmp_path, name, value, dtype):
    donor = write_donor(tmp_path / "donor")

    def damage(tensors):
        tensors.update({key: tensor.to(dtype) for key, tensor in tensors.items()})
        tensors[name][3, 5] = value

    edit_tensors(donor, damage)
    elements = load_file(donor / "model.safetensors")[name].numel()
    words = [f"'{name}' holds 1 NaN or Inf of {elements} values", "The donor is damaged"]
    assert_refused(donor, tmp_path, *words)


def test_infinities_that_cancel_are_refused(tmp_path):
    def damage(tensors):
        tensors[MLP][0, 0], tensors[MLP][0, 1] = float("inf"), float("-inf")

    assert_refused(edit_tensors(write_donor(tmp_path / "donor"), damage), tmp_path, f"'{MLP}' holds 2 NaN or Inf")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_large_finite_values_whose_sum_overflows_are_kept(tmp_path, dtype):
    def enlarge(tensors):
        tensors.update({name: tensor.to(dtype) for name, tensor in tensors.items()})
        for name in (MLP, KEY.replace("k_proj", "q_proj")):
            tensors[name][:] = torch.finfo(dtype).max

    donor = edit_tensors(write_donor(tmp_path / "donor"), enlarge)
    written = converts(donor, tmp_path / "student")
    assert torch.equal(written[MLP], load_file(donor / "model.safetensors")[MLP])


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"hidden_size": 64}, ["has shape [99, 32], but its configuration says [99, 64]"]),
        ({"num_key_value_heads": 2}, ["k_proj.weight' has shape [32, 32], but its configuration says [16, 32]"]),
        ({"vocab_size": 98}, ["has shape [99, 32], but its configuration says [98, 32]"]),
    ],
)
def test_shapes_that_contradict_the_configuration_are_refused(tmp_path, values, words):
    donor = write_donor(tmp_path / "donor")
    edit_json(donor / "config.json", **values)
    assert_refused(donor, tmp_path, *words, "Weights and config.json are not of the same model")


@pytest.mark.parametrize("name", [KEY, MLP, "lm_head.weight"])
def test_missing_tensor_is_refused(tmp_path, name):
    donor = edit_tensors(write_donor(tmp_path / "donor"), lambda tensors: tensors.pop(name))
    words = [
        f"{name.removeprefix('model.')}' of LlamaForCausalLM is missing (1 such tensors)",
        "Download the donor again",
    ]
    assert_refused(donor, tmp_path, *words)


@pytest.mark.parametrize("name", ["model.layers.7.mlp.up_proj.weight", "model.layers.0.self_attn.k_proj.bias", "extra"])
def test_unexpected_tensor_is_refused(tmp_path, name):
    donor = edit_tensors(write_donor(tmp_path / "donor"), lambda tensors: tensors.update({name: torch.ones(4)}))
    assert_refused(donor, tmp_path, f"'{name}' is no tensor of LlamaForCausalLM (1 such tensors)", "save it again")


@pytest.mark.parametrize(
    ("dtype", "stored"), [(torch.int8, "I8"), (torch.uint8, "U8"), (torch.float8_e4m3fn, "F8_E4M3")]
)
def test_quantized_tensors_are_refused(tmp_path, dtype, stored):
    donor = edit_tensors(write_donor(tmp_path / "donor"), lambda tensors: tensors.update({KEY: tensors[KEY].to(dtype)}))
    words = [f"'{KEY}' is stored as {stored}, which looks quantized", "Convert the original weights"]
    assert_refused(donor, tmp_path, *words)


@pytest.mark.parametrize(
    ("model_type", "layer", "old"),
    [
        ("llama", "model.layers.{}.self_attn.", {"rotary_emb.inv_freq": torch.ones(4)}),
        ("gpt2", "transformer.h.{}.attn.", {"bias": torch.ones(1, 1, 64, 64, dtype=torch.bool)}),
        ("gpt2", "transformer.h.{}.attn.", {"bias": torch.ones(1, 1, 64, 64), "masked_bias": torch.tensor(-1e4)}),
    ],
)
def test_old_buffers_are_dropped_silently(tmp_path, model_type, layer, old):
    donor = write_donor(tmp_path / "donor", model_type)
    plain = converts(donor, tmp_path / "plain")
    buffers = {layer.format(idx) + name: tensor.clone() for idx in range(2) for name, tensor in old.items()}
    edit_tensors(donor, lambda tensors: tensors.update(buffers))
    result = run_cli("convert", donor, tmp_path / "student", "--num-key-value-heads", 2)
    assert result.exit_code == 0 and result.stderr == "", result.stderr
    written = load_file(tmp_path / "student/model.safetensors")
    assert written.keys() == plain.keys()
    assert all(torch.equal(written[name], tensor) for name, tensor in plain.items())


def test_unreadable_folder_is_a_system_failure(tmp_path, monkeypatch):
    donor = write_donor(tmp_path / "donor")

    def failing(path, *args, **kwargs):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(Path, "read_text", failing)
    assert_one_message(run_cli("inspect", donor), SYSTEM_FAILED, "Permission denied", "config.json")
