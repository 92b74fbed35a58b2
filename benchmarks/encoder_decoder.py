"""What one KV head is worth in an encoder and in a decoder: microseconds per token of each, as in the MQA paper's table of inference costs.

Run: `python benchmarks/encoder_decoder.py [--threads 2] [--output FILE.json]`; beside the JSON it writes the same as Markdown. A T5 of random
weights (timing does not depend on them) with 8 KV heads everywhere and students of it with fewer in encoder and decoder; they take turns in random
order, round after round; medians.

Source of the comparison: Fast Transformer Decoding (Shazeer 2019, arXiv 1911.02150), table 2.
"""

import argparse
import json
import random
from pathlib import Path

import torch
from decode import machine, time_in_turn
from decode_tables import table
from transformers import DynamicCache, EncoderDecoderCache, T5Config, T5ForConditionalGeneration

from hf_gqa import convert
from hf_gqa.runtime.native_call import with_cache


MODEL = {"d_model": 512, "d_kv": 64, "num_heads": 8, "d_ff": 2048, "num_layers": 6, "vocab_size": 1024}
HEADS, CELLS, STEPS = (8, 4, 2, 1), ((8, 128), (32, 128), (8, 512)), 32


@torch.no_grad()
def decode(model, encoded, batch: int, steps: int = STEPS) -> None:
    cache = EncoderDecoderCache(DynamicCache(), DynamicCache())
    token = torch.zeros(batch, 1, dtype=torch.long)
    for _ in range(steps):
        model(decoder_input_ids=token, encoder_outputs=encoded, **with_cache(model, cache))


@torch.no_grad()
def cell(models: dict, batch: int, length: int, seconds: float) -> dict:
    tokens = torch.ones(batch, length, dtype=torch.long)
    encoded = {heads: model.get_encoder()(tokens) for heads, model in models.items()}
    calls = {
        "encoder": {heads: (lambda model=model: model.get_encoder()(tokens)) for heads, model in models.items()},
        "decoder": {
            heads: (lambda model=model, heads=heads: decode(model, encoded[heads], batch))
            for heads, model in models.items()
        },
    }
    counts = {"encoder": batch * length, "decoder": batch * STEPS}
    found = {"batch": batch, "source_tokens": length}
    for part, each in calls.items():
        timed = time_in_turn(each, seconds)
        found[part] = {
            heads: {"microseconds_per_token": t["seconds"] / counts[part] * 1e6, "noise": t["noise"]}
            for heads, t in timed.items()
        }
    print(found, flush=True)
    return found


def markdown(found: dict) -> str:
    rows = []
    for each in found["cells"]:
        for heads in HEADS:
            row = [str(each["batch"]), str(each["source_tokens"]), str(heads)]
            for part in ("encoder", "decoder"):
                taken, most = each[part][heads], each[part][HEADS[0]]
                row += [
                    f"{taken['microseconds_per_token']:.0f}",
                    f"{most['microseconds_per_token'] / taken['microseconds_per_token']:.2f}",
                ]
            rows.append([*row, f"{max(each[part][heads]['noise'] for part in ('encoder', 'decoder')):.0%}"])
    m = found["machine"]
    head = ["batch", "source tokens", "KV heads", "encoder, µs per token", "times faster"]
    return "\n".join(
        [
            "# One KV head in an encoder and in a decoder\n",
            f"{m['device']}, {m['threads']} threads, torch {m['torch']}, transformers {m['transformers']}. T5 of random weights, 6 + 6 layers, d_model 512, 8 query heads, "
            f"float32; {STEPS} decoded tokens, self- and cross-attention grouped alike, `grouped_sdpa` in all. Medians. Written by `python benchmarks/encoder_decoder.py`.\n",
            table([*head, "decoder, µs per token", "times faster", "noise"], rows),
        ]
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results" / "encoder_decoder.json")
    asked = parser.parse_args()
    torch.set_num_threads(asked.threads)
    torch.manual_seed(0)
    random.seed(0)
    donor = T5ForConditionalGeneration(T5Config(**MODEL, decoder_start_token_id=0)).eval()
    models = {
        heads: convert(donor, num_key_value_heads=heads, convert_encoder=True, export="bundle").eval()
        for heads in HEADS
    }
    for model in models.values():
        model.set_attn_implementation("grouped_sdpa")
    found = {"machine": machine(), "cells": [cell(models, *size, seconds=6.0) for size in CELLS]}
    asked.output.write_text(json.dumps(found, indent=1) + "\n")
    asked.output.with_suffix(".md").write_text(markdown(json.loads(json.dumps(found), object_hook=numbered)))


def numbered(values: dict) -> dict:
    """JSON makes strings of the head counts."""
    return {int(key) if key.isdigit() else key: value for key, value in values.items()}


if __name__ == "__main__":
    main()
