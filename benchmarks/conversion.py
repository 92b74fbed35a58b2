"""Quality right after conversion, without training, by method and number of KV heads, on text nobody calibrated on.

Run: `python benchmarks/conversion.py DATA --donor prose|gptstories [--output FILE] [--heads 4,2,1] [--only SUBSTRING]`, where DATA holds
`corpora` and `donors` as benchmarks/uptrain.py reads them. Calibration rows are spread over the training text. Cells that the output already
holds are skipped; `--table` prints what it holds as Markdown.
"""

import argparse
import json
import sys
import time
from pathlib import Path

import torch
from transformers import AutoTokenizer
from transformers.utils import logging
from uptrain import DONORS, machine, rows_of

from hf_gqa import convert, open_donor
from hf_gqa.convert.calibration import Calibration, calibrate
from hf_gqa.convert.donor import donor_from_model
from hf_gqa.evaluate.bootstrap import Bootstrap
from hf_gqa.evaluate.quality import score
from hf_gqa.evaluate.windows import prefix_token, token_ids, windows_of


ROW_TOKENS = 256
METHODS = (  # what takes long last
    "mean_pool",
    "first",
    "mean_pool,renormalise",
    "align,mean_pool",
    "group,align,mean_pool",
    "group,align,mean_pool,renormalise",
    "fold (weights alone)",
    "fold",
    "group,fold",
    "group,fold,refit_queries,refit",
    "group,fold,refit",
    "mean_pool,refit",
    "group,align,mean_pool,refit_queries,refit",
    "group,fold,refit_queries",
)


class Bench:
    def __init__(self, name: str, data: Path, calibration_tokens: int, held_out_tokens: int):
        donor = DONORS[name]
        folder = data / "donors" / donor.folder
        tokenizer = AutoTokenizer.from_pretrained(folder)
        documents, held_out = donor.text(data)
        rows = rows_of(documents, tokenizer, ROW_TOKENS).with_format("torch")
        picked = torch.linspace(0, len(rows) - 1, calibration_tokens // ROW_TOKENS).long().tolist()
        self.rows = torch.stack([rows[number]["input_ids"] for number in picked])
        tokens = [token for text in held_out for token in token_ids(tokenizer, text)]
        windows = list(windows_of(tokens, prefix_token(tokenizer), ROW_TOKENS, ROW_TOKENS))
        self.windows = windows[:: max(1, len(windows) * ROW_TOKENS // held_out_tokens)]
        self.model = open_donor(folder).model_class.from_pretrained(folder, dtype=torch.float32).eval()
        self.calibration: Calibration = calibrate(donor_from_model(self.model), self.model, self.rows)

    def run(self, method: str, num_key_value_heads: int) -> dict:
        known = None if "weights alone" in method else self.calibration
        begun = time.perf_counter()
        student = convert(
            self.model,
            num_key_value_heads=num_key_value_heads,
            method=method.partition(" (")[0],
            calibration=known,
        )
        seconds = time.perf_counter() - begun
        scores = score(self.model, student, self.windows, 16)
        kl = Bootstrap().interval(scores.by_window(scores.kl_N), scores.by_window(torch.ones(len(scores)).numpy()))
        return {
            "method": method,
            "num_key_value_heads": num_key_value_heads,
            "donor_loss": float(scores.donor_loss_N.mean()),
            "loss": float(scores.student_loss_N.mean()),
            "kl": float(scores.kl_N.mean()),
            "kl_interval": [kl.low, kl.high],
            "top1_agreement": float(scores.agrees_N.mean()),
            "held_out_tokens": len(scores),
            "calibration_tokens": self.rows.numel(),
            "seconds": seconds,
        }


def read(output: Path) -> list[dict]:
    return [json.loads(line) for line in output.read_text().splitlines()] if output.exists() else []


def table(results: list[dict]) -> str:
    """The share undone is of what mean pooling adds to the donor's loss."""
    lines = [
        "| KV heads | method | loss | KL to the donor | top-1 agreement | mean pooling's damage undone | seconds |"
    ]
    lines.append("|---|---|---|---|---|---|---|")
    pooled = {found["num_key_value_heads"]: found for found in results if found["method"] == "mean_pool"}
    order = {method: number for number, method in enumerate(METHODS)}
    for found in sorted(results, key=lambda one: (-one["num_key_value_heads"], order[one["method"]])):
        mean, undone = pooled.get(found["num_key_value_heads"]), float("nan")
        if mean is not None:
            undone = 1 - (found["loss"] - found["donor_loss"]) / (mean["loss"] - mean["donor_loss"])
        lines.append(
            f"| {found['num_key_value_heads']} | {found['method']} | {found['loss']:.3f} | {found['kl']:.3f} | "
            f"{found['top1_agreement']:.1%} | {undone:.1%} | {found['seconds']:.1f} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("data", type=Path)
    parser.add_argument("--donor", choices=DONORS, default="prose")
    parser.add_argument("--output", type=Path)
    parser.add_argument("--heads", default="4,2,1")
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
        bench = Bench(asked.donor, asked.data, asked.calibration_tokens, asked.held_out_tokens)
        done = {(found["method"], found["num_key_value_heads"]) for found in read(output)}
        for method in (method for method in METHODS if asked.only in method):
            for heads in map(int, asked.heads.split(",")):
                if (method, heads) not in done:
                    found = bench.run(method, heads) | machine()
                    found["compute"] = "float32"
                    with output.open("a") as file:
                        file.write(json.dumps(found) + "\n")
                    print(f"8 -> {heads} {method}: {found['loss']:.3f}", file=sys.stderr, flush=True)
    results = read(output)
    print(
        f"Donor {results[0]['donor_loss']:.3f} nats per token on {results[0]['held_out_tokens']:,} held-out tokens.\n"
    )
    print(table(results))


if __name__ == "__main__":
    main()
