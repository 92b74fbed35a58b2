"""Quality right after conversion, without training, by method and number of KV heads, on text nobody calibrated on.

Run: `python benchmarks/conversion.py DATA [--donors gptstories,prose] [--results FOLDER] [--rounds 1,2] [--only SUBSTRING]`, where DATA
holds `corpora` and `donors` as benchmarks/uptrain.py reads them; prose_gqa and gptstories_gqa are donors converted to four KV heads by the
best method here, which are kept in --scratch. Calibration rows are spread over the training text; a seed takes others. Cells that a donor's file in the
folder already holds are skipped. benchmarks/conversion_table.py writes conversion.md of those files.

What is measured on: while the methods were being written, every n-th window of the held-out text was looked at. Those between them,
which nothing was chosen by, are what is measured here.
"""

import argparse
import json
import subprocess
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
from hf_gqa.evaluate.inputs.windows import prefix_token, token_ids, windows_of
from hf_gqa.evaluate.quality.bootstrap import Bootstrap
from hf_gqa.evaluate.quality.token_scores import score
from hf_gqa.workflow.choose_method import choose_method


RESULTS = Path(__file__).parent / "results"
ROW_TOKENS = 256
BEST = "group,fold,refit_queries,refit"
AUTO = "auto"
ROUNDS = (  # (methods, KV heads, seeds); what the issue of it all is first, what takes long later
    (
        (
            "mean_pool",
            "first",
            "random_init",
            "mean_pool,renormalise",
            "align,mean_pool",
            "group,align,mean_pool",
            "group,align,mean_pool,renormalise",
            "fold (weights alone)",
            "group,fold (weights alone)",
            "fold",
            "group,fold",
            "low_rank",
            "group,low_rank",
            "whole projections of low rank (no stock class)",
        ),
        (4, 2, 1),
        (0,),
    ),
    (("group,fold,refit", BEST), (4, 2, 1), (0,)),
    (
        ("fold (per layer)", "group,fold (per layer)", "group,fold,refit (per layer)", f"{BEST} (per layer)"),
        (4, 2),
        (0,),
    ),
    ((AUTO,), (2, 4, 1), (0,)),
    ((BEST,), (2, 4, 1), (1, 2)),
    (
        (
            "fold (per layer)",
            "group,fold (per layer)",
            "group,fold (per layer, greedy)",
            "fold (keys 4, values 2)",
            "fold (keys 2, values 4)",
            f"{BEST} (per layer)",
        ),
        (3,),
        (0,),
    ),
    (("mean_pool,refit", "group,low_rank,refit", "group,fold,refit_queries"), (4, 2, 1), (0,)),
    (("group,align,mean_pool,refit_queries,refit",), (4, 2, 1), (0,)),
    (("group,fold", f"{BEST} (per layer)"), (4, 2, 1), (1, 2)),
)


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
        every = max(2, len(windows) * ROW_TOKENS // held_out_tokens)
        self.windows = windows[every // 2 :: every]
        self.calibrations, self.damages = {}, {}
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
        if method == AUTO:
            return self.choice(num_key_value_heads, seed)
        plain, _, variant = method.partition(" (")
        known = Known(self.model, self.calibration(seed), num_key_value_heads, self.damages.setdefault(seed, {}))
        begun = time.perf_counter()
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

    def choice(self, num_key_value_heads: int, seed: int) -> dict | None:
        """What `--method auto` finds by the calibration text alone, of which it keeps an eighth back to measure on."""
        if any(count % num_key_value_heads or count == num_key_value_heads for count in self.donor_heads):
            return None
        trials = choose_method(
            self.model, self.calibration(seed).tokens_NL.long(), num_key_value_heads=num_key_value_heads
        )
        told = {"method": AUTO, "num_key_value_heads": num_key_value_heads, "seed": seed}
        return told | {"trials": [trial.to_dict() for trial in trials]}


def read(output: Path) -> list[dict]:
    return [json.loads(line) for line in output.read_text().splitlines()] if output.exists() else []


def cells(rounds: list[int], donors: list[str], only: str) -> list[tuple[str, str, int, int]]:
    """(donor, method, KV heads, seed)."""
    return [
        (donor, method, count, seed)
        for methods, counts, seeds in (ROUNDS[number - 1] for number in rounds)
        for donor in donors
        for seed in seeds
        for method in methods
        for count in counts
        if only in method
    ]


def commit() -> str:
    return subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True).stdout.strip()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("data", type=Path)
    parser.add_argument(
        "--donors", default="gptstories,prose", help=f"of {', '.join(DONORS)}; NAME_gqa for a grouped one"
    )
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of conversion_<donor>.jsonl")
    parser.add_argument("--scratch", type=Path, default=Path(tempfile.gettempdir()))
    parser.add_argument("--rounds", default=",".join(str(number + 1) for number in range(len(ROUNDS))))
    parser.add_argument("--only", default="", help="run only methods whose names hold this")
    parser.add_argument("--calibration-tokens", type=int, default=16_384)
    parser.add_argument("--held-out-tokens", type=int, default=16_384)
    parser.add_argument("--threads", type=int, default=1)
    asked = parser.parse_args()
    torch.set_num_threads(asked.threads)
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    facts = machine() | {"compute": "float32", "commit": commit()}
    donors = asked.donors.split(",")
    benches = {
        donor: Bench(donor, asked.data, asked.scratch, asked.calibration_tokens, asked.held_out_tokens)
        for donor in donors
    }
    for donor, *cell in cells([int(number) for number in asked.rounds.split(",")], donors, asked.only):
        output = asked.results / f"conversion_{donor}.jsonl"
        done = [[found["method"], found["num_key_value_heads"], found["seed"]] for found in read(output)]
        found = None if cell in done else benches[donor].run(*cell)
        if found is not None:
            with output.open("a") as file:
                file.write(json.dumps(found | facts) + "\n")
            print(donor, *cell, found.get("loss", ""), file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
