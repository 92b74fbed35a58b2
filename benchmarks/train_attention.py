"""What attention costs in training: forward, backward and peak memory of eager, stock sdpa and grouped_sdpa at growing sequence length.

Run: `python benchmarks/train_attention.py [--threads 2] [--output FILE.json]`; beside the JSON it writes the same as Markdown. Linux. Attention
alone (32 query and 8 KV heads), and a Llama of random weights of which every parameter is trained. In each cell the ways take turns in random order,
round after round; medians. Memory is the most resident memory above what was there before the forward (VmHWM, reset before).
"""

import argparse
import ctypes
import json
import random
import statistics
import time
from pathlib import Path
from types import SimpleNamespace

import torch
from decode import machine, middle
from decode_memory import memory_bytes
from decode_tables import table
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.models.llama.modeling_llama import eager_attention_forward

from hf_gqa.human_units import human_bytes
from hf_gqa.runtime.grouped_attention import grouped_sdpa


HEADS, KV_HEADS, HEAD_DIM = 32, 8, 64
LENGTHS = (256, 512, 1024, 2048, 4096)
MOST_SCORE_BYTES = 1 << 30  # eager holds several tensors of the size of the scores
WAYS = {"eager": eager_attention_forward, "sdpa": sdpa_attention_forward, "grouped_sdpa": grouped_sdpa}
DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}
MODEL = {"num_hidden_layers": 4, "hidden_size": 512, "num_attention_heads": 16, "intermediate_size": 1408}
MODEL_LENGTHS, MODEL_KV_HEADS = (256, 1024, 2048), (16, 4, 1)
LIBC = ctypes.CDLL(None)


def one_pass(forward) -> dict:
    """{"forward", "backward"} in seconds, and "peak_bytes" of both together."""
    LIBC.malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    before, begun = memory_bytes("VmRSS"), time.perf_counter()
    output = forward()
    middle_time = time.perf_counter()
    output.backward(torch.ones_like(output))
    ended = time.perf_counter()
    peak = memory_bytes("VmHWM") - before
    return {"forward": middle_time - begun, "backward": ended - middle_time, "peak_bytes": peak}


def in_turn(calls: dict, seconds: float, least_rounds: int = 3) -> dict:
    """{way: {"forward": {"seconds", "noise", ...}, "backward": ..., "peak_bytes": median}}"""
    passes = {way: [] for way in calls}
    for call in calls.values():
        one_pass(call)
    order, begun, rounds = list(calls), time.perf_counter(), 0
    while rounds < least_rounds or time.perf_counter() - begun < seconds:
        random.shuffle(order)
        for way in order:
            passes[way].append(one_pass(calls[way]))
        rounds += 1
    return {
        way: {part: middle([one[part] for one in found]) for part in ("forward", "backward")}
        | {"peak_bytes": statistics.median(one["peak_bytes"] for one in found), "rounds": rounds}
        for way, found in passes.items()
    }


def attention_cell(length: int, dtype: str, seconds: float) -> dict:
    query = torch.randn(1, length, HEADS, HEAD_DIM, dtype=DTYPES[dtype]).transpose(1, 2).requires_grad_()
    key, value = (torch.randn(1, KV_HEADS, length, HEAD_DIM, dtype=DTYPES[dtype]).requires_grad_() for _ in "kv")
    module = SimpleNamespace(is_causal=True, num_key_value_groups=HEADS // KV_HEADS, training=True)
    lowest = torch.finfo(DTYPES[dtype]).min
    causal = torch.full((length, length), lowest, dtype=DTYPES[dtype]).triu(1)[None, None]  # what eager gets

    def call(way: str):
        for state in (query, key, value):
            state.grad = None
        mask = causal if way == "eager" else None
        return WAYS[way](module, query, key, value, mask, scaling=HEAD_DIM**-0.5, dropout=0.0)[0]

    ways = [way for way in WAYS if way != "eager" or HEADS * length**2 * 4 <= MOST_SCORE_BYTES]
    timed = in_turn({way: (lambda way=way: call(way)) for way in ways}, seconds)
    return shown({"length": length, "dtype": dtype, "ways": timed})


def model_cell(length: int, kv_heads: int, seconds: float) -> dict:
    config = LlamaConfig(**MODEL, num_key_value_heads=kv_heads, vocab_size=1024, max_position_embeddings=4096)
    model = LlamaForCausalLM(config).train()
    tokens = torch.randint(0, 1024, (1, length))

    def call(way: str):
        model.zero_grad(set_to_none=True)
        model.set_attn_implementation(way)
        return model(tokens, labels=tokens, use_cache=False).loss

    timed = in_turn({way: (lambda way=way: call(way)) for way in WAYS}, seconds)
    return shown({"length": length, "kv_heads": kv_heads, "ways": timed})


def shown(cell: dict) -> dict:
    what = {name: value for name, value in cell.items() if name != "ways"}
    print(what, {way: figures(timed) for way, timed in cell["ways"].items()}, flush=True)
    return cell


def figures(timed: dict) -> str:
    parts = (f"{timed[part]['seconds'] * 1e3:.1f} ms" for part in ("forward", "backward"))
    return ", ".join([*parts, human_bytes(timed["peak_bytes"])])


def rows(cells: list[dict], first: str) -> list[list[str]]:
    """Each way beside eager; `of eager` is the fraction of its time or memory."""
    found = []
    for cell in cells:
        eager = cell["ways"].get("eager")
        for way, timed in cell["ways"].items():
            row = [str(cell["length"]), str(cell[first]), way]
            for part in ("forward", "backward"):
                seconds = timed[part]["seconds"]
                row += [f"{seconds * 1e3:.1f}", f"{seconds / eager[part]['seconds']:.0%}" if eager else ""]
            noise = max(timed[part]["noise"] for part in ("forward", "backward"))
            peak = timed["peak_bytes"]
            of_eager = f"{peak / eager['peak_bytes']:.0%}" if eager else ""
            found.append([*row, human_bytes(peak), of_eager, f"{noise:.0%}"])
    return found


def markdown(found: dict) -> str:
    m = found["machine"]
    tail = ["forward, ms", "of eager", "backward, ms", "of eager", "peak memory", "of eager", "noise"]
    return "\n".join(
        [
            "# Attention in training\n",
            f"{m['device']}, {m['threads']} threads, torch {m['torch']}, transformers {m['transformers']}. Medians; noise is the larger distance of the quartiles "
            "over the median. Written by `python benchmarks/train_attention.py`.\n",
            f"## Attention alone\n\n{HEADS} query heads, {KV_HEADS} KV heads, head_dim {HEAD_DIM}, batch 1, causal.\n",
            table(["length", "dtype", "way", *tail], rows(found["attention"], "dtype")),
            "## A whole model\n\nLlama, 4 layers, hidden 512, 16 query heads, intermediate 1408, float32, batch 1, all parameters trained.\n",
            table(["length", "KV heads", "way", *tail], rows(found["model"], "kv_heads")),
        ]
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results" / "train_attention.json")
    asked = parser.parse_args()
    torch.set_num_threads(asked.threads)
    torch.manual_seed(0)
    random.seed(0)
    found = {
        "machine": machine(),
        "attention": [attention_cell(length, dtype, 2.0) for dtype in DTYPES for length in LENGTHS],
        "model": [model_cell(length, kv_heads, 4.0) for kv_heads in MODEL_KV_HEADS for length in MODEL_LENGTHS],
    }
    asked.output.write_text(json.dumps(found, indent=1) + "\n")
    asked.output.with_suffix(".md").write_text(markdown(found))


if __name__ == "__main__":
    main()
