"""Quality against the fraction of layers that share: which layers to choose, and what uptraining leaves of the damage.

Run: `python benchmarks/sharing.py DATA --donor prose|gptstories [--output FILE] [--only SUBSTRING]`, where DATA holds `corpora` and `donors`
as benchmarks/uptrain.py reads them. Layers are chosen on training text (how alike attention is, what each pair costs), and every set of
borrowers that there is is measured on held-out text, so that each choice is seen beside the best one. Then students of some choices are uptrained, as in
benchmarks/uptrain.py. Cells that the output already holds are skipped. `--plot FILE.svg` draws what the output holds.
"""

import argparse
import json
import statistics
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache, cached_property
from itertools import combinations
from pathlib import Path

import numpy as np
import torch
from transformers import AutoTokenizer
from transformers.utils import logging
from uptrain import DONORS, Bench, Cell, machine, read, rows_of

from hf_gqa import convert
from hf_gqa.analyze.borrowing import BORROWED, Sharing, measure_sharings
from hf_gqa.analyze.echoatt import block_borrowers, kept_layers, ranked_borrowers
from hf_gqa.analyze.similarity import attention_similarity
from hf_gqa.analyze.solver import cheapest_choices, cheapest_sets, choose, greedy_choices, nearest_owners
from hf_gqa.convert.donor import donor_from_model


SAMPLE_TOKENS, SAMPLES = 512, 32
CHOOSE_TOKENS = MEASURE_TOKENS = 8_192
GROUPED = "group,fold,refit"
CANDIDATES = 8
CHOOSERS = ("kl", "echoatt")


@dataclass(frozen=True)
class SharingCell(Cell):
    """One uptraining of a student whose `shared_layers` borrow from the nearest earlier owner."""

    pattern: str = "echo"
    shared_layers: tuple[int, ...] = ()

    @property
    def name(self) -> str:
        layers = ",".join(map(str, self.shared_layers)) or "none"
        return f"{self.pattern} {layers} heads{self.num_key_value_heads} {self.budget_fraction:.2%} seed{self.seed}"


class SharingBench(Bench):
    def __init__(self, name: str, data: Path, output: Path):
        super().__init__(DONORS[name], data)
        self.output, self.tokenizer = output, AutoTokenizer.from_pretrained(self.folder)
        self.documents, self.held_out_documents = self.donor.text(data)
        self.rate = 1e-3 if name == "prose" else 4e-3

    @cached_property
    def model(self):
        return self.opened.model_class.from_pretrained(self.folder, dtype=torch.float32).eval()

    @property
    def layers(self) -> int:
        return self.model.config.num_hidden_layers

    @cache  # noqa: B019
    def tokens(self, documents: str, length: int, wanted: int) -> torch.Tensor:
        """Rows from all over the text."""
        rows = rows_of(getattr(self, documents), self.tokenizer, length)
        picked = np.linspace(0, len(rows) - 1, wanted // length).astype(int)
        return torch.from_numpy(np.stack([rows[int(row)]["input_ids"] for row in picked])).long()

    @cache  # noqa: B019
    def with_heads(self, heads: int):
        """The donor, or a student of it with fewer KV heads, for layers to share on top."""
        if heads == self.model.config.num_attention_heads:
            return self.model
        return convert(self.model, num_key_value_heads=heads, method=GROUPED, calibration=self.calibration)

    def student(self, cell: SharingCell):
        base = self.with_heads(cell.num_key_value_heads)
        if not cell.shared_layers:
            return convert(base, num_key_value_heads=cell.num_key_value_heads)
        return convert(base, sharing=cell.pattern, shared_layers=cell.shared_layers)

    def once(self, name: str, measure) -> dict:
        """What the output holds of this name, or else what `measure` finds, which is added to it."""
        for found in read(self.output):
            if found["cell"] == name:
                return found
        found = {"cell": name, **measure(), **machine()}
        with self.output.open("a") as file:
            file.write(json.dumps(found) + "\n")
        print(name, file=sys.stderr, flush=True)
        return found

    def similarity(self) -> dict:
        tokens = self.tokens("documents", SAMPLE_TOKENS, SAMPLES * SAMPLE_TOKENS)
        found = attention_similarity(self.model, donor_from_model(self.model).layout, tokens)
        return {
            "similarity": found.tolist(),
            "kept": kept_layers(found.numpy()),
            "blocks_of_2": block_borrowers(found.numpy(), 2),
            "ranked": ranked_borrowers(found.numpy(), list(range(1, self.layers))),
            "samples": len(tokens),
        }

    def measured(self, pattern: str, sets: list[dict[int, int]], documents: str, wanted: int) -> list[dict]:
        tokens = self.tokens(documents, self.donor.sequence_length, wanted)
        sharings = [Sharing(pattern=pattern, owners=owners) for owners in sets]
        found = measure_sharings(self.model, donor_from_model(self.model).layout, tokens, sharings, 8)
        return [
            {"owners": list(map(list, owners.items())), "loss": s.loss, "kl": s.kl, "top1_agreement": s.top1_agreement}
            for owners, s in zip(sets, found, strict=True)
        ]

    def pairs(self, pattern: str) -> dict:
        """Each pair of layers alone, on training text."""
        sets = [{borrower: owner} for borrower in range(1, self.layers) for owner in range(borrower)]
        return {"pairs": self.measured(pattern, sets, "documents", CHOOSE_TOKENS)}

    def shortlists(self, pattern: str) -> dict:
        """Sets with small sums of pair costs, measured whole on training text."""
        costs = pair_costs(read(self.output), pattern)
        sets = [
            choice.owners
            for number in range(1, self.layers)
            for choice in cheapest_sets(["layer"] * self.layers, costs, [1] * self.layers, number, CANDIDATES)
        ]
        return {"shortlists": self.measured(pattern, sets, "documents", CHOOSE_TOKENS // 2)}

    def subsets(self, pattern: str) -> dict:
        """Every set of borrowers, on held-out text; the empty one is the donor."""
        sets = [
            nearest_owners(borrowers, ["layer"] * self.layers)
            for number in range(self.layers)
            for borrowers in combinations(range(1, self.layers), number)
        ]
        return {"subsets": self.measured(pattern, sets, "held_out_documents", MEASURE_TOKENS)}

    def analysis(self) -> None:
        self.once("similarity", self.similarity)
        for pattern in BORROWED:
            self.once(f"pairs {pattern}", lambda pattern=pattern: self.pairs(pattern))
            self.once(f"shortlists {pattern}", lambda pattern=pattern: self.shortlists(pattern))
            self.once(f"subsets {pattern}", lambda pattern=pattern: self.subsets(pattern))

    def uptrained(self, cell: SharingCell) -> dict:
        shared = {"pattern": cell.pattern, "shared_layers": list(cell.shared_layers)}
        return self.run(cell) | shared | {"shared_fraction": len(cell.shared_layers) / self.layers}


def pair_costs(results: list[dict], pattern: str) -> dict[tuple[int, int], float]:
    pairs = next(found["pairs"] for found in results if found["cell"] == f"pairs {pattern}")
    return {tuple(pair["owners"][0]): pair["kl"] for pair in pairs}


def chosen(results: list[dict], pattern: str) -> dict[str, dict[int, tuple[int, ...]]]:
    """By chooser and number of borrowers, the borrowers.

    "sum" has the smallest sum of pair costs, "kl" is the best of the `CANDIDATES` with the smallest, measured whole; "best" is what
    the held-out text itself would choose.
    """
    found = {one["cell"]: one for one in results}
    layers = len(found["similarity"]["similarity"])
    kinds, saved = ["layer"] * layers, [1] * layers
    costs = pair_costs(results, pattern)
    exact, greedy = cheapest_choices(kinds, costs, saved), greedy_choices(kinds, costs, saved)
    measured = {borrowers_of(one): one["kl"] for one in found[f"subsets {pattern}"]["subsets"]}
    listed = {borrowers_of(one): one["kl"] for one in found[f"shortlists {pattern}"]["shortlists"]}
    numbers = range(1, layers)
    return {
        "sum": {number: tuple(choose(exact, number).borrowers) for number in numbers},
        "kl": {n: min((s for s in listed if len(s) == n), key=listed.get) for n in numbers},
        "greedy": {number: tuple(greedy[number].borrowers) for number in numbers},
        "echoatt": {number: tuple(sorted(found["similarity"]["ranked"][:number])) for number in numbers},
        "best": {n: min((s for s in measured if len(s) == n), key=measured.get) for n in numbers},
        "worst": {n: max((s for s in measured if len(s) == n), key=measured.get) for n in numbers},
    }


def borrowers_of(found: dict) -> tuple[int, ...]:
    return tuple(sorted(borrower for borrower, _ in found["owners"]))


def grid(bench: SharingBench) -> Iterator[SharingCell]:
    """In order of what is wanted first."""
    results, layers = read(bench.output), bench.layers
    picked = {pattern: chosen(results, pattern) for pattern in BORROWED}
    middle = (layers // 2, layers - 2)
    others = [number for number in range(1, layers) if number not in middle]

    def cells(numbers, shares, seeds=(0,), heads=(8,), choosers=CHOOSERS) -> Iterator[SharingCell]:
        for seed in seeds:
            for share in shares:
                for count in heads:
                    for number in numbers:
                        for pattern in BORROWED:
                            for chooser in choosers:
                                yield SharingCell(
                                    objective="distill",
                                    budget_fraction=share,
                                    num_key_value_heads=count,
                                    seed=seed,
                                    method=GROUPED,
                                    rows=1,
                                    rate=bench.rate,
                                    pattern=pattern,
                                    shared_layers=picked[pattern][chooser][number],
                                )

    yield from cells(middle, (0.01,))
    yield from cells(others, (0.01,), choosers=("kl",))
    yield from cells(middle, (0.01,), heads=(2,), choosers=("kl",))
    yield from cells(others, (0.01,), choosers=("echoatt",))
    yield from cells(middle, (0.01,), seeds=(1, 2))
    yield from cells(middle, (0.05,), choosers=("kl",))
    yield from cells(others, (0.01,), heads=(2,), choosers=("kl",))
    yield from cells(middle, (0.05,), choosers=("echoatt",))


def choice_table(results: list[dict], pattern: str) -> str:
    """Held-out text, no training: KL to the donor of each chooser's set, and where it stands among all of its size."""
    found = {one["cell"]: one for one in results}
    measured = {borrowers_of(one): one for one in found[f"subsets {pattern}"]["subsets"]}
    layers = len(found["similarity"]["similarity"])
    lines = [
        f"| {pattern}: layers that borrow | chooser | which | loss | KL | top-1 | place |",
        "|---|---|---|---|---|---|---|",
    ]
    for number in range(1, layers):
        of_size = sorted((s for s in measured if len(s) == number), key=lambda s: measured[s]["kl"])
        for chooser in ("best", "kl", "sum", "greedy", "echoatt", "worst"):
            layers_chosen = chosen(results, pattern)[chooser][number]
            one = measured[layers_chosen]
            lines.append(
                f"| {number} of {layers} ({number / layers:.0%}) | {chooser} | {', '.join(map(str, layers_chosen))} | "
                f"{one['loss']:.3f} | {one['kl']:.4f} | {one['top1_agreement']:.1%} | "
                f"{of_size.index(layers_chosen) + 1} of {len(of_size)} |"
            )
    return "\n".join(lines)


def uptrained_table(results: list[dict]) -> str:
    """Means over seeds."""
    groups: dict[tuple, list[dict]] = {}
    for one in results:
        if "after" in one:
            key = one["budget_fraction"], one["num_key_value_heads"], one["pattern"], tuple(one["shared_layers"])
            groups.setdefault(key, []).append(one)
    lines = [
        "| tokens | KV heads | pattern | layers that borrow | chooser | loss before | KL before | loss after | KL after | top-1 | seeds |"
    ]
    lines.append("|" + "---|" * 11)
    for (share, heads, pattern, layers), found in sorted(
        groups.items(), key=lambda pair: (pair[0][:3], len(pair[0][3]), pair[0][3])
    ):
        picked = chosen(results, pattern)
        names = [name for name in ("kl", "echoatt", "best") if picked[name][len(layers)] == layers]
        before = [statistics.fmean(one["before"][name] for one in found) for name in ("loss", "kl")]
        after = [statistics.fmean(one["after"][name] for one in found) for name in ("loss", "kl", "top1_agreement")]
        spread = f" ± {statistics.stdev(one['after']['loss'] for one in found):.3f}" if len(found) > 1 else ""
        lines.append(
            f"| {found[0]['tokens']:,} ({share:.0%}) | {heads} | {pattern} | {', '.join(map(str, layers))} | {', '.join(names)} | "
            f"{before[0]:.3f} | {before[1]:.3f} | {after[0]:.3f}{spread} | {after[1]:.3f} | {after[2]:.1%} | {len(found)} |"
        )
    return "\n".join(lines)


def plot(results: list[dict], path: Path) -> None:
    """KL over the fraction of layers that borrow, a panel for each pattern: before uptraining lines, after it markers."""
    from matplotlib import style
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    found = {one["cell"]: one for one in results}
    layers = len(found["similarity"]["similarity"])
    colors = {"kl": "C0", "echoatt": "C3", "best": "C2", "worst": "C7"}
    with style.context({"svg.hashsalt": "sharing", "svg.fonttype": "none"}):
        figure = Figure(figsize=(11, 4.8), layout="constrained")
        FigureCanvasSVG(figure)
        for axes, pattern in zip(figure.subplots(1, 2, sharey=True), BORROWED, strict=True):
            measured = {borrowers_of(one): one["kl"] for one in found[f"subsets {pattern}"]["subsets"]}
            picked = chosen(results, pattern)
            for name, color in colors.items():
                x = [100 * number / layers for number in picked[name]]
                y = [measured[borrowers] for borrowers in picked[name].values()]
                axes.plot(
                    x,
                    y,
                    marker=".",
                    color=color,
                    label=f"{name}, before uptraining",
                    linestyle="-" if name in CHOOSERS else ":",
                )
            trained = [one for one in results if "after" in one and one["pattern"] == pattern]
            for heads, share, name in sorted(
                {(o["num_key_value_heads"], o["budget_fraction"], n) for o in trained for n in CHOOSERS}
            ):
                here = [
                    one
                    for one in trained
                    if (one["num_key_value_heads"], one["budget_fraction"]) == (heads, share)
                    and tuple(one["shared_layers"]) == picked[name].get(len(one["shared_layers"]))
                ]
                if here:
                    axes.scatter(
                        [100 * one["shared_fraction"] for one in here],
                        [one["after"]["kl"] for one in here],
                        color=colors[name],
                        marker={(8, 0.01): "o", (8, 0.05): "s", (2, 0.01): "^"}.get((heads, share), "x"),
                        label=f"{name}, {share:.0%} uptrained" + (f", {heads} KV heads" if heads != 8 else ""),
                    )
            axes.set_yscale("log")
            axes.set_title(pattern)
            axes.set_xlabel("layers that borrow, %")
            axes.grid(alpha=0.3)
            axes.legend(fontsize=7)
        figure.axes[0].set_ylabel("KL to the donor on held-out text, nats per token")
        figure.savefig(path, metadata={"Date": None})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("data", type=Path)
    parser.add_argument("--donor", choices=DONORS, default="prose")
    parser.add_argument("--output", type=Path)
    parser.add_argument("--only", default="", help="uptrain only cells whose name holds this")
    parser.add_argument("--no-uptraining", action="store_true")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--table", action="store_true", help="run nothing")
    parser.add_argument("--plot", type=Path, help="run nothing")
    asked = parser.parse_args()
    output = asked.output or Path(__file__).parent / "results" / f"sharing_{asked.donor}.jsonl"
    if not asked.table and asked.plot is None:
        torch.set_num_threads(asked.threads)
        logging.set_verbosity_error()
        logging.disable_progress_bar()
        bench = SharingBench(asked.donor, asked.data, output)
        bench.analysis()
        for cell in () if asked.no_uptraining else grid(bench):
            if asked.only in cell.name:
                bench.once(cell.name, lambda cell=cell: bench.uptrained(cell))
    results = read(output)
    if asked.plot is not None:
        plot(results, asked.plot)
    print("\n\n".join([*(choice_table(results, pattern) for pattern in BORROWED), uptrained_table(results)]))


if __name__ == "__main__":
    main()
