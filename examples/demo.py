"""The main job on the embedded donor: 8 KV heads become 4, 2 and 1; what that saves, and what it costs untrained.

Run: `make demo`, or `python examples/demo.py`. Offline, on a CPU, in about a minute. Writes ./students.
"""

import os
import sys
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging

from hf_gqa import convert_checkpoint
from hf_gqa.convert.cache_bytes import cache_bytes_per_token_computed, cache_bytes_per_token_measured


DONOR = Path(__file__).parent / "donor"
STUDENTS = Path("students")
COMMAND = os.path.relpath(Path(sys.executable).parent / "hf-gqa")
PROMPT = "The old man looked at the sea and"


def loss_nats_per_token(model, tokens: torch.Tensor) -> float:
    with torch.no_grad():
        return model(tokens, labels=tokens).loss.item()


def continuation(model, tokenizer) -> str:
    prompt = tokenizer(PROMPT, return_tensors="pt", return_token_type_ids=False)
    written = model.generate(**prompt, max_new_tokens=24, do_sample=False, pad_token_id=0)[0]
    return " ".join(tokenizer.decode(written, skip_special_tokens=True).split())


def main() -> None:
    logging.disable_progress_bar()
    console = Console(highlight=False)
    tokenizer = AutoTokenizer.from_pretrained(DONOR)
    donor = AutoModelForCausalLM.from_pretrained(DONOR, dtype=torch.float32).eval()
    torch.manual_seed(0)
    start = torch.full((32, 1), tokenizer.bos_token_id)
    settings = {"max_new_tokens": 127, "min_new_tokens": 127, "do_sample": True, "top_k": 0, "pad_token_id": 1}
    text = donor.generate(start, attention_mask=torch.ones_like(start), **settings)

    table = Table("KV heads", "cache/token, computed", "measured", "loss, nats/token", title="prose-mha, mean pooled")
    samples = []
    for heads in (8, 4, 2, 1):
        model = donor
        if heads < 8:
            folder = STUDENTS / f"prose-gqa-{heads}"
            convert_checkpoint(DONOR, folder, num_key_value_heads=heads, method="mean_pool", overwrite=True)
            model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        computed = cache_bytes_per_token_computed(model.config, [heads] * model.config.num_hidden_layers, model.dtype)
        measured = cache_bytes_per_token_measured(model)
        table.add_row(str(heads), f"{computed:,} B", f"{measured:,.0f} B", f"{loss_nats_per_token(model, text):.3f}")
        samples.append((heads, continuation(model, tokenizer)))

    console.print(table)
    console.print(
        f"loss on {text.numel():,} tokens that the donor sampled (seed 0, temperature 1); cache in float32\n",
        soft_wrap=True,
    )
    for heads, sample in samples:
        console.print(f"[bold]{heads} KV heads:[/bold] {sample}", soft_wrap=True)
    console.print(
        "\nThe cache shrinks as computed, and mean pooling wrecks the untrained student: heads that were trained "
        "apart do not average.\nThat is what uptraining is for. The students are ordinary Llama checkpoints in "
        f"./{STUDENTS}; check one with\n  {COMMAND} verify {STUDENTS}/prose-gqa-2 --donor {os.path.relpath(DONOR)}",
        soft_wrap=True,
    )


if __name__ == "__main__":
    main()
