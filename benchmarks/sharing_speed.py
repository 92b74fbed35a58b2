"""What layer sharing is worth in time: decoding and a training step against the unshared model, at TinyLlama-1.1B's shape.

Run: `python benchmarks/sharing_speed.py [--threads 2] [--layers 9] [--rounds 9] [--output FILE.json]`. Weights of one value and a cache of
random numbers; timing does not depend on them. The ways take turns in random order, round after round; each cell is the median
over rounds of unshared time over the way's time in the same round, with quartiles.

echo: borrowers reuse the lender's probabilities while decoding. recomputed: they compute them again from its queries and keys, as they do in
training. cross_layer_kv: borrowers read the lender's keys and values. Layers that own are the first of each equal stretch.
"""

import argparse
import json
import random
import statistics
import time
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, DynamicCache

from hf_gqa.convert.families import load_family
from hf_gqa.runtime import planned_attention
from hf_gqa.runtime.layer_plan import read_rows
from hf_gqa.sharing import SHARINGS


SHAPE = {"hidden_size": 2048, "num_attention_heads": 32, "intermediate_size": 5632, "vocab_size": 32000}
FRACTIONS = (0.23, 0.41, 0.77)  # of layers that borrow, as in EchoAtt's table 3 (arXiv 2409.14595)
WAYS = ("echo", "recomputed", "cross_layer_kv")
HEAD_DIM = 64


def shared_rows(way: str, layers: int, fraction: float, heads: int):
    """As many borrowers as the fraction says, spread over all layers but the first."""
    borrowers = round(fraction * layers)
    owners = sorted({round(n * layers / (layers - borrowers)) for n in range(layers - borrowers)})
    lenders = tuple(max(owner for owner in owners if owner <= layer_idx) for layer_idx in range(layers))
    assert sum(lender != layer_idx for layer_idx, lender in enumerate(lenders)) == borrowers
    return SHARINGS.get("echo" if way == "recomputed" else way)(lenders, (heads,) * layers)


def make_model(rows, heads: int, dtype: torch.dtype, context: int):
    config = load_family("llama").config_class(
        **SHAPE,
        num_hidden_layers=len(rows),
        num_key_value_heads=heads,
        layer_plan=[row.to_dict() for row in rows],
        max_position_embeddings=2 * context,
    )
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype).eval()
    model.to_empty(device="cpu")
    for tensor in model.state_dict().values():
        tensor.fill_(0.01)
    for buffer in model.buffers():
        buffer.fill_(0.5)
    return model


def filled_cache(model, batch: int, context: int) -> DynamicCache:
    cache = DynamicCache(config=model.config)
    for layer_idx, row in enumerate(read_rows(model.config)):
        states = torch.randn(batch, row.num_key_value_heads, context, HEAD_DIM, dtype=model.dtype)
        if row.value_from is None:
            cache.update(states, states if row.key_from is None else states[..., :0], layer_idx)
    return cache


@torch.no_grad()
def decode_step(model, cache, token) -> None:
    model(token, past_key_values=cache)
    for layer in cache.layers:
        layer.crop(-1)


def train_step(model, tokens) -> None:
    model.zero_grad(set_to_none=True)
    model(tokens, labels=tokens, use_cache=False).loss.backward()


def timed(way: str, call) -> float:
    kernels = planned_attention.KERNELS
    planned_attention.KERNELS = () if way == "recomputed" else kernels
    start = time.perf_counter()
    call()
    planned_attention.KERNELS = kernels
    return time.perf_counter() - start


def speedups(calls: dict, rounds: int) -> dict[str, dict[str, float]]:
    """Of each way over "unshared", both timed within a round."""
    found = {way: [] for way in calls if way != "unshared"}
    absolute = []
    for number in range(rounds + 1):
        order = random.Random(number).sample(list(calls), len(calls))
        seconds = {way: timed(way, calls[way]) for way in order}
        if number:  # the first warms up
            absolute.append(seconds["unshared"])
            for way in found:
                found[way].append(seconds["unshared"] / seconds[way])
    said = {
        way: dict(zip(("low", "median", "high"), statistics.quantiles(r, n=4), strict=True)) for way, r in found.items()
    }
    return said | {"unshared": {"seconds": statistics.median(absolute)}}


def measure(options, heads: int, fraction: float) -> dict:
    rows = {"unshared": SHARINGS.get("own")(tuple(range(options.layers)), (heads,) * options.layers)}
    rows |= {way: shared_rows(way, options.layers, fraction, heads) for way in WAYS}
    models = {way: make_model(table, heads, torch.bfloat16, options.context) for way, table in rows.items()}
    caches = {way: filled_cache(model, options.batch, options.context) for way, model in models.items()}
    token = torch.ones(options.batch, 1, dtype=torch.long)
    calls = {way: lambda way=way: decode_step(models[way], caches[way], token) for way in models}
    found = {"decode": speedups(calls, options.rounds)}
    caches.clear()
    if options.train_tokens:
        tokens = torch.ones(1, options.train_tokens, dtype=torch.long)
        calls = {way: lambda way=way: train_step(models[way], tokens) for way in models if way != "recomputed"}
        found["train"] = speedups(calls, max(3, options.rounds // 3))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name, default in (
        ("threads", 2), ("layers", 9), ("rounds", 9), ("batch", 4), ("context", 4096), ("train-tokens", 256)
    ):  # fmt: skip
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--heads", type=int, nargs="+", default=[32, 4])
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    results = []
    for heads in options.heads:
        for fraction in FRACTIONS:
            found = measure(options, heads, fraction)
            results.append({"num_key_value_heads": heads, "shared_fraction": fraction, **found})
            for phase, ways in found.items():
                words = ", ".join(
                    f"{way} x{q['median']:.2f} ({q['low']:.2f}-{q['high']:.2f})"
                    for way, q in ways.items()
                    if "median" in q
                )
                print(f"{heads} KV heads, {fraction:.0%} shared, {phase}: {words}", flush=True)
    if options.output is not None:
        shape = SHAPE | {key: value for key, value in vars(options).items() if key != "output"}
        options.output.write_text(json.dumps({"shape": shape, "results": results}, indent=1) + "\n")


if __name__ == "__main__":
    main()
