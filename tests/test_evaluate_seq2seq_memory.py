"""What source fits into a memory, against a slow count and a count by hand."""

import copy

import pytest
import torch
from transformers import BartConfig, T5Config

from hf_gqa.evaluate.cost.seq2seq_memory import encoding_bytes, source_that_fits, step_bytes


T5 = T5Config(d_model=8, d_ff=20, num_heads=2, d_kv=6, num_layers=3, num_decoder_layers=2, vocab_size=100)
BART = BartConfig(
    **{"d_model": 8, "encoder_ffn_dim": 20, "encoder_attention_heads": 2, "decoder_attention_heads": 2},
    **{"encoder_layers": 3, "decoder_layers": 2, "vocab_size": 100},
)


@pytest.mark.parametrize("batch_size", [1, 3])
@pytest.mark.parametrize("config", [T5, BART], ids=["t5", "bart"])
def test_source_is_the_longest_that_fits(config, batch_size):
    dtype = torch.bfloat16
    base = 1000 + step_bytes(config, dtype, batch_size, 5)
    answers = set()
    for memory in (0, base - 1, *range(base, base + 60_000, 977)):
        found = source_that_fits(config, 1000, dtype, memory, batch_size, 5)
        counted = 0
        while base + encoding_bytes(config, dtype, batch_size, counted + 1) <= memory:
            counted += 1
        assert found == counted
        answers.add(found)
    assert 0 in answers and len(answers) > 6


def test_bytes_by_hand():
    vectors = (2 * 8 + 2 * 12 + 3 * 20) * 2
    cross = own = 2 * 2 * 2 * 6 * 2  # keys and values, layers, heads, head_dim, bytes
    assert step_bytes(T5, torch.bfloat16, 3, 7) == 3 * (7 * own + vectors + 100 * (2 + 4))
    scores = (1 + 3) * 2 * 50**2 * 2
    assert encoding_bytes(T5, torch.bfloat16, 3, 50) == 3 * 50 * (cross + vectors + 8 * 2) + scores
    assert encoding_bytes(BART, torch.bfloat16, 3, 50) == 3 * 50 * (2 * 2 * 8 * 2 + (4 * 8 + 60) * 2 + 8 * 2)


def test_fewer_heads_make_room():
    fewer = copy.deepcopy(BART)
    fewer.layer_plan = [{"num_key_value_heads": 1}] * 4 + [{"num_key_value_heads": 2}] * 3
    room = [source_that_fits(config, 0, torch.bfloat16, 10**6, 4, 8) for config in (BART, fewer)]
    assert room[1] > room[0] > 0
