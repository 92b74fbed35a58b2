"""Bytes of KV cache: what is computed is what every class of cache of transformers holds after a prompt."""

from contextlib import nullcontext
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from transformers import DynamicCache, cache_utils

from hf_gqa import Refusal, convert
from hf_gqa.convert import cache_bytes
from hf_gqa.convert.cache_bytes import (
    CACHE_CLASSES,
    cache_bytes_by_class,
    cache_bytes_computed,
    cache_bytes_per_token_beyond_window,
    cache_bytes_per_token_computed,
    cache_bytes_per_token_measured,
    cache_class_obstacle,
    key_value_heads,
    layer_windows,
)
from hf_gqa.convert.families import load_family
from hf_gqa.runtime.native_call import with_cache

from .covering import each_value
from .tiny_donors import MODEL_TYPES, NUM_LAYERS, tiny_config, tiny_donor


WINDOW = 6  # of the tiny donors that have one
CPU = torch.device("cpu")
MODELS = {
    "donor": lambda donor: donor,
    "student": lambda donor: convert(donor, num_key_value_heads=2),
    "bundle": lambda donor: convert(donor, num_key_value_heads=1, export="bundle"),
    "one head": lambda donor: convert(donor, num_key_value_heads=1),
}


class Stream(nullcontext):
    def wait_stream(self, other):
        pass


@pytest.fixture
def offloading_without_a_gpu(monkeypatch):
    """What moves layers to a GPU and back leaves them where they are."""
    monkeypatch.setattr(torch, "Stream", Stream)
    monkeypatch.setattr(torch.cuda, "default_stream", lambda device: Stream())
    on_a_gpu = partial(cache_class_obstacle, device=torch.device("cuda"))
    monkeypatch.setattr(
        cache_bytes, "cache_class_obstacle", lambda name, config, tokens, _: on_a_gpu(name, config, tokens)
    )


@pytest.mark.usefixtures("offloading_without_a_gpu")
@each_value(
    model_type=MODEL_TYPES, which=MODELS, num_tokens=[4, 16], dtype=[torch.float32, torch.bfloat16]
)  # inside the window and beyond
def test_measured_equals_computed_for_every_class(model_type, which, num_tokens, dtype):
    model = MODELS[which](tiny_donor(model_type)).to(dtype)
    heads = key_value_heads(model.config)
    measured = cache_bytes_by_class(model, num_tokens)
    windows = layer_windows(model.config, NUM_LAYERS)
    assert measured.keys() >= {"dynamic", "dynamic_unwindowed", "static", "offloaded"}
    assert ("offloaded_static" in measured) == (None in windows)
    has_fp8 = hasattr(cache_utils, "Fp8QuantizedLayer")
    assert ("quantized_fp8" in measured) == (has_fp8 and not any(windows))
    for name, bytes_per_token in measured.items():
        total = cache_bytes_computed(model.config, heads, dtype, name, num_tokens)
        assert bytes_per_token == total / num_tokens, name
    assert measured["dynamic_unwindowed"] == cache_bytes_per_token_computed(model.config, heads, dtype)
    assert measured["dynamic"] == cache_bytes_per_token_measured(model, num_tokens)


def test_rows_of_different_heads():
    family = load_family("gemma3_text")
    rows = [{"num_key_value_heads": 4}, {"num_key_value_heads": 1}]
    donor = {key: value for key, value in tiny_config("gemma3_text").to_dict().items() if key != "num_key_value_heads"}
    student = family.default_class(family.config_class(**donor, num_key_value_heads=4, layer_plan=rows))
    assert key_value_heads(student.config) == [4, 1]  # the first layer has the window
    one_head = 2 * 16 * 4
    assert cache_bytes_per_token_measured(student, 20) * 20 == one_head * (4 * (WINDOW - 1) + 1 * 20)
    assert cache_bytes_per_token_beyond_window(student.config, [4, 1], torch.float32) == one_head


@pytest.mark.parametrize("cache_class", ["dynamic", "static"])
def test_batch_multiplies(cache_class):
    config = tiny_config("qwen3")
    one, three = (cache_bytes_computed(config, [4, 2], torch.bfloat16, cache_class, 20, batch) for batch in (1, 3))
    assert three == 3 * one
    kept = WINDOW if cache_class == "static" else WINDOW - 1
    assert one == 2 * 16 * 2 * (4 * 20 + 2 * kept)


@torch.no_grad()
def test_decoding_keeps_what_a_prompt_keeps():
    """Token by token or in one piece: the same bytes, beyond the window too."""
    model, cache = tiny_donor("mistral"), None
    cache = DynamicCache(config=model.config)
    for token in range(20):
        model(torch.tensor([[token]]), **with_cache(model, cache))
    held = sum(tensor.nbytes for layer in cache.layers for tensor in (layer.keys, layer.values))
    assert held == cache_bytes_per_token_measured(model, 20) * 20
    assert held == cache_bytes_computed(model.config, [4] * NUM_LAYERS, torch.float32, "dynamic", 20)


@pytest.mark.parametrize(("elements", "dtype", "expected"), [(64, torch.bfloat16, 36), (640, torch.float32, 400)])
def test_grouped_bytes_by_hand(elements, dtype, expected):
    assert CACHE_CLASSES["quantized_quanto"].tensor_bytes(elements, dtype) == expected


@pytest.mark.parametrize(
    ("cache_class", "model_type", "num_tokens", "installed", "reason"),
    [
        ("dynamic", "mistral", 8, True, None),
        ("quantized_quanto", "llama", 8, False, "needs optimum-quanto, which is not installed"),
        ("quantized_hqq", "llama", 8, False, "needs hqq, which is not installed"),
        ("quantized_hqq", "llama", 8, True, None),
        ("quantized_hqq", "mistral", 8, True, "keeps no sliding windows"),
        ("quantized_hqq", "llama", 7, True, "needs a multiple of 64 elements, which 7 tokens do not give"),
        ("offloaded", "llama", 8, True, "moves layers between the host and a GPU, and the model is on cpu"),
    ],
)
def test_obstacle(monkeypatch, cache_class, model_type, num_tokens, installed, reason):
    for name in ("is_hqq_available", "is_optimum_quanto_available"):
        monkeypatch.setattr(cache_bytes, name, lambda: installed)
    assert cache_class_obstacle(cache_class, tiny_config(model_type), num_tokens, CPU) == reason


def test_unknown_class_is_refused():
    with pytest.raises(
        Refusal, match=r"^cache class 'paged' is unknown\. Known: dynamic, dynamic_unwindowed, static, "
    ):
        cache_bytes_computed(SimpleNamespace(), [1], torch.float32, "paged", 8)
