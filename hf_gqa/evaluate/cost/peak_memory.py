"""The most memory that a fresh process takes to load a model, read a prompt and decode, or whatever its kind does."""

import json
import os
import subprocess
import sys
import threading
from pathlib import Path

import torch
import transformers

from ...convert.model_kind import AUTO_CLASSES, CAUSAL_LM, ENCODER, MASKED_LM, SEQ2SEQ
from ...refusal import Refusal
from .encoding_speed import forward_seconds
from .seq2seq_speed import read_source_and_decode
from .speed import read_and_decode


IN_A_FRESH_PROCESS = (
    "import sys; sys.path.append(sys.argv[2]); from hf_gqa.evaluate.cost.peak_memory import main; main(sys.argv[1])"
)
SAMPLE_SECONDS = 0.001
WORK = {
    CAUSAL_LM: read_and_decode,
    SEQ2SEQ: read_source_and_decode,
    **dict.fromkeys((MASKED_LM, ENCODER), lambda model, tokens, decode_tokens: forward_seconds(model, tokens)),
}


def peak_memory_bytes(
    folder: str | Path,
    *,
    dtype: torch.dtype | str,
    batch_size: int,
    context_tokens: int,
    decode_tokens: int,
    attn_implementation: str | None = None,
    device: str = "cpu",
    kind: str = CAUSAL_LM,
) -> int | None:
    """Weights, cache and whatever is computed, above what the process has before it loads the model.

    On the CPU this is anonymous memory, after the weights were copied out of the file that they are mapped from: pages of
    a file are the system's to take back, so they would count or not as it likes. On a GPU it is what torch allocated.

    Returns:
        None where neither is to be had: other accelerators, and other systems than Linux.

    Raises:
        Refusal: the process failed, as it does when memory runs out.
    """
    where = torch.device(device).type
    if where not in ("cpu", "cuda") or (where == "cpu" and sys.platform != "linux"):
        return None
    arguments = {
        "folder": str(folder),
        "dtype": str(dtype).removeprefix("torch."),
        "batch_size": batch_size,
        "context_tokens": context_tokens,
        "decode_tokens": decode_tokens,
        "attn_implementation": attn_implementation,
        "device": device,
        "kind": kind,
    }
    package = Path(__file__).resolve().parents[3]
    run = subprocess.run(
        [sys.executable, "-P", "-c", IN_A_FRESH_PROCESS, json.dumps(arguments), str(package)],
        env=os.environ | {"HF_HUB_OFFLINE": "1"},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
    )
    if run.returncode:
        lines = run.stderr.strip().splitlines()
        reason = lines[-1] if lines else f"the process ended with {run.returncode}"
        raise Refusal(
            f"{folder}: its peak memory could not be measured ({reason}). Use a smaller batch or a shorter context, or "
            f"leave the measurement out."
        )
    return json.loads(run.stdout.strip().splitlines()[-1])


def main(arguments: str) -> None:
    """Runs in the fresh process; prints the bytes as its last line."""
    settings = json.loads(arguments)
    if settings["device"] == "cpu":
        print(json.dumps(_anonymous_peak_bytes(settings)))
    else:
        _load_and_decode(settings)
        print(json.dumps(torch.cuda.max_memory_allocated()))


def _load_and_decode(settings: dict) -> None:
    model = getattr(transformers, AUTO_CLASSES[settings["kind"]]).from_pretrained(
        settings["folder"],
        dtype=getattr(torch, settings["dtype"]),
        attn_implementation=settings["attn_implementation"],
    )
    model.eval().requires_grad_(False).to(settings["device"])
    if model.device.type == "cpu":
        for parameter in model.parameters():
            parameter.data = parameter.data.clone()
    shape = (settings["batch_size"], settings["context_tokens"])
    tokens = torch.randint(model.config.vocab_size, shape, generator=torch.Generator().manual_seed(0))
    WORK[settings["kind"]](model, tokens.to(model.device), settings["decode_tokens"])


def _anonymous_peak_bytes(settings: dict) -> int:
    baseline, peak, done = _anonymous_bytes(), 0, threading.Event()

    def watch():
        nonlocal peak
        while not done.wait(SAMPLE_SECONDS):
            peak = max(peak, _anonymous_bytes())

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    _load_and_decode(settings)
    done.set()
    watcher.join()
    return max(peak, _anonymous_bytes()) - baseline


def _anonymous_bytes() -> int:
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) * 1024 for line in status if line.startswith("RssAnon"))
