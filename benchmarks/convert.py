"""Memory and time of converting a bf16 donor on disk, against copying its files and against load-modify-save.

Run: `python benchmarks/convert.py [--size 1.3b|7b] [--rounds 7] [--folder DIR] [--output FILE]`. Needs disk for the donor twice:
6 GB for 1.3b, 27 GB for 7b. Every way runs in a process of its own, interleaved, after one round that is not counted; medians.
Memory is the peak of anonymous memory (RssAnon), sampled every 2 ms, so that mapped files do not count.
"""

import argparse
import json
import os
import platform
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from importlib.metadata import version
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import LlamaConfig, LlamaForCausalLM


SIZES = {
    "1.3b": {"hidden_size": 2048, "intermediate_size": 5504, "num_hidden_layers": 24},
    "7b": {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32},
}
LAYERS_PER_SHARD = {"1.3b": 5, "7b": 8}
NUM_ATTENTION_HEADS, NUM_KEY_VALUE_HEADS = 32, 8

IMPORTS = "import sys, time, torch, transformers, hf_gqa; donor, output = sys.argv[1:3]\n"
TIMED = "import sys, time; donor, output = sys.argv[1:3]\n"
WAYS = {
    "import only": IMPORTS + "start = time.perf_counter()",
    "hf_gqa, streamed": IMPORTS
    + f"start = time.perf_counter(); hf_gqa.convert_checkpoint(donor, output, num_key_value_heads={NUM_KEY_VALUE_HEADS})",
    "cp": TIMED
    + "import subprocess; start = time.perf_counter(); subprocess.run(['cp', '-r', donor, output], check=True)",
    "cp, flushed to disk": TIMED
    + """
import os, subprocess
start = time.perf_counter()
subprocess.run(['cp', '-r', donor, output], check=True)
for name in os.listdir(output):
    with open(os.path.join(output, name), 'rb') as file:
        os.fsync(file.fileno())
""",
    "load, modify, save": IMPORTS
    + f"""
start = time.perf_counter()
model = transformers.AutoModelForCausalLM.from_pretrained(donor)
for layer in model.model.layers:
    for projection in (layer.self_attn.k_proj, layer.self_attn.v_proj):
        heads = projection.weight.data.float().view({NUM_KEY_VALUE_HEADS}, -1, model.config.head_dim, model.config.hidden_size)
        projection.weight.data = heads.mean(1).flatten(0, 1).to(torch.bfloat16)
        projection.out_features = len(projection.weight)
model.config.num_key_value_heads = {NUM_KEY_VALUE_HEADS}
model.save_pretrained(output)
""",
}
REPORT = "\nprint('SECONDS', time.perf_counter() - start)"


def write_donor(folder: Path, size: str) -> tuple[int, int]:
    """Write a random donor in shards; returns its bytes and its parameters."""
    config = LlamaConfig(
        num_attention_heads=NUM_ATTENTION_HEADS, architectures=["LlamaForCausalLM"], dtype="bfloat16", **SIZES[size]
    )
    with torch.device("meta"):
        shapes = {name: tensor.shape for name, tensor in LlamaForCausalLM(config).state_dict().items()}
    shard_of = {}
    for name in shapes:
        parts = name.split(".")
        shard_of[name] = int(parts[2]) // LAYERS_PER_SHARD[size] if parts[1] == "layers" else 0
    shards = sorted(set(shard_of.values()))
    files = {shard: f"model-{shard + 1:05d}-of-{len(shards):05d}.safetensors" for shard in shards}
    generator = torch.Generator().manual_seed(0)
    for shard, file in files.items():
        names = [name for name in shapes if shard_of[name] == shard]
        tensors = {name: torch.randn(shapes[name], generator=generator).mul_(0.02).bfloat16() for name in names}
        save_file(tensors, folder / file, metadata={"format": "pt"})
    parameters = sum(shape.numel() for shape in shapes.values())
    index = {"metadata": {"total_size": 2 * parameters}, "weight_map": {name: files[shard_of[name]] for name in shapes}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    config.save_pretrained(folder)
    return sum(path.stat().st_size for path in folder.iterdir()), parameters


def run_way(code: str, donor: Path, output: Path) -> dict:
    """Run one way in a process of its own."""
    shutil.rmtree(output, ignore_errors=True)
    os.sync()  # no way pays for what another left unwritten
    process = subprocess.Popen(
        [sys.executable, "-c", code + REPORT, str(donor), str(output)],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    peak = [0]

    def watch() -> None:
        while process.poll() is None:
            try:
                status = Path(f"/proc/{process.pid}/status").read_text()
            except OSError:
                return
            anonymous = [line.split()[1] for line in status.splitlines() if line.startswith("RssAnon")]
            peak[0] = max(peak[0], *(int(kib) * 1024 for kib in anonymous), 0)
            time.sleep(0.002)

    watcher = threading.Thread(target=watch)
    watcher.start()
    printed = process.communicate()[0]
    watcher.join()
    if process.returncode:
        raise RuntimeError(f"a way failed with {process.returncode}:\n{code}")
    return {"seconds": float(printed.rsplit("SECONDS", 1)[1]), "peak_anonymous_bytes": peak[0]}


def table(result: dict) -> str:
    lines = ["| way | seconds | times cp | peak anonymous memory | above import |", "|---|---|---|---|---|"]
    ways = result["ways"]
    for name, way in ways.items():
        if name == "import only":
            continue
        above = "" if name.startswith("cp") else f"{way['above_import_bytes'] / 1e6:.0f} MB"
        memory = f"{way['peak_anonymous_bytes'] / 1e6:.0f} MB"
        lines.append(f"| {name} | {way['seconds']:.2f} | {way['seconds_over_cp']:.2f} | {memory} | {above} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", choices=SIZES, default="1.3b")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--folder", type=Path, help="where to put donor and outputs; a temporary folder by default")
    parser.add_argument("--output", type=Path, help="benchmarks/results/convert_<size>.json by default")
    arguments = parser.parse_args()
    results = arguments.output or Path(__file__).parent / "results" / f"convert_{arguments.size}.json"
    with tempfile.TemporaryDirectory(dir=arguments.folder) as scratch:
        donor = Path(scratch) / "donor"
        donor.mkdir()
        donor_bytes, parameters = write_donor(donor, arguments.size)
        largest = max(path.stat().st_size for path in donor.iterdir())
        runs = {name: [] for name in WAYS}
        order = random.Random(0)  # so that no way always follows the same other one
        for _ in range(arguments.rounds + 1):  # the first one warms the page cache
            for name in order.sample(list(WAYS), len(WAYS)):
                runs[name].append(run_way(WAYS[name], donor, Path(scratch) / "output"))
    ways = {
        name: {key: statistics.median(run[key] for run in kept[1:]) for key in kept[0]} | {"runs": kept[1:]}
        for name, kept in runs.items()
    }
    baseline = ways["import only"]["peak_anonymous_bytes"]
    for way in ways.values():
        way["above_import_bytes"] = way["peak_anonymous_bytes"] - baseline
        way["seconds_over_cp"] = way["seconds"] / ways["cp"]["seconds"]
    result = {
        "donor": {
            "size": arguments.size,
            "parameters": parameters,
            "bytes": donor_bytes,
            "largest_shard_bytes": largest,
        },
        "plan": {"from": NUM_ATTENTION_HEADS, "num_key_value_heads": NUM_KEY_VALUE_HEADS, "method": "mean_pool"},
        "rounds": arguments.rounds,
        "device": f"CPU, {torch.get_num_threads()} threads, {platform.machine()}",
        "versions": {name: version(name) for name in ("hf_gqa", "torch", "transformers", "safetensors")},
        "ways": ways,
    }
    results.parent.mkdir(parents=True, exist_ok=True)
    results.write_text(json.dumps(result, indent=2) + "\n")
    print(f"{parameters / 1e9:.2f}B parameters, {donor_bytes / 1e9:.2f} GB in shards of up to {largest / 1e6:.0f} MB")
    print(table(result))


if __name__ == "__main__":
    main()
