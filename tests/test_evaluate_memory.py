"""What fits into a memory, against a slow count; and what a fresh process really takes."""

import sys
from dataclasses import asdict
from types import SimpleNamespace

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from hf_gqa import Refusal, convert
from hf_gqa.convert.cache_bytes import cache_bytes_computed, key_value_heads, layer_windows
from hf_gqa.evaluate.cost import peak_memory
from hf_gqa.evaluate.cost.memory import capacity, context_that_fits, parse_memory, weight_bytes, working_bytes
from hf_gqa.evaluate.cost.peak_memory import peak_memory_bytes

from .tiny_donors import MODEL_TYPES, tiny_config, tiny_donor


MANY = 400


def counted_context(config, weights: int, dtype: torch.dtype, memory: int, batch_size: int) -> int | None:
    """Token by token, until nothing more fits."""
    left = memory - weights - working_bytes(config, dtype, batch_size)
    heads = key_value_heads(config)
    for tokens in range(1, MANY):
        if cache_bytes_computed(config, heads, dtype, "static", tokens, batch_size) > left:
            return tokens - 1
    return None


@pytest.mark.parametrize("batch_size", [1, 3])
@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_context_is_the_longest_that_fits(model_type, batch_size):
    config, dtype = tiny_config(model_type, num_key_value_heads=2), torch.bfloat16
    base = 1000 + working_bytes(config, dtype, batch_size)
    answers = set()
    for memory in (0, base - 1, *range(base, base + 6000, 97), base + 20_000):
        found = context_that_fits(config, 1000, dtype, memory, batch_size)
        assert found == counted_context(config, 1000, dtype, memory, batch_size)
        answers.add(found)
    assert 0 in answers and len(answers) > 6
    assert (None in answers) == all(layer_windows(config, config.num_hidden_layers))


def test_to_the_byte():
    config = tiny_config("qwen3")
    per_token, window = 2 * 4 * 16 * 2, 6
    memory = 500 + working_bytes(config, torch.bfloat16, 2) + 2 * per_token * (10 + window)
    assert context_that_fits(config, 500, torch.bfloat16, memory, 2) == 10
    assert context_that_fits(config, 500, torch.bfloat16, memory - 1, 2) == 9


def test_working_bytes_by_hand():
    config = LlamaConfig(hidden_size=8, intermediate_size=20, num_attention_heads=2, head_dim=6, vocab_size=100)
    assert working_bytes(config, torch.bfloat16, 3) == 512 * (2 * 8 + 2 * 12 + 3 * 20) * 2 + 3 * 100 * (2 + 4)
    assert working_bytes(config, torch.bfloat16, 600) == 600 * ((2 * 8 + 2 * 12 + 3 * 20) * 2 + 100 * (2 + 4))


def test_capacity_of_a_pair():
    donor = tiny_donor("llama")
    student = convert(donor, num_key_value_heads=1)
    found = capacity(donor, student, 1_000_000, 2)
    assert found.memory_bytes == 1_000_000 and found.batch_size == 2
    for model, context in ((donor, found.donor_context_tokens), (student, found.student_context_tokens)):
        assert context == context_that_fits(model.config, weight_bytes(model), torch.float32, 1_000_000, 2)
    assert found.student_context_tokens > 4 * found.donor_context_tokens > 0  # its weights are fewer too
    assert asdict(capacity(donor, student, 1000, 2)) == {
        **{"memory_bytes": 1000, "batch_size": 2},
        **{"donor_context_tokens": 0, "student_context_tokens": 0},
    }


def test_tied_weights_count_once():
    tied, untied = (tiny_donor("llama", tie_word_embeddings=tie) for tie in (True, False))
    assert weight_bytes(untied) - weight_bytes(tied) == 99 * 32 * 4


@pytest.mark.parametrize(
    ("memory", "expected"),
    [
        ("24GB", 24_000_000_000),
        ("24GiB", 24 * 2**30),
        (" 1.5 gb ", 1_500_000_000),
        ("512MB", 512_000_000),
        ("80kib", 80 * 1024),
        ("2TB", 2 * 10**12),
        ("7B", 7),
        (9_007_199_254_740_993, 9_007_199_254_740_993),  # more digits than a float has
        ("1000", 1000),
    ],
)
def test_memory_is_read(memory, expected):
    assert parse_memory(memory) == expected


@pytest.mark.parametrize(
    "memory", ["", "GB", "24 gigs", "24G", "-1GB", "1e9", "nan", "1,5GB", "0", 0, -3, True, "0.1B"]
)
def test_nonsense_is_refused(memory):
    with pytest.raises(Refusal) as refused:
        parse_memory(memory)
    assert str(refused.value) == (
        f"memory = {memory!r} is no amount of memory. Give bytes, or a number with a unit, such as 512MB or 24GB "
        f"(10^9 bytes) or 24GiB (2^30 bytes)."
    )


SMALL = {"hidden_size": 512, "intermediate_size": 1024, "num_attention_heads": 8, "vocab_size": 2048}


def saved(folder, **changes) -> int:
    """A donor of megabytes; returns the bytes of its weights."""
    model = LlamaForCausalLM(LlamaConfig(**SMALL, **changes)).to(torch.bfloat16)
    model.save_pretrained(folder)
    return weight_bytes(model)


SETTINGS = {"dtype": torch.bfloat16, "batch_size": 1, "context_tokens": 64, "decode_tokens": 2}


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="read from /proc")
def test_twice_the_weights_take_twice_the_memory(tmp_path):
    sizes = [saved(tmp_path / str(layers), num_hidden_layers=layers) for layers in (8, 16)]
    peaks = [peak_memory_bytes(tmp_path / str(layers), **SETTINGS, attn_implementation="sdpa") for layers in (8, 16)]
    assert peaks[0] >= sizes[0] and 0.7 < (peaks[1] - peaks[0]) / (sizes[1] - sizes[0]) < 1.3


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="read from /proc")
def test_a_bundle_is_loaded_and_its_cache_shows(tmp_path):
    donor = LlamaForCausalLM(LlamaConfig(**SMALL, num_hidden_layers=8))
    convert(donor.bfloat16(), num_key_value_heads=8, export="bundle").save_pretrained(tmp_path)
    settings = SETTINGS | {"attn_implementation": "sdpa", "batch_size": 4}
    short, long = (peak_memory_bytes(tmp_path, **settings | {"context_tokens": tokens}) for tokens in (16, 512))
    cache = 2 * 8 * 512 * 2 * 4 * (512 - 16)  # keys and values, layers, hidden, bfloat16, sequences
    assert long - short > 0.9 * cache


def test_nothing_is_measured_without_proc(monkeypatch):
    monkeypatch.setattr(peak_memory, "sys", SimpleNamespace(platform="darwin"))
    assert peak_memory_bytes("nowhere", **SETTINGS, attn_implementation="sdpa") is None


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="read from /proc")
def test_failing_process_is_refused(tmp_path):
    with pytest.raises(Refusal, match=f"^{tmp_path}: its peak memory could not be measured \\(.*config.json"):
        peak_memory_bytes(tmp_path, **SETTINGS, attn_implementation="sdpa")
