"""Converting a model in memory and converting its folder give the same tensors, bit for bit, however they are sharded."""

import json
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModel

from hf_gqa import convert, convert_checkpoint
from hf_gqa.convert.families import load_family
from hf_gqa.methods import METHODS, method_kind
from hf_gqa.runtime.modeling_gqa_gpt2 import GQAGPT2ForCausalLM

from .conformance import (
    EXPORTS,
    HEAD_COUNT_METHODS,
    assert_same_tensors,
    every_decoder_storage,
    every_export,
    every_model,
    every_storage,
    grouped_donor,
    has_native_gqa,
    in_bfloat16,
    logits_of,
)
from .covering import each_value
from .students_on_disk import ONE_TENSOR_EACH, SEVERAL_EACH, assert_same_student, load, stored, written
from .tiny_donors import ALL_MODEL_TYPES, MODEL_TYPES, of_each_storage, tiny_donor


INDEX = "model.safetensors.index.json"


def assert_index_is_right(folder: Path) -> None:
    index = json.loads((folder / INDEX).read_text(encoding="utf-8"))
    files = stored(folder)
    assert index["weight_map"] == {name: file.name for name, file in files.items()}
    assert {file.name for file in folder.glob("*.safetensors")} == set(index["weight_map"].values())
    tensors = [tensor for file in folder.glob("*.safetensors") for tensor in load_file(file).values()]
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in tensors)
    assert index["metadata"]["total_parameters"] == sum(tensor.numel() for tensor in tensors)


def assert_attention_is_spread(folder: Path) -> None:
    """The case that needs care: what a method reads of one layer lies in more than one shard."""
    keys = "k_proj|v_proj|c_attn|self\\.key|self\\.value|k_lin|v_lin|Wqkv|Wo|qkv_proj|o_proj|query_key_value|dense|out_proj"
    heads = re.compile(rf"\.1\.\w+\.({keys})\.(weight|bias)$")
    assert len({file for name, file in stored(folder).items() if heads.search(name)}) > 1


@each_value(model_type=of_each_storage(ALL_MODEL_TYPES), export=EXPORTS, method=HEAD_COUNT_METHODS)
def test_every_method(model_type, export, method, tmp_path):
    needs_linear_scores = getattr(METHODS.get(method), "needs_linear_scores", False)
    if needs_linear_scores and load_family(model_type).donor_layout.query_norm is not None:
        pytest.skip("is refused")
    donor = grouped_donor(model_type) if method_kind(method) == "expand" else tiny_donor(model_type)
    plan = {"num_key_value_heads": 4 if method_kind(method) == "expand" else 2}
    plan |= {"method": method, "export": export, "seed": 7}
    manifest = convert_checkpoint(written(donor, tmp_path / "donor"), tmp_path / "student", **plan)
    student = convert(donor, **plan)
    assert_same_student(tmp_path / "student", student)
    assert manifest.model_class == type(student).__name__
    assert not torch.equal(logits_of(student), logits_of(donor)) or method_kind(method) == "expand"


@each_value(
    model_type=of_each_storage(ALL_MODEL_TYPES),
    export=EXPORTS,
    max_shard_size=[ONE_TENSOR_EACH, SEVERAL_EACH],
    num_key_value_heads=[2, 1],
)
def test_sharded_donor(model_type, export, max_shard_size, num_key_value_heads, tmp_path):
    donor = tiny_donor(model_type)
    folder = written(donor, tmp_path / "donor", max_shard_size=max_shard_size)
    if max_shard_size == ONE_TENSOR_EACH:
        assert_attention_is_spread(folder)
    plan = {"num_key_value_heads": num_key_value_heads, "export": export}
    convert_checkpoint(folder, tmp_path / "student", **plan)
    assert_index_is_right(tmp_path / "student")
    assert_same_student(tmp_path / "student", convert(donor, **plan))
    before, after = stored(folder), stored(tmp_path / "student")
    moved = [name for name in before.keys() & after.keys() if before[name].name != after[name].name]
    assert not moved, "a tensor of the donor's name stays in the donor's shard"


@every_model
@every_export
def test_sharded_bfloat16_donor(model_type, export, tmp_path):
    donor = in_bfloat16(tiny_donor(model_type))
    folder = written(donor, tmp_path / "donor", max_shard_size=SEVERAL_EACH)
    convert_checkpoint(folder, tmp_path / "student", num_key_value_heads=2, export=export)
    assert_index_is_right(tmp_path / "student")
    student = convert(donor, num_key_value_heads=2, export=export)
    assert student.dtype == torch.bfloat16
    assert_same_student(tmp_path / "student", student)
    for name, file in stored(tmp_path / "student").items():
        assert load_file(file)[name].dtype == torch.bfloat16


@every_decoder_storage
@every_export
def test_donor_cast_after_loading_keeps_its_dtype(model_type, export):
    """Its configuration still says bfloat16; the tensors decide."""
    donor = in_bfloat16(tiny_donor(model_type)).float()
    student = convert(donor, num_key_value_heads=2, export=export)
    assert student.dtype == student.config.dtype == torch.float32
    assert {tensor.dtype for tensor in student.state_dict().values()} == {torch.float32}


@every_decoder_storage
@every_export
def test_donor_of_several_dtypes_keeps_them(model_type, export, tmp_path):
    donor = in_bfloat16(tiny_donor(model_type))
    wide = [parameter for name, parameter in donor.named_parameters() if "norm" in name or ".ln_" in name]
    for parameter in wide:
        parameter.data = parameter.data.float() + 1e-3
    student = convert(donor, num_key_value_heads=2, export=export)
    folder = written(donor, tmp_path / "donor")
    convert_checkpoint(folder, tmp_path / "student", num_key_value_heads=2, export=export)
    # the files themselves: loading them as a model makes one dtype of them
    state = student.state_dict()
    on_disk = load_file(tmp_path / "student" / "model.safetensors")
    assert_same_tensors({name: state[name] for name in on_disk}, on_disk)
    kept = {name for name, tensor in on_disk.items() if tensor.dtype == torch.float32}
    assert kept == {name for name in on_disk if "norm" in name or ".ln_" in name} and wide


@each_value(model_type=of_each_storage(ALL_MODEL_TYPES), export=EXPORTS, max_shard_size=["1GB", ONE_TENSOR_EACH])
def test_donor_saved_from_the_base_model(model_type, export, max_shard_size, tmp_path):
    donor = tiny_donor(model_type, auto_class="AutoModel")
    folder = written(donor, tmp_path / "donor", max_shard_size=max_shard_size)
    assert not any(name.startswith(f"{donor.base_model_prefix}.") for name in stored(folder))
    convert_checkpoint(folder, tmp_path / "student", num_key_value_heads=2, export=export)
    student = convert(donor, num_key_value_heads=2, export=export)
    assert "For" not in type(student).__name__
    assert_same_student(tmp_path / "student", student, AutoModel)
    with_head = convert(tiny_donor(model_type), num_key_value_heads=2, export=export).base_model.state_dict()
    found = {name: tensor for name, tensor in student.state_dict().items() if not name.startswith("pooler.")}
    assert_same_tensors(found, with_head)


@every_storage
@every_export
def test_head_class_whose_tensors_lack_the_prefix(model_type, export, tmp_path):
    """As the original GPT-2 is stored, with buffers that the class rebuilds."""
    donor = tiny_donor(model_type)
    folder = written(donor, tmp_path / "donor")
    tensors = load_file(folder / "model.safetensors")
    bare = {name.removeprefix(f"{donor.base_model_prefix}."): tensor for name, tensor in tensors.items()}
    if model_type == "gpt2":
        bare |= {f"h.{layer_idx}.attn.bias": torch.ones(1, 1, 64, 64) for layer_idx in range(2)}
    save_file(bare, folder / "model.safetensors", metadata={"format": "pt"})
    convert_checkpoint(folder, tmp_path / "student", num_key_value_heads=2, export=export)
    assert_same_student(tmp_path / "student", convert(donor, num_key_value_heads=2, export=export))
    assert not [name for name in stored(tmp_path / "student") if name.endswith(".attn.bias")]


@each_value(model_type=of_each_storage(MODEL_TYPES), export=EXPORTS, num_key_value_heads=[2, 1, 4])
def test_bundle_as_donor(model_type, export, num_key_value_heads, tmp_path):
    """A student converted further, into a bundle or back into the native class."""
    donor = convert(tiny_donor(model_type), num_key_value_heads=2, export="bundle")
    plan = {"num_key_value_heads": num_key_value_heads, "export": export}
    plan["method"] = "expand" if num_key_value_heads == 4 else "mean_pool"
    folder = written(donor, tmp_path / "donor", max_shard_size=ONE_TENSOR_EACH)
    convert_checkpoint(folder, tmp_path / "student", **plan)
    assert_same_student(tmp_path / "student", convert(donor, **plan))


@each_value(model_type=of_each_storage(MODEL_TYPES), export=EXPORTS, tied=[True, False])
def test_embeddings_tied_or_not(model_type, export, tied, tmp_path):
    donor = tiny_donor(model_type, tie_word_embeddings=tied)
    convert_checkpoint(written(donor, tmp_path / "donor"), tmp_path / "student", num_key_value_heads=2, export=export)
    assert ("lm_head.weight" in stored(tmp_path / "student")) != tied
    assert_same_student(tmp_path / "student", convert(donor, num_key_value_heads=2, export=export))


@each_value(model_type=of_each_storage(MODEL_TYPES), export=EXPORTS, num_key_value_heads=[4, 2], training=[True, False])
def test_donor_in_memory_is_untouched(model_type, export, num_key_value_heads, training):
    donor = tiny_donor(model_type).train(training)
    before = {name: tensor.clone() for name, tensor in donor.state_dict().items()}
    config, generation = donor.config.to_dict(), donor.generation_config.to_dict()
    student = convert(donor, num_key_value_heads=num_key_value_heads, export=export)
    assert student.training is donor.training is training
    assert student.generation_config.to_dict() == generation
    ours, theirs = (
        {tensor.untyped_storage().data_ptr() for group in (model.parameters(), model.buffers()) for tensor in group}
        for model in (student, donor)
    )
    assert not ours & theirs
    with torch.no_grad():
        for parameter in student.parameters():
            parameter.add_(1)
    student.config.num_attention_heads = student.generation_config.max_length = 1
    assert_same_tensors(donor.state_dict(), before)
    assert (donor.config.to_dict(), donor.generation_config.to_dict()) == (config, generation)


@every_decoder_storage
@every_export
def test_donor_on_disk_is_untouched(model_type, export, tmp_path):
    folder = written(tiny_donor(model_type), tmp_path / "donor", max_shard_size=SEVERAL_EACH)
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    convert_checkpoint(folder, tmp_path / "student", num_key_value_heads=2, export=export)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


def stored_alike(model_type: str) -> bool:
    return has_native_gqa(model_type) and load_family(model_type).donor_layout.fused is None


@pytest.mark.parametrize("model_type", list(filter(stored_alike, MODEL_TYPES)))
def test_native_and_bundle_hold_the_same_tensors(model_type, tmp_path):
    folder = written(tiny_donor(model_type), tmp_path / "donor", max_shard_size=ONE_TENSOR_EACH)
    for export in ("native", "bundle"):
        convert_checkpoint(folder, tmp_path / export, num_key_value_heads=2, export=export)
    native, bundle = stored(tmp_path / "native"), stored(tmp_path / "bundle")
    assert {name: file.name for name, file in native.items()} == {name: file.name for name, file in bundle.items()}
    for name in native:
        assert torch.equal(load_file(native[name])[name], load_file(bundle[name])[name])


def test_reconverting_a_gpt2_bundle_in_shards_fuses_it_again(tmp_path):
    """Three projections in three shards become the one tensor of the native class."""
    donor = tiny_donor("gpt2")
    bundle = convert(donor, num_key_value_heads=4, export="bundle")
    assert type(bundle) is GQAGPT2ForCausalLM
    convert_checkpoint(
        written(bundle, tmp_path / "bundle", max_shard_size=ONE_TENSOR_EACH), tmp_path / "native", num_key_value_heads=4
    )
    assert_index_is_right(tmp_path / "native")
    assert_same_tensors(load(tmp_path / "native").state_dict(), donor.state_dict())


def test_a_single_shard_that_an_index_names_keeps_its_index(tmp_path):
    """Without the index, a file of that name would not be found."""
    donor, name = tmp_path / "donor", "model-00001-of-00001.safetensors"
    tiny_donor("llama").save_pretrained(donor)
    (donor / "model.safetensors").rename(donor / name)
    weight_map = dict.fromkeys(load_file(donor / name), name)
    (donor / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    convert_checkpoint(donor, tmp_path / "student", num_key_value_heads=2)
    assert_index_is_right(tmp_path / "student")
    assert load(tmp_path / "student").config.num_key_value_heads == 2
