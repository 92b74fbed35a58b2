"""Quality right after conversion, without training, by method and number of KV heads, on text nobody calibrated on.

Run: `python benchmarks/conversion.py DATA --donor prose|gptstories|prose_gqa [--output FILE] [--heads 4,3,2,1] [--only SUBSTRING]`, where
DATA holds `corpora` and `donors` as benchmarks/uptrain.py reads them; prose_gqa is prose converted to four KV heads by the best method
here, which is kept in --scratch. Calibration rows are spread over the training text; a seed takes others. Cells that the output already
holds are skipped; `--table` prints what it holds as Markdown.
"""

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path

import torch
from conversion_variants import VARIANTS, Known
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging
from uptrain import DONORS, machine, rows_of

from hf_gqa import convert
from hf_gqa.convert.calibration import calibrate
from hf_gqa.convert.donor import donor_from_model
from hf_gqa.evaluate.bootstrap import Bootstrap
from hf_gqa.evaluate.quality import score
from hf_gqa.evaluate.windows import prefix_token, token_ids, windows_of


ROW_TOKENS = 256
BEST = "group,fold,refit_queries,refit"
METHODS = (  # what takes long last
    "mean_pool",
    "first",
    "random_init",
    "mean_pool,renormalise",
    "align,mean_pool",
    "group,align,mean_pool",
    "group,align,mean_pool,renormalise",
    "low_rank",
    "group,low_rank",
    "whole projections of low rank (no stock class)",
    "fold (weights alone)",
    "group,fold (weights alone)",
    "fold",
    "fold (per layer)",
    "fold (keys 4, values 2)",
    "fold (keys 2, values 4)",
    "group,fold",
    "group,fold (per layer)",
    "mean_pool,refit",
    "group,low_rank,refit",
    "group,fold,refit",
    BEST,
    f"{BEST} (per layer)",
    f"{BEST} (per layer, greedy)",
    "group,fold,refit_queries",
    "group,align,mean_pool,refit_queries,refit",
)
SEEDED = (BEST, "group,fold", f"{BEST} (per layer)")


class RememberedDonor:
    """A donor that computes the logits of each batch once."""

    def __init__(self, model):
        self.model, self.device, self.kept = model, model.device, {}

    def __call__(self, tokens, **kwargs):
        key = tokens.numpy().tobytes()
        if key not in self.kept:
            self.kept[key] = self.model(tokens, **kwargs)
        return self.kept[key]


class Bench:
    def __init__(self, name: str, data: Path, scratch: Path, calibration_tokens: int, held_out_tokens: int):
        donor = DONORS[name.removesuffix("_gqa")]
        folder = data / "donors" / donor.folder
        tokenizer = AutoTokenizer.from_pretrained(folder)
        documents, held_out = donor.text(data)
        self.all_rows = rows_of(documents, tokenizer, ROW_TOKENS).with_format("torch")
        self.wanted_rows = calibration_tokens // ROW_TOKENS
        tokens = [token for text in held_out for token in token_ids(tokenizer, text)]
        windows = list(windows_of(tokens, prefix_token(tokenizer), ROW_TOKENS, ROW_TOKENS))
        self.windows = windows[:: max(1, len(windows) * ROW_TOKENS // held_out_tokens)]
        self.calibrations = {}
        self.model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        if name.endswith("_gqa"):
            self.model = self.grouped(scratch / name)
            self.calibrations = {}
        self.remembered = RememberedDonor(self.model)
        self.donor_heads = donor_from_model(self.model).num_key_value_heads

    def grouped(self, folder: Path):
        if not folder.exists():
            convert(self.model, num_key_value_heads=4, method=BEST, calibration=self.calibration(0)).save_pretrained(
                folder
            )
        return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()

    def calibration(self, seed: int):
        """The rows of each seed lie a third of the way further."""
        if seed not in self.calibrations:
            step = (len(self.all_rows) - 1) / self.wanted_rows
            picked = [int((number + seed / 3) * step) for number in range(self.wanted_rows)]
            rows_NL = torch.stack([self.all_rows[number]["input_ids"] for number in picked])
            self.calibrations[seed] = calibrate(donor_from_model(self.model), self.model, rows_NL)
        return self.calibrations[seed]

    def run(self, method: str, num_key_value_heads: int, seed: int) -> dict | None:
        """None for what such a number of heads does not have."""
        plain, _, variant = method.partition(" (")
        begun = time.perf_counter()
        known = Known(self.model, self.calibration(seed), num_key_value_heads)
        make = VARIANTS.get(variant.rstrip(")"))
        if make is None:
            return None
        student, told = make(plain, known)
        if student is None:
            return None
        seconds = time.perf_counter() - begun
        scores = score(self.remembered, student, self.windows, 16)
        kl = Bootstrap().interval(scores.by_window(scores.kl_N), scores.by_window(torch.ones(len(scores)).numpy()))
        return {
            "method": method,
            "num_key_value_heads": num_key_value_heads,
            "seed": seed,
            "donor_loss": float(scores.donor_loss_N.mean()),
            "loss": float(scores.student_loss_N.mean()),
            "kl": float(scores.kl_N.mean()),
            "kl_interval": [kl.low, kl.high],
            "top1_agreement": float(scores.agrees_N.mean()),
            "held_out_tokens": len(scores),
            "calibration_tokens": self.wanted_rows * ROW_TOKENS,
            "seconds": seconds,
            **told,
        }


def read(output: Path) -> list[dict]:
    return [json.loads(line) for line in output.read_text().splitlines()] if output.exists() else []


def table(results: list[dict]) -> str:
    """Of seed 0, with the range of the others' KL; the share undone is of what mean pooling adds to the donor's loss."""
    lines = [
        "| KV heads | method | loss | KL to the donor | other seeds | top-1 | mean pooling's damage undone | seconds |"
    ]
    lines.append("|---|---|---|---|---|---|---|---|")
    pooled = {found["num_key_value_heads"]: found for found in results if found["method"] == "mean_pool"}
    order = {method: number for number, method in enumerate(METHODS)}
    of_seed_0 = [found for found in results if found["seed"] == 0]
    for found in sorted(of_seed_0, key=lambda one: (-one["num_key_value_heads"], order[one["method"]])):
        mean, undone = pooled.get(found["num_key_value_heads"]), ""
        if mean is not None:
            undone = f"{1 - (found['loss'] - found['donor_loss']) / (mean['loss'] - mean['donor_loss']):.1%}"
        same = ("method", "num_key_value_heads")
        others = [f"{o['kl']:.3f}" for o in results if o["seed"] and all(o[key] == found[key] for key in same)]
        lines.append(
            f"| {found['num_key_value_heads']} | {found['method']} | {found['loss']:.3f} | {found['kl']:.3f} | "
            f"{', '.join(others)} | {found['top1_agreement']:.1%} | {undone} | {found['seconds']:.1f} |"
        )
    return "\n".join(lines)


def cells(heads: list[int], only: str) -> list[tuple[str, int, int]]:
    """(method, KV heads, seed), the first seed of everything first."""
    chosen = [method for method in METHODS if only in method]
    first = [(method, count, 0) for method in chosen for count in heads]
    return first + [
        (method, count, seed) for method in SEEDED if method in chosen for seed in (1, 2) for count in heads
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("data", type=Path)
    parser.add_argument("--donor", choices=[*DONORS, "prose_gqa"], default="prose")
    parser.add_argument("--output", type=Path)
    parser.add_argument("--scratch", type=Path, default=Path(tempfile.gettempdir()))
    parser.add_argument("--heads", default="4,3,2,1")
    parser.add_argument("--only", default="", help="run only methods whose names hold this")
    parser.add_argument("--calibration-tokens", type=int, default=16_384)
    parser.add_argument("--held-out-tokens", type=int, default=16_384)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--table", action="store_true", help="run nothing")
    asked = parser.parse_args()
    output = asked.output or Path(__file__).parent / "results" / f"conversion_{asked.donor}.jsonl"
    if not asked.table:
        torch.set_num_threads(asked.threads)
        logging.set_verbosity_error()
        logging.disable_progress_bar()
        bench = Bench(asked.donor, asked.data, asked.scratch, asked.calibration_tokens, asked.held_out_tokens)
        done = {(found["method"], found["num_key_value_heads"], found["seed"]) for found in read(output)}
        for cell in cells([int(count) for count in asked.heads.split(",")], asked.only):
            found = None if cell in done else bench.run(*cell)
            if found is not None:
                with output.open("a") as file:
                    file.write(json.dumps(found | machine() | {"compute": "float32"}) + "\n")
                print(f"{cell}: {found['loss']:.3f}", file=sys.stderr, flush=True)
    results = read(output)
    print(
        f"Donor {results[0]['donor_loss']:.3f} nats per token on {results[0]['held_out_tokens']:,} held-out tokens.\n"
    )
    print(table(results))


if __name__ == "__main__":
    main()
