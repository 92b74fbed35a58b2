"""Quality of converted students over tokens of uptraining: cross-entropy against two kinds of distillation.

Run: `python benchmarks/uptrain.py DATA --donor prose|gptstories [--output FILE] [--only SUBSTRING]`, where DATA holds `corpora` and
`donors` as the README of the results says. Each cell (KV heads, method, objective, budget, seed) is a run of its own with a learning
rate schedule of its own. Cells that the output already holds are skipped, so several processes may share the work with --part i/n.
`--plot FILE.svg` draws what the output holds.
"""

import argparse
import json
import math
import platform
import statistics
import sys
import tempfile
import time
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from datasets import Dataset
from transformers import AutoTokenizer, PrinterCallback, TrainingArguments, set_seed
from transformers.utils import logging

from hf_gqa import convert, open_donor
from hf_gqa.text.packing import PackedCollator, packed_rows
from hf_gqa.uptrain.budgeted_rows import BudgetedRows
from hf_gqa.uptrain.callback import UptrainCallback
from hf_gqa.uptrain.lora import add_lora
from hf_gqa.uptrain.objectives import OBJECTIVES
from hf_gqa.uptrain.trainer import UptrainTrainer


@dataclass(frozen=True)
class Donor:
    """Where a donor and its text are, and how many tokens it was trained on (None: nobody recorded it).

    `budgets` are fractions of those tokens, or of `budget_unit` where there are none.
    """

    folder: str
    sequence_length: int
    pretraining_tokens: int | None
    budget_unit: int

    def text(self, data: Path) -> tuple[list[str], list[str]]:
        """(documents to train on, documents never trained on)."""
        corpora = data / "corpora"
        if self.folder == "gptstories-280k-mha":
            stories = (corpora / "tinystories-1000" / "train_900.txt").read_text(encoding="utf-8")
            cut = int(len(stories) * 0.9)
            return [stories[:cut]], [stories[cut:]]
        files = sorted((corpora / "gutenberg-nltk").glob("*.txt")) + sorted((corpora / "us-speeches").rglob("*.txt"))
        files.append(corpora / "grimm" / "GrimmsFairyTales.txt")
        documents = [text[: int(len(text) * 0.96)] for text in (f.read_text(encoding="latin-1") for f in files)]
        plays = (corpora / "tinyshakespeare" / "input.txt").read_text(encoding="utf-8")
        documents.append(plays[: int(len(plays) * 0.9)])
        documents.append((corpora / "wikitext-2" / "valid.txt").read_text(encoding="utf-8"))
        documents.append((corpora / "tinystories-1000" / "train_900.txt").read_text(encoding="utf-8"))
        return documents, [(corpora / "prose-heldout" / "heldout.txt").read_text(encoding="utf-8")]


DONORS = {
    "prose": Donor("prose-mha", 256, 16_384_000, 16_384_000),
    "gptstories": Donor("gptstories-280k-mha", 256, None, 16_384_000),
}
HELD_OUT_TOKENS = 32_768
CALIBRATION_TOKENS = 16_384
BEST = "group,fold,refit_queries,refit"


@dataclass(frozen=True)
class Cell:
    """One run. `rate` is the run's learning rate, `rows` its rows of a step; those that served each objective best."""

    objective: str
    budget_fraction: float
    num_key_value_heads: int
    seed: int
    method: str = "mean_pool"
    train: str | None = None
    rows: int = 2
    rate: float = 1e-3
    lora_rank: int | None = None

    @property
    def name(self) -> str:
        extra = "".join(f" {x}" for x in (self.train, f"lora{self.lora_rank}" if self.lora_rank else None) if x)
        return (
            f"{self.objective}{extra} {self.method} 8->{self.num_key_value_heads} {self.budget_fraction:.2%} "
            f"rows{self.rows} rate{self.rate:g} seed{self.seed}"
        )


def rows_of(documents: list[str], tokenizer, length: int):
    return packed_rows(Dataset.from_dict({"text": documents}), tokenizer, length)


class Bench:
    def __init__(self, donor: Donor, data: Path):
        self.donor, self.folder = donor, data / "donors" / donor.folder
        self.opened = open_donor(self.folder)
        tokenizer = AutoTokenizer.from_pretrained(self.folder)
        train, held_out = (rows_of(texts, tokenizer, donor.sequence_length) for texts in donor.text(data))
        every = max(1, len(held_out) * donor.sequence_length // HELD_OUT_TOKENS)
        self.train, self.held_out = train, held_out.select(range(0, len(held_out), every))
        self.corpus_tokens = len(train) * donor.sequence_length

    def student(self, cell: Cell):
        model = self.opened.model_class.from_pretrained(self.folder, dtype=torch.float32)
        return convert(
            model,
            num_key_value_heads=cell.num_key_value_heads,
            method=cell.method,
            seed=cell.seed,
            calibration=self.calibration if cell.method == BEST else None,
        )

    @cached_property
    def calibration(self) -> torch.Tensor:
        """Rows from all over the training text."""
        count = CALIBRATION_TOKENS // self.donor.sequence_length
        picked = torch.linspace(0, len(self.train) - 1, count).long().tolist()
        return torch.from_numpy(np.stack([self.train[row]["input_ids"] for row in picked]))

    def trainer(self, cell: Cell) -> UptrainTrainer:
        budget = max(self.donor.sequence_length, round(cell.budget_fraction * self.donor.budget_unit))
        set_seed(cell.seed)
        model = self.student(cell)
        phases = OBJECTIVES.get(cell.objective)
        if cell.train is not None:
            forced = [phase.objective.teacher_forced for phase in phases]
            train = ["attention" if is_forced else cell.train for is_forced in forced]
            phases = tuple(replace(phase, train=name) for phase, name in zip(phases, train, strict=True))
        if cell.lora_rank is not None:
            model = add_lora(model, cell.lora_rank, cell.seed)
        arguments = TrainingArguments(
            output_dir=tempfile.mkdtemp(),
            per_device_train_batch_size=cell.rows,
            per_device_eval_batch_size=8,
            num_train_epochs=1,
            learning_rate=cell.rate,
            adam_beta2=0.95,
            bf16=True,
            use_cpu=True,
            seed=cell.seed,
            logging_steps=50,
            save_strategy="no",
            eval_strategy="no",
            report_to="none",
            disable_tqdm=True,
            remove_unused_columns=False,
            **(
                {"train_sampling_strategy": "sequential"}
                if hasattr(TrainingArguments, "train_sampling_strategy")
                else {}
            ),
        )
        trainer = UptrainTrainer(
            model=model,
            args=arguments,
            train_dataset=BudgetedRows(self.train, budget, cell.seed),
            eval_dataset=self.held_out,
            data_collator=PackedCollator(),
            uptrain=UptrainCallback(budget_tokens=budget, phases=phases, ends_with_data=True),
            teacher=self.opened,
        )
        trainer.remove_callback(PrinterCallback)
        return trainer

    def run(self, cell: Cell) -> dict:
        trainer = self.trainer(cell)
        before = trainer.evaluate()
        begun = time.perf_counter()
        trainer.train()
        seconds = time.perf_counter() - begun
        after = trainer.evaluate()
        memory = trainer.teacher_memory()
        gap, left = (found["eval_loss"] - found["eval_teacher_loss"] for found in (before, after))
        return {
            "cell": cell.name,
            **{key: getattr(cell, key) for key in Cell.__dataclass_fields__},
            "tokens": trainer.uptrain.budget_tokens,
            "donor_loss": after["eval_teacher_loss"],
            "before": {"loss": before["eval_loss"], "kl": before["eval_kl_nats_per_token"]},
            "after": {
                "loss": after["eval_loss"],
                "kl": after["eval_kl_nats_per_token"],
                "top1_agreement": after["eval_top1_agreement_fraction"],
            },
            "gap_closed_fraction": 1 - left / gap,
            "seconds": seconds,
            "tokens_per_second": trainer.uptrain.budget_tokens / seconds,
            "teacher_own_bytes": memory.own_bytes,
            "teacher_shared_bytes": memory.shared_bytes,
        }


def kinds(base_rate: float) -> dict[str, dict]:
    """What is compared, each with the step size and learning rate that served it best at 0.5% on prose-mha."""
    return {
        "distill": {"objective": "distill", "rows": 1, "rate": base_rate},
        "distill all": {"objective": "distill", "train": "all", "rows": 1, "rate": base_rate},
        "kl": {"objective": "kl", "rows": 2, "rate": base_rate},
        "text": {"objective": "cross_entropy", "train": "attention", "rows": 2, "rate": 2 * base_rate},
        "text all": {"objective": "cross_entropy", "rows": 2, "rate": base_rate / 2},
    }


def grid(name: str) -> list[Cell]:
    """In order of what is wanted first; the whole takes hours on two cores."""
    kind = kinds(1e-3 if name == "prose" else 4e-3)
    both, rivals = ("distill", "text"), ("distill all", "kl", "text all")

    def cells(shares, heads, seeds, names, **more) -> list[Cell]:
        return [
            Cell(budget_fraction=share, num_key_value_heads=count, seed=seed, **(kind[one] | more))
            for seed in seeds
            for share in shares
            for count in heads
            for one in names
        ]

    lora = {"train": "attention", "lora_rank": 16}
    return [
        *cells((0.01, 0.025), (2,), (0,), both),
        *cells((0.001, 0.0025, 0.005), (2,), (0,), ("distill",)),
        *cells((0.01,), (2,), (0,), rivals),
        *cells((0.01,), (1, 4), (0,), both),
        *cells((0.01,), (2,), (1, 2), both),
        *cells((0.01,), (2,), (0,), both, method="first"),
        *cells((0.01,), (2,), (0,), both, method="random_init"),
        *cells((0.01,), (2,), (0,), ("kl",), train="attention"),
        *cells((0.01,), (2,), (0,), ("kl",), **lora),
        *cells((0.025,), (1, 4), (0,), both),
        *cells((0.001, 0.0025, 0.005), (1, 4), (0,), ("distill",)),
        *cells((0.05,), (2,), (0,), both),
        *cells((0.025,), (2,), (1, 2), both),
        *cells((0.01,), (1, 4), (1, 2), both),
        *cells((0.025,), (2, 1, 4), (0,), rivals),
        *cells((0.05,), (1, 4), (0,), both),
        *cells((0.05,), (2,), (1, 2), both),
        *cells((0.001, 0.0025, 0.01, 0.05), (2,), (0,), ("distill",), method=BEST),
        *cells((0.01,), (2,), (0,), ("text",), method=BEST),
        *cells((0.01,), (4, 1), (0,), ("distill",), method=BEST),
        *cells((0.1,), (2, 1, 4), (0,), both),
        *cells((0.025, 0.05), (1, 4), (1, 2), both),
        *cells((0.1,), (2, 1, 4), (1, 2), both),
    ]


def plain_grid(name: str) -> list[Cell]:
    """Whether other step sizes and rates serve plain training better at 5%, with the one of the table first."""
    base = 1e-3 if name == "prose" else 4e-3
    tried = [("attention", 2, 2 * base), (None, 16, base), ("attention", 16, base), ("attention", 2, base / 2)]
    return [Cell("cross_entropy", 0.05, 2, 0, train=train, rows=rows, rate=rate) for train, rows, rate in tried]


def read(output: Path) -> list[dict]:
    return [json.loads(line) for line in output.read_text().splitlines()] if output.exists() else []


def table(results: list[dict]) -> str:
    """Means over seeds, one line for each kind of run."""
    groups: dict[tuple, list[dict]] = {}
    for found in results:
        key = (found["num_key_value_heads"], found["method"], kind_of(found), found["budget_fraction"])
        groups.setdefault(key, []).append(found)
    names = ["KV heads", "from", "objective", "tokens", "loss before", "loss after", "KL after", "gap closed"]
    names += ["quality kept", "same token", "seeds"]
    lines = [f"| {' | '.join(names)} |", "|---" * len(names) + "|"]
    for (heads, method, kind, share), found in sorted(groups.items(), key=lambda pair: pair[0]):
        mean = {
            name: statistics.fmean(pick(one) for one in found)
            for name, pick in {
                "before": lambda one: one["before"]["loss"],
                "after": lambda one: one["after"]["loss"],
                "kl": lambda one: one["after"]["kl"],
                "closed": lambda one: one["gap_closed_fraction"],
                "kept": lambda one: math.exp(one["donor_loss"] - one["after"]["loss"]),
                "same": lambda one: one["after"]["top1_agreement"],
            }.items()
        }
        losses = [one["after"]["loss"] for one in found]
        spread = f" ± {statistics.stdev(losses):.3f}" if len(losses) > 1 else ""
        lines.append(
            f"| {heads} | {method} | {kind} | {found[0]['tokens']:,} ({share:.2%}) | {mean['before']:.3f} | "
            f"{mean['after']:.3f}{spread} | {mean['kl']:.3f} | {mean['closed']:.1%} | {mean['kept']:.1%} | {mean['same']:.1%} | {len(found)} |"
        )
    return "\n".join(lines)


def kind_of(found: dict) -> str:
    extra = [found["train"]] if found["train"] else []
    extra += [f"LoRA rank {found['lora_rank']}"] if found["lora_rank"] else []
    return found["objective"] + (f" ({', '.join(extra)})" if extra else "")


def plot(results: list[dict], path: Path) -> None:
    """Mean loss over tokens, a panel for each number of KV heads, every run a black dot."""
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure
    from matplotlib.ticker import EngFormatter, LogLocator, NullLocator

    pooled = [found for found in results if found["method"] == "mean_pool"]
    heads = sorted({found["num_key_value_heads"] for found in pooled}, reverse=True)
    colors = {kind: f"C{number}" for number, kind in enumerate(sorted({kind_of(found) for found in pooled}))}
    figure = Figure(figsize=(4 * len(heads), 4.6), layout="constrained")
    FigureCanvasSVG(figure)
    lines = {}
    for axes, count in zip(
        figure.subplots(1, len(heads), sharex=True, sharey=True, squeeze=False)[0], heads, strict=True
    ):
        here = [found for found in pooled if found["num_key_value_heads"] == count]
        for kind in sorted({kind_of(found) for found in here}):
            points: dict[int, list[float]] = {}
            for found in here:
                if kind_of(found) == kind:
                    points.setdefault(found["tokens"], []).append(found["after"]["loss"])
            x = sorted(points)
            means = [statistics.fmean(points[tokens]) for tokens in x]
            (lines[kind],) = axes.plot(x, means, marker="o", color=colors[kind])
            axes.scatter(
                [t for t in x for _ in points[t]], [loss for t in x for loss in points[t]], s=5, color="black", zorder=3
            )
        lines["donor"] = axes.axhline(here[0]["donor_loss"], linestyle="--", color="black")
        axes.set_xscale("log")
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 3)))
        axes.xaxis.set_minor_locator(NullLocator())
        axes.xaxis.set_major_formatter(EngFormatter(sep=""))
        axes.set_title(f"8 -> {count} KV heads (loss {here[0]['before']['loss']:.2f} before)")
        axes.set_xlabel("tokens of uptraining")
        axes.grid(alpha=0.3)
    figure.axes[0].set_ylabel("held-out loss, nats per token")
    figure.legend(lines.values(), lines.keys(), loc="outside lower center", ncols=4)
    figure.savefig(path)


def machine() -> dict:
    import transformers

    return {
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
        "device": "cpu",
        "threads": torch.get_num_threads(),
        "compute": "bfloat16 autocast, float32 weights",
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("data", type=Path)
    parser.add_argument("--donor", choices=DONORS, default="prose")
    parser.add_argument("--output", type=Path)
    parser.add_argument("--only", default="", help="run only cells whose name holds this")
    parser.add_argument("--part", default="0/1", help="i/n: every n-th cell, from the i-th")
    parser.add_argument("--plain", action="store_true", help="other step sizes and rates of plain training at 5%%")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--plot", type=Path)
    asked = parser.parse_args()
    output = asked.output or Path(__file__).parent / "results" / f"uptrain_{asked.donor}{'_plain' * asked.plain}.jsonl"
    if asked.plot is None:
        torch.set_num_threads(asked.threads)
        logging.set_verbosity_error()
        logging.disable_progress_bar()
        bench = Bench(DONORS[asked.donor], asked.data)
        part, parts = map(int, asked.part.split("/"))
        for cell in (plain_grid if asked.plain else grid)(asked.donor)[part::parts]:
            if asked.only in cell.name and cell.name not in {found["cell"] for found in read(output)}:
                found = bench.run(cell) | machine()
                with output.open("a") as file:
                    file.write(json.dumps(found) + "\n")
                print(
                    f"{cell.name}: {found['after']['loss']:.3f}, {found['seconds']:.0f} s", file=sys.stderr, flush=True
                )
    else:
        plot(read(output), asked.plot)
    if asked.plain:
        print("\n".join(f"{found['cell']}: {found['after']['loss']:.3f}" for found in read(output)))
    else:
        print(table(read(output)))


if __name__ == "__main__":
    main()
