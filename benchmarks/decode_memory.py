"""Most memory that decoding takes, against weights and cache; and how many sequences fit where the weights leave room.

Run: `python benchmarks/decode_memory.py [--output FILE.json]`; beside the JSON it writes the same as Markdown. Linux. Each cell is a process of its own:
a Llama of random weights, a cache filled without a prompt, then decoding. What the process
had before the model is taken off; the peak is what the kernel saw (VmHWM), from after the cache was filled to the end.
"""

import argparse
import ctypes
import json
import subprocess
import sys
from pathlib import Path

import torch
import transformers
from decode_tables import table
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM, StaticCache

import hf_gqa
from hf_gqa.evaluate.cost.memory import context_that_fits
from hf_gqa.human_units import human_bytes
from hf_gqa.runtime.native_call import with_cache


MODEL = {"num_hidden_layers": 6, "hidden_size": 2048, "num_attention_heads": 32, "intermediate_size": 5632}
KV_HEADS, CONTEXT, STEPS = (32, 8, 4, 1), 2048, 16
MEMORY_BYTES = 1 << 30
IN_A_PROCESS = "import json, sys, decode_memory; print(json.dumps(decode_memory.decode(**json.loads(sys.argv[1]))))"


def memory_bytes(field: str) -> int:
    """Of this process: `VmRSS` is now, `VmHWM` the most since it was last reset."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) * 1024


@torch.inference_mode()
def decode(kv_heads: int, batch: int, cache: str, attention: str, context: int = CONTEXT) -> dict:
    """Runs in a process of its own."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    config = configuration(kv_heads)
    torch.matmul(torch.ones(64, 64), torch.ones(64, 64))  # what the libraries take once
    before = memory_bytes("VmRSS")
    torch.set_default_dtype(torch.bfloat16)
    model = LlamaForCausalLM(config).eval()
    if attention == "grouped_sdpa":
        hf_gqa.use_grouped_attention(model)
    kept = (
        DynamicCache(config=config) if cache == "dynamic" else StaticCache(config=config, max_cache_len=context + STEPS)
    )
    for layer_idx in range(config.num_hidden_layers):
        states = torch.zeros(batch, kv_heads, context, config.head_dim)
        kept.update(states, states, layer_idx)
        del states
    model(torch.ones(batch, 1, dtype=torch.long), **with_cache(model, kept))  # what is allocated once
    ctypes.CDLL(None).malloc_trim(0)  # what filling has left free
    Path("/proc/self/clear_refs").write_text("5")
    for _ in range(STEPS - 1):
        model(torch.ones(batch, 1, dtype=torch.long), **with_cache(model, kept))
    weights = sum(parameter.nbytes for parameter in model.parameters())
    cached = sum(layer.keys.nbytes + layer.values.nbytes for layer in kept.layers)
    return {"peak_bytes": memory_bytes("VmHWM") - before, "weight_bytes": weights, "cache_bytes": cached}


def configuration(kv_heads: int) -> LlamaConfig:
    return LlamaConfig(**MODEL, num_key_value_heads=kv_heads, vocab_size=1024, dtype="bfloat16")


def measured(**cell) -> dict:
    run = subprocess.run(
        [sys.executable, "-c", IN_A_PROCESS, json.dumps(cell)],
        cwd=Path(__file__).parent,
        capture_output=True,
        text=True,
        check=True,
    )
    found = cell | json.loads(run.stdout.splitlines()[-1])
    print(cell, {name: human_bytes(value) for name, value in found.items() if name.endswith("_bytes")}, flush=True)
    return found


def cells() -> list[dict]:
    return [
        measured(kv_heads=heads, batch=4, cache=cache, attention=attention)
        for cache in ("dynamic", "static")
        for heads in KV_HEADS
        for attention in ("grouped_sdpa", "sdpa")
    ]


def fitting() -> list[dict]:
    """The most sequences that the formula allows for MEMORY_BYTES, and what they really take."""
    found = []
    for heads in KV_HEADS:
        config = configuration(heads)
        with torch.device("meta"):
            weights = sum(p.numel() for p in LlamaForCausalLM(config).parameters()) * 2
        batch = most_sequences(config, weights)
        found.append(measured(kv_heads=heads, batch=batch, cache="static", attention="grouped_sdpa"))
    return found


def most_sequences(config: LlamaConfig, weight_bytes: int) -> int:
    batch = 0
    while context_that_fits(config, weight_bytes, torch.bfloat16, MEMORY_BYTES, batch + 1) >= CONTEXT + STEPS:
        batch += 1
    return batch


def markdown(found: dict) -> str:
    head = ["cache", "KV heads", "attention", "weights", "cache size", "peak", "beyond weights and cache"]
    rows = [
        [
            *(cell["cache"], str(cell["kv_heads"]), cell["attention"]),
            *(human_bytes(cell[name]) for name in ("weight_bytes", "cache_bytes", "peak_bytes")),
            human_bytes(cell["peak_bytes"] - cell["weight_bytes"] - cell["cache_bytes"]),
        ]
        for cell in found["decode"]
    ]
    most = found["fitting"][0]["batch"]
    fits = [
        [str(cell["kv_heads"]), str(cell["batch"]), f"{cell['batch'] / most:.1f}", human_bytes(cell["peak_bytes"])]
        for cell in found["fitting"]
    ]
    machine = found["machine"]
    return "\n".join(
        [
            "# Memory of decoding\n",
            f"{machine['device']}, torch {machine['torch']}, transformers {machine['transformers']}. Llama of random weights, 6 layers, hidden 2048, "
            f"32 query heads, bfloat16; {CONTEXT} cached tokens, {STEPS} steps. Written by `python benchmarks/decode_memory.py`.\n",
            "Batch 4. The growing cache holds the old and the new keys or values of one layer for a moment; the static cache does not.\n",
            table(head, rows),
            f"## Sequences of {CONTEXT} tokens in {human_bytes(MEMORY_BYTES)}\n",
            "The batch is computed before anything runs (`hf_gqa.evaluate.cost.memory`); the peak is measured with it.\n",
            table(["KV heads", "sequences", "times as many", "peak measured"], fits),
        ]
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results" / "decode_memory.json")
    asked = parser.parse_args()
    machine = {"device": "cpu", "torch": torch.__version__, "transformers": transformers.__version__}
    found = {"machine": machine, "decode": cells(), "fitting": fitting()}
    asked.output.write_text(json.dumps(found, indent=1) + "\n")
    asked.output.with_suffix(".md").write_text(markdown(found))


if __name__ == "__main__":
    main()
