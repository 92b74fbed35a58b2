"""What fewer KV heads are worth in time: grouped_sdpa against stock transformers, attention alone and in a whole model.

Run: `python benchmarks/decode.py [--threads 2] [--only attention|paths|model] [--quick] [--output FILE.json]`; beside the JSON it writes
the same as Markdown and as a plot. Random weights and states; timing does not depend on them. In each cell the ways take turns in
random order, round after round; medians, with the distance of the quartiles as noise.

ours: `grouped_sdpa`. stock: transformers' `sdpa` as it is. repeat_kv, enable_gqa: torch's kernel after copying keys and values to full
size, or told of the groups. packed: a group's queries as rows of one matrix, the mask repeated.
"""

import argparse
import json
import platform
import random
import statistics
import time
from pathlib import Path
from types import SimpleNamespace

import torch
import transformers
from decode_tables import markdown, plot
from torch.nn.functional import scaled_dot_product_attention as sdpa
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM, StaticCache
from transformers.integrations.sdpa_attention import sdpa_attention_forward

import hf_gqa
from hf_gqa.runtime.grouped_attention import grouped_sdpa
from hf_gqa.runtime.native_call import with_cache


HEADS, HEAD_DIM = 32, 128
KV_HEADS = (32, 8, 4, 1)
CONTEXTS, BATCHES = (512, 2048, 4096, 16384, 32768), (1, 4, 16)
MOST_BYTES = 3 << 29  # of keys and values, as a way holds them: larger ones are left out
DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}
PATHS = {  # name: (batch, query length, key length, has a mask)
    "prefill": (2, 512, 512, False),
    "padded prefill": (2, 512, 512, True),
    "chunk on a filled cache": (2, 128, 2048, True),
    "4 tokens on a filled cache": (2, 4, 4096, True),
    "16 tokens on a filled cache": (2, 16, 4096, True),
    "17 tokens on a filled cache": (2, 17, 4096, True),
}
MODEL = {"num_hidden_layers": 6, "hidden_size": 2048, "num_attention_heads": 32, "intermediate_size": 5632}
MODEL_BATCH, MODEL_CONTEXT = 4, 2048


def repeated(tensor, heads: int):
    return tensor.repeat_interleave(heads // tensor.shape[1], dim=1)


def repeat_kv(module, query, key, value, mask):
    causal = mask is None and query.shape[2] > 1
    return sdpa(query, repeated(key, HEADS), repeated(value, HEADS), attn_mask=mask, is_causal=causal)


def enable_gqa(module, query, key, value, mask):
    causal = mask is None and query.shape[2] > 1
    return sdpa(query, key, value, attn_mask=mask, is_causal=causal, enable_gqa=True)


def packed(module, query, key, value, mask):
    if mask is None and query.shape[2] > 1:
        mask = torch.ones(1, 1, query.shape[2], key.shape[2], dtype=torch.bool).tril()
    rows = query.reshape(query.shape[0], key.shape[1], -1, HEAD_DIM)
    if mask is not None:
        mask = mask.repeat(1, 1, HEADS // key.shape[1], 1)
    return sdpa(rows, key, value, attn_mask=mask).view(query.shape)


WAYS = {
    "ours": lambda *states: grouped_sdpa(*states),
    "stock": lambda *states: sdpa_attention_forward(*states),
    "repeat_kv": repeat_kv,
    "enable_gqa": enable_gqa,
    "packed": packed,
}


def time_in_turn(calls: dict, seconds: float, least_rounds: int = 5) -> dict:
    """{way: {"seconds": median, "least_seconds", "noise": distance of the quartiles over the median, "rounds"}}"""
    taken = {way: [] for way in calls}
    for call in calls.values():
        call()
    order, begun, rounds = list(calls), time.perf_counter(), 0
    while rounds < least_rounds or time.perf_counter() - begun < seconds:
        random.shuffle(order)
        for way in order:
            start = time.perf_counter()
            calls[way]()
            taken[way].append(time.perf_counter() - start)
        rounds += 1
    return {way: {**middle(values), "rounds": rounds} for way, values in taken.items()}


def middle(values: list[float]) -> dict:
    low, median, high = statistics.quantiles(values, n=4)
    return {"seconds": median, "least_seconds": min(values), "noise": (high - low) / median}


def copy_bytes_per_second() -> float:
    """Bytes read and written by copying 256 MiB, which no cache of the processor holds."""
    source = torch.zeros(2**28, dtype=torch.uint8)
    target = torch.empty_like(source)
    return 2 * source.numel() / time_in_turn({"copy": lambda: target.copy_(source)}, 2.0)["copy"]["seconds"]


def states_of(batch: int, kv_heads: int, tokens: int, keys: int, dtype, masked: bool):
    query = torch.randn(batch, tokens, HEADS, HEAD_DIM, dtype=dtype).transpose(1, 2)
    key, value = (torch.randn(batch, kv_heads, keys, HEAD_DIM, dtype=dtype) for _ in "kv")
    mask = None
    if masked:  # causal, and the first keys of every row but the first are padding
        mask = torch.ones(tokens, keys, dtype=torch.bool).tril(keys - tokens).repeat(batch, 1, 1, 1)
        mask[1:, :, :, :7] = False
    return query, key, value, mask


def attention_cell(batch, kv_heads, tokens, keys, dtype: str, masked: bool, seconds: float) -> dict:
    states = states_of(batch, kv_heads, tokens, keys, DTYPES[dtype], masked)
    module = SimpleNamespace(is_causal=True, num_key_value_groups=HEADS // kv_heads)
    ways = {way: call for way, call in WAYS.items() if kv_heads < HEADS or way in ("ours", "stock")}
    if not fits(batch, HEADS, keys, dtype):
        ways.pop("repeat_kv", None)
    timed = time_in_turn({way: (lambda call=call: call(module, *states)) for way, call in ways.items()}, seconds)
    return {
        **{"batch": batch, "kv_heads": kv_heads, "tokens": tokens, "keys": keys, "dtype": dtype, "masked": masked},
        **{"kv_bytes": states[1].nbytes + states[2].nbytes, "ways": timed},
    }


def fits(batch: int, heads: int, keys: int, dtype: str) -> bool:
    return 2 * batch * heads * keys * HEAD_DIM * DTYPES[dtype].itemsize <= MOST_BYTES


def one_token(seconds: float, quick: bool) -> list[dict]:
    contexts = CONTEXTS[:2] if quick else CONTEXTS
    return [
        report(attention_cell(batch, kv_heads, 1, keys, dtype, masked, seconds))
        for dtype in DTYPES
        for keys in contexts
        for batch in BATCHES
        for masked in ((False, True) if keys in (512, 4096) else (False,))
        for kv_heads in KV_HEADS
        if fits(batch, kv_heads, keys, dtype)
    ]


def several_tokens(seconds: float) -> list[dict]:
    return [
        {"path": path} | report(attention_cell(batch, kv_heads, tokens, keys, dtype, masked, seconds))
        for dtype in DTYPES
        for path, (batch, tokens, keys, masked) in PATHS.items()
        for kv_heads in KV_HEADS[1:]
    ]


def report(cell: dict) -> dict:
    shape = ", ".join(f"{name} {cell[name]}" for name in ("dtype", "keys", "batch", "tokens", "masked", "kv_heads"))
    print(shape, {way: f"{timed['seconds'] * 1e3:.2f} ms" for way, timed in cell["ways"].items()}, flush=True)
    return cell


def filled(cache, config, length: int, dtype):
    """The cache as if `length` tokens had been seen."""
    shape = (MODEL_BATCH, config.num_key_value_heads, length, config.head_dim)
    for layer in range(config.num_hidden_layers):
        cache.update(torch.randn(shape, dtype=dtype), torch.randn(shape, dtype=dtype), layer)
    return cache


@torch.no_grad()
def model_cell(kv_heads: int, rounds: int) -> dict:
    """One decode step of the whole model: stock and ours, on a growing and a static cache, and compiled on a static one."""
    config = LlamaConfig(**MODEL, num_key_value_heads=kv_heads, vocab_size=1024, dtype="bfloat16")
    model = LlamaForCausalLM(config).eval().to(torch.bfloat16)
    steps = rounds * 2 + 4
    empty = {"dynamic": DynamicCache(config=config)} | {
        kind: StaticCache(config, MODEL_CONTEXT + steps) for kind in ("static", "compiled")
    }
    caches = {kind: filled(cache, config, MODEL_CONTEXT, model.dtype) for kind, cache in empty.items()}
    token = torch.ones(MODEL_BATCH, 1, dtype=torch.long)
    torch.compiler.reset()
    compiled = torch.compile(model, dynamic=False)

    def step(attention: str, cache: str):
        model.config._attn_implementation = attention
        run = compiled if cache == "compiled" else model
        return run(token, **with_cache(model, caches[cache]))

    hf_gqa.use_grouped_attention(model)
    timed = time_in_turn(
        {
            f"{name}, {cache}": (lambda attention=attention, cache=cache: step(attention, cache))
            for cache in caches
            for name, attention in (("ours", "grouped_sdpa"), ("stock", "sdpa"))
        },
        seconds=0,
        least_rounds=rounds,
    )
    cache_bytes = 2 * MODEL_BATCH * kv_heads * MODEL_CONTEXT * config.head_dim * 2 * config.num_hidden_layers
    embedding = model.get_input_embeddings().weight.nbytes  # one row of it is read
    read = sum(parameter.nbytes for parameter in model.parameters()) - embedding
    print(
        f"model, {kv_heads} KV heads",
        {way: f"{each['seconds'] * 1e3:.1f} ms" for way, each in timed.items()},
        flush=True,
    )
    return {"kv_heads": kv_heads, "cache_bytes": cache_bytes, "weight_bytes": read, "ways": timed}


def machine() -> dict:
    processor = next((line for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line), "")
    return {
        "device": f"cpu, {processor.partition(': ')[2] or platform.machine()}",
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "copy_bytes_per_second": copy_bytes_per_second(),
    }


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--only", choices=["attention", "paths", "model"])
    parser.add_argument("--quick", action="store_true", help="shorter contexts and fewer rounds")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results" / "decode.json")
    asked = parser.parse_args()
    torch.set_num_threads(asked.threads)
    torch.manual_seed(0)
    random.seed(0)
    found = json.loads(asked.output.read_text()) if asked.only and asked.output.exists() else {}
    found["machine"] = machine()
    seconds = 0.2 if asked.quick else 0.6
    if asked.only in (None, "attention"):
        found["one_token"] = one_token(seconds, asked.quick)
    if asked.only in (None, "paths"):
        found["several_tokens"] = several_tokens(seconds)
    if asked.only in (None, "model"):
        found["model"] = [model_cell(kv_heads, 5 if asked.quick else 15) for kv_heads in KV_HEADS]
    asked.output.write_text(json.dumps(found, indent=1) + "\n")
    asked.output.with_suffix(".md").write_text(markdown(found))
    plot(found, asked.output.with_suffix(".svg"))


if __name__ == "__main__":
    main()
