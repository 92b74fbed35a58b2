"""Every implementation that transformers offers gets the few KV heads as they are; what cannot run here is refused."""

import shutil

import pytest
import torch
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from hf_gqa.runtime.grouped_attention import grouped_sdpa

from .conformance import assert_close_for_float32, every_family, logits_of
from .decoding import generate, student_of
from .tiny_donors import tokens_and_mask


@pytest.fixture
def recorder(monkeypatch):
    """An attention function under the name of FlashAttention 2, which wants keys and values unrepeated."""
    seen = []

    def record(module, query, key, value, attention_mask, **kwargs):
        seen.append((query.shape[1], key.shape[1], value.shape[1], module.num_key_value_groups))
        kwargs.pop("sliding_window", None)  # is in the mask here
        return grouped_sdpa(module, query, key, value, attention_mask, **kwargs)

    name = "flash_attention_2"
    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS._global_mapping, name, record)
    monkeypatch.setitem(ALL_MASK_ATTENTION_FUNCTIONS._global_mapping, name, ALL_MASK_ATTENTION_FUNCTIONS["sdpa"])
    return seen


def with_attention(model, name: str):
    """Without the check whether the package is there."""
    for module in model.modules():
        if hasattr(module, "config"):
            module.config._attn_implementation = name
    return model


@every_family
@pytest.mark.parametrize("export", ["auto", "bundle"])
def test_keys_and_values_arrive_with_their_few_heads(model_type, export, recorder):
    student = student_of(model_type, export, 2)
    expected = generate(student, batch=1).sequences
    found = generate(with_attention(student, "flash_attention_2"), batch=1).sequences
    assert set(recorder) == {(4, 2, 2, 2)}
    assert torch.equal(found, expected)


@pytest.mark.parametrize("name", ["flash_attention_2", "flash_attention_3", "kernels-community/flash-attn2"])
def test_what_is_not_installed_is_refused_and_changes_nothing(name):
    student = student_of("llama", "auto", 2)
    before, expected = student.config._attn_implementation, logits_of(student)
    with pytest.raises((ImportError, ValueError)):
        student.set_attn_implementation(name)
    assert student.config._attn_implementation == before
    assert torch.equal(logits_of(student), expected)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of torch, on its own compiler
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch compiles flex_attention with a C++ compiler")
@pytest.mark.parametrize("export", ["auto", "bundle"])
def test_flex_attention_computes_the_same(export):
    student = student_of("llama", export, 2)
    expected = logits_of(student, padded=True)
    student.set_attn_implementation("flex_attention")
    real = tokens_and_mask()[1].bool()
    assert_close_for_float32(logits_of(student, padded=True)[real], expected[real])
