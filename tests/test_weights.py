"""Heads survive the way from a checkpoint's tensors to canonical form and back, in every layout."""

import re
from dataclasses import fields

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from hf_gqa.convert.families import load_family
from hf_gqa.runtime.attention_layout import AttentionLayout
from hf_gqa.weights.attention_weights import AttentionWeights
from hf_gqa.weights.checkpoint import SINGLE_FILE, Checkpoint, StateDict
from hf_gqa.weights.head_tensors import head_norms, head_tensor_names, read_heads, write_heads

from .oracle import split_of
from .tiny_donors import ALL_MODEL_TYPES, tiny_donor


LAYOUTS: dict[str, AttentionLayout] = {}
for _name in ALL_MODEL_TYPES:
    _family = load_family(_name)
    LAYOUTS |= {layout.model_type: layout for layout in (_family.donor_layout, _family.bundle_layout)}

every_layout = pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
shapes = given(
    K=st.integers(1, 3),
    G=st.integers(1, 3),
    D=st.integers(1, 4),
    E=st.integers(1, 5),
    input_bias=st.booleans(),
    output_bias=st.booleans(),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
)


def numbered(*shape: int, start: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """All values different, so that no two can be swapped unseen; exact in bfloat16 up to 256 of them."""
    count = torch.Size(shape).numel()
    return torch.arange(start, start + count, dtype=torch.float64).reshape(shape).to(dtype)


def numbered_heads(H, K, D, E, input_bias=True, output_bias=True, dtype=torch.float32, norms=False):
    wanted = {"query_HDE": (H, D, E), "key_KDE": (K, D, E), "value_KDE": (K, D, E), "output_EHD": (E, H, D)}
    if input_bias:
        wanted |= {"query_bias_HD": (H, D), "key_bias_KD": (K, D), "value_bias_KD": (K, D)}
    if output_bias:
        wanted |= {"output_bias_E": (E,)}
    if norms:
        wanted |= {"query_norm_HD": (H, D), "key_norm_KD": (K, D)}
    tensors, start = {}, 0
    for name, shape in wanted.items():
        tensors[name] = numbered(*shape, start=start, dtype=dtype)
        start += tensors[name].numel()
    return AttentionWeights(**tensors)


def assert_same_heads(found: AttentionWeights, expected: AttentionWeights) -> None:
    for field in fields(expected):
        one, other = getattr(found, field.name), getattr(expected, field.name)
        assert (one is None) == (other is None), field.name
        assert one is None or (one.dtype == other.dtype and torch.equal(one, other)), field.name


@every_layout
@settings(deadline=None, max_examples=40)
@shapes
def test_read_heads_inverts_write_heads(layout, K, G, D, E, input_bias, output_bias, dtype):
    K *= layout.fused_blocks or 1
    heads = numbered_heads(K * G, K, D, E, input_bias, output_bias, dtype, norms=bool(head_norms(layout)))
    tensors = write_heads(layout, heads)
    assert {re.sub(r"\.\d+\.", ".{head}.", name) for name in tensors} <= set(head_tensor_names(layout))
    assert all(tensor.is_contiguous() for tensor in tensors.values())
    found = read_heads(layout, tensors.get, num_attention_heads=K * G, head_dim=D)
    assert (found.num_attention_heads, found.num_key_value_heads) == (K * G, K)
    assert_same_heads(found, heads)


@every_layout
@settings(deadline=None, max_examples=40)
@shapes
def test_write_heads_inverts_read_heads(layout, K, G, D, E, input_bias, output_bias, dtype):
    """From tensors of the shapes the modules have: Linear `[out, in]`, Conv1D `[in, out]`."""
    K *= layout.fused_blocks or 1
    H = K * G
    rows = {layout.query: H * D, layout.key: K * D, layout.value: K * D}
    if layout.fused:
        rows = {layout.fused: (H + 2 * K) * D}
    stored, start = {}, 0
    for name, (out_size, in_size) in {**{n: (r, E) for n, r in rows.items()}, layout.output: (E, H * D)}.items():
        shape = (in_size, out_size) if name in layout.transposed else (out_size, in_size)
        stored[f"{name}.weight"] = numbered(*shape, start=start, dtype=dtype)
        if output_bias if name == layout.output else input_bias:
            stored[f"{name}.bias"] = numbered(out_size, start=start, dtype=dtype)
        start += out_size * in_size
    written = write_heads(layout, read_heads(layout, stored.get, num_attention_heads=H, head_dim=D))
    assert written.keys() == stored.keys()
    for name, tensor in stored.items():
        assert torch.equal(written[name], tensor), name


@pytest.mark.parametrize("model_type", ALL_MODEL_TYPES)
def test_heads_of_a_donor_project_as_its_modules_do(model_type):
    """The meaning of the canonical form, against the modules themselves and not against its own inverse."""
    donor = tiny_donor(model_type)
    family, config = load_family(model_type), donor.config
    layout = family.donor_layout
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    base = donor.base_model
    attention = base.get_submodule(layout.attention.format(layer_idx=1))
    heads = read_heads(layout, attention.state_dict().get, config.num_attention_heads, head_dim)
    hidden = torch.randn(5, config.hidden_size, generator=torch.Generator().manual_seed(0))
    if layout.fused:
        projected = attention.get_submodule(layout.fused)(hidden).t()
        parts = split_of(f"{layout.attention}.{layout.fused}", layout.fused in layout.transposed)(projected, head_dim)
        expected = [part.flatten(0, 1).t() for part in parts]
    else:
        expected = [attention.get_submodule(name)(hidden) for name in (layout.query, layout.key, layout.value)]
    weights = (heads.query_HDE, heads.key_KDE, heads.value_KDE)
    biases = (heads.query_bias_HD, heads.key_bias_KD, heads.value_bias_KD)
    for weight, bias, projected in zip(weights, biases, expected, strict=True):
        found = torch.einsum("te,hde->thd", hidden, weight) + (0 if bias is None else bias)
        torch.testing.assert_close(found.flatten(1), projected)
    mixed = torch.randn(5, config.num_attention_heads, head_dim, generator=torch.Generator().manual_seed(1))
    out = torch.einsum("thd,ehd->te", mixed, heads.output_EHD)
    out = out if heads.output_bias_E is None else out + heads.output_bias_E
    torch.testing.assert_close(out, attention.get_submodule(layout.output)(mixed.flatten(1)))


@pytest.mark.parametrize("model_type", [name for name in LAYOUTS if name in ALL_MODEL_TYPES])
def test_reading_copies_nothing(model_type):
    layout = LAYOUTS[model_type]
    tensors = write_heads(layout, numbered_heads(4, 4, 3, 12))
    stored = {tensor.untyped_storage().data_ptr() for tensor in tensors.values()}
    heads = read_heads(layout, tensors.get, num_attention_heads=4, head_dim=3)
    for field in fields(heads):
        if getattr(heads, field.name) is not None:
            assert getattr(heads, field.name).untyped_storage().data_ptr() in stored, field.name


def test_map_key_value_changes_keys_values_and_their_biases_alone():
    heads = numbered_heads(4, 2, 3, 5, norms=True)
    found = heads.map_key_value(lambda tensor_K: tensor_K + 1)
    for field in fields(heads):
        changed = field.name.startswith(("key", "value"))
        assert torch.equal(getattr(found, field.name), getattr(heads, field.name) + changed), field.name
    bare = numbered_heads(4, 2, 3, 5, input_bias=False, output_bias=False)
    assert bare.map_key_value(lambda tensor_K: tensor_K).key_bias_KD is None


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_checkpoint_and_state_dict_say_the_same(tmp_path, dtype):
    tensors = {"a.weight": numbered(3, 4, start=0, dtype=dtype), "b.bias": numbered(5, start=20, dtype=dtype)}
    save_file(tensors, tmp_path / SINGLE_FILE)
    on_disk, in_memory = Checkpoint(tmp_path), StateDict(tensors)
    assert {file: set(names) for file, names in on_disk.shards.items()} == {SINGLE_FILE: {"a.weight", "b.bias"}}
    assert {file: set(names) for file, names in in_memory.shards.items()} == {SINGLE_FILE: {"a.weight", "b.bias"}}
    for name, tensor in tensors.items():
        for source in (on_disk, in_memory):
            assert source.shape(name) == tuple(tensor.shape)
            assert source.dtype(name) == dtype
            assert torch.equal(source.get(name), tensor)


def test_checkpoint_names_a_dtype_it_cannot_convert(tmp_path):
    save_file({"a": torch.zeros(2, dtype=torch.int8)}, tmp_path / SINGLE_FILE)
    assert Checkpoint(tmp_path).dtype("a") == "I8"
