"""What layer sharing is worth in time: decoding and a training step against the unshared model, at TinyLlama-1.1B's shape.

Run on a quiet machine: `python benchmarks/sharing_speed.py [--minutes 11] [--threads 2] [--output FILE.json]`; FILE.md is written beside it. Cells that the
output already holds are skipped, so that a run that was stopped goes on. `--quick` tries all of it at a small size. `--table` writes FILE.md alone.

Weights of one value and a cache of random numbers; timing does not depend on them. Of the 22 layers and 32,000 tokens of the vocabulary there are as many as `--layers`
says, in proportion. The ways take turns in random order, round after round, for as long as a cell may take; each number is the median over rounds of unshared
time over the way's time in the same round, with quartiles. `expected` is what would follow if decoding took the time of the bytes that it reads, and training
that of its multiplications.

echo: borrowers reuse the lender's probabilities while decoding. recomputed: they compute them again from its queries and keys, as they do in
training. cross_layer_kv: borrowers read the lender's keys and values. Layers that own are the first of each equal stretch.
"""

import argparse
import gc
import json
import platform
import random
import statistics
import time
from pathlib import Path

import torch
import transformers
from transformers import AutoModelForCausalLM, DynamicCache

from hf_gqa.convert.cache_bytes import read_heads
from hf_gqa.convert.families import load_family
from hf_gqa.runtime import planned_attention
from hf_gqa.runtime.layer_plan import read_rows
from hf_gqa.runtime.native_call import with_cache
from hf_gqa.sharing import SHARINGS


SHAPE = {"hidden_size": 2048, "num_attention_heads": 32, "intermediate_size": 5632}
WHOLE = {"layers": 22, "vocab_size": 32_000}
QUICK = {"layers": 4, "rounds": 3, "batch": 1, "context": 256, "train_tokens": 16, "minutes": 0.2}
LEAST_ROUNDS = 3
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
        vocab_size=WHOLE["vocab_size"] * len(rows) // WHOLE["layers"],
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


def filled_cache(model, states: torch.Tensor) -> DynamicCache:
    """A copy of the states in every place."""
    cache = DynamicCache(config=model.config)
    for layer_idx, row in enumerate(read_rows(model.config)):
        if row.value_from is None:
            cache.update(states, states if row.key_from is None else states[..., :0], layer_idx)
    return cache


@torch.no_grad()
def decode_step(model, cache, token) -> None:
    model(token, **with_cache(model, cache))
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


def speedups(calls: dict, rounds: int, seconds: float) -> dict:
    """Of each way over "unshared", both timed within a round.

    Args:
        rounds, seconds: at most so many rounds, and none begins that would end later; `LEAST_ROUNDS` there are always.
    """
    times: list[dict[str, float]] = []
    begun = time.perf_counter()
    for number in range(rounds + 1):
        passed = time.perf_counter() - begun
        if number > LEAST_ROUNDS and passed * (number + 1) / number > seconds:
            break
        order = random.Random(number).sample(list(calls), len(calls))
        times.append({way: timed(way, calls[way]) for way in order})
    times = times[1:]  # the first warms up
    found = {"unshared": {"seconds": statistics.median(one["unshared"] for one in times), "rounds": len(times)}}
    for way in calls.keys() - {"unshared"}:
        ratios = [one["unshared"] / one[way] for one in times]
        found[way] = dict(zip(("low", "median", "high"), statistics.quantiles(ratios, n=4), strict=True))
    return found


def bytes_read(way: str, model, options) -> int:
    """By one decoding step: all weights but the embeddings, and what the cache holds that is read."""
    numbers = sum(p.numel() for name, p in model.named_parameters() if "embed_tokens" not in name)
    for heads in read_heads(model.config):
        keys, values = heads if isinstance(heads, tuple) else (heads, heads)
        numbers += (2 * values if way == "recomputed" else keys + values) * HEAD_DIM * options.context * options.batch
    return numbers * model.dtype.itemsize


def multiplications(way: str, model, options) -> float:
    """Of one training step, in numbers multiplied by numbers; scores are computed in every layer, lent or not."""
    tokens = options.train_tokens
    weights = sum(p.numel() for name, p in model.named_parameters() if "embed_tokens" not in name)
    scores = model.config.num_hidden_layers * SHAPE["hidden_size"] * tokens  # two products, half of them masked
    return 3 * tokens * (weights + scores)


def measure(options, phase: str, heads: int, fraction: float, seconds: float) -> dict:
    begun = time.perf_counter()
    rows = {"unshared": SHARINGS.get("own")(tuple(range(options.layers)), (heads,) * options.layers)}
    ways = WAYS if phase == "decode" else [way for way in WAYS if way != "recomputed"]
    rows |= {way: shared_rows(way, options.layers, fraction, heads) for way in ways}
    models = {way: make_model(table, heads, torch.bfloat16, options.context) for way, table in rows.items()}
    work = bytes_read if phase == "decode" else multiplications
    known = {way: work(way, model, options) for way, model in models.items()}
    if phase == "decode":
        states = torch.randn(options.batch, heads, options.context, HEAD_DIM, dtype=torch.bfloat16)
        caches = {way: filled_cache(model, states) for way, model in models.items()}
        token = torch.ones(options.batch, 1, dtype=torch.long)
        calls = {way: lambda way=way: decode_step(models[way], caches[way], token) for way in models}
    else:
        tokens = torch.ones(1, options.train_tokens, dtype=torch.long)
        calls = {way: lambda way=way: train_step(models[way], tokens) for way in models}
    found = speedups(calls, options.rounds, seconds - (time.perf_counter() - begun))
    for way in ways:
        found[way]["expected"] = known["unshared"] / known[way]
    return {"phase": phase, "num_key_value_heads": heads, "shared_fraction": fraction, "ways": found}


def machine(options) -> dict:
    processor = next((line for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line), "")
    return {
        "device": f"cpu, {processor.partition(': ')[2] or platform.machine()}",
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "dtype": "bfloat16",
        **SHAPE,
        **{name: getattr(options, name) for name in ("threads", "layers", "batch", "context", "train_tokens")},
    }


def markdown(found: dict) -> str:
    made = found["machine"]
    lines = [
        f"Llama blocks of TinyLlama-1.1B's width, {made['layers']} layers, {made['dtype']}, {made['device']}, {made['threads']} threads, torch "
        f"{made['torch']}, transformers {made['transformers']}. Decoding: {made['batch']} sequences with {made['context']:,} tokens each. Training: a step of one "
        f"sequence of {made['train_tokens']:,} tokens, forward and backward. Times as fast as unshared, median of rounds, quartiles in brackets; "
        "in the last place what bytes read (decoding) or multiplications (training) would make of it.",
        "",
        "| phase | KV heads | layers that borrow | unshared, s | rounds | echo | echo, recomputed | cross_layer_kv |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for cell in found["results"]:
        ways = cell["ways"]
        said = [
            f"{ways[way]['median']:.2f} ({ways[way]['low']:.2f} to {ways[way]['high']:.2f}), {ways[way]['expected']:.2f}"
            if way in ways
            else "as echo"
            for way in WAYS
        ]
        own = ways["unshared"]
        lines.append(
            f"| {cell['phase']} | {cell['num_key_value_heads']} | {cell['shared_fraction']:.0%} | {own['seconds']:.3f} | {own['rounds']} | "
            f"{' | '.join(said)} |"
        )
    return "\n".join(lines) + "\n"


def asked_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name, default in (
        ("threads", 2), ("layers", 9), ("rounds", 15), ("batch", 4), ("context", 4096), ("train-tokens", 256)
    ):  # fmt: skip
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--heads", type=int, nargs="+", default=[32, 4], help="KV heads to decode with")
    parser.add_argument("--train-heads", type=int, nargs="*", default=[32], help="KV heads to train with")
    parser.add_argument(
        "--minutes", type=float, default=11.0, help="that the cells share; each has three rounds at least"
    )
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results" / "sharing_speed.json")
    parser.add_argument("--quick", action="store_true", help="a small size, to see that it runs; not into the results")
    parser.add_argument("--table", action="store_true", help="measure nothing, write the Markdown of the output")
    options = parser.parse_args()
    if options.quick:
        vars(options).update(QUICK)
        if options.output == parser.get_default("output"):
            options.output = Path("/tmp") / "sharing_speed_quick.json"
    return options


def main() -> None:
    options = asked_options()
    found = {"machine": machine(options), "results": []}
    if options.output.exists():
        found = json.loads(options.output.read_text())
        if not options.table and found["machine"] != machine(options):
            raise SystemExit(
                f"{options.output}: is of another machine or size. Move it away, or give another --output."
            )
    torch.set_num_threads(options.threads)
    cells = [("train", heads, fraction) for heads in options.train_heads for fraction in FRACTIONS]
    cells += [("decode", heads, fraction) for heads in options.heads for fraction in FRACTIONS]
    known = {(one["phase"], one["num_key_value_heads"], one["shared_fraction"]) for one in found["results"]}
    left, end = [cell for cell in cells if cell not in known], time.perf_counter() + 60 * options.minutes
    for number, cell in enumerate([] if options.table else left):
        seconds = max(0.0, end - time.perf_counter()) / (len(left) - number)
        found["results"].append(measure(options, *cell, seconds))
        options.output.write_text(json.dumps(found, indent=1) + "\n")
        gc.collect()
        print(markdown(found).splitlines()[-1], flush=True)
    options.output.with_suffix(".md").write_text(markdown(found))


if __name__ == "__main__":
    main()
