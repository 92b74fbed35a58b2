"""Quality against the fraction of layers that share: which layers to choose, and what uptraining leaves of the damage.

Run: `python benchmarks/sharing.py DATA --donor prose|gptstories [--output FILE] [--only SUBSTRING ...]`, where DATA holds `corpora` and `donors`
as benchmarks/uptrain.py reads them. Layers are chosen on training text (how alike attention is, what each pair costs), and every set of
borrowers that there is is measured on held-out text, so that each choice is seen beside the best one. Then students are made of some choices, with all their
heads and with grouped ones, by every way to begin (own, mean, fit), and measured on the same held-out text; none of them was trained. Then some are uptrained, as in
benchmarks/uptrain.py. Cells that the output already holds are skipped. `--plot FILE.svg` draws what the output holds (benchmarks/sharing_tables.py).
"""

import argparse
import json
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache, cached_property
from itertools import combinations
from pathlib import Path

import numpy as np
import torch
from sharing_tables import all_tables, chosen, pair_costs, plot
from transformers import AutoTokenizer
from transformers.utils import logging
from uptrain import DONORS, Bench, Cell, machine, read, rows_of

from hf_gqa import convert
from hf_gqa.analyze.borrowing import BORROWED, Sharing, measure_sharings
from hf_gqa.analyze.echoatt import block_borrowers, kept_layers, ranked_borrowers
from hf_gqa.analyze.similarity import attention_similarity
from hf_gqa.analyze.solver import cheapest_sets, nearest_owners
from hf_gqa.convert.donor import donor_from_model
from hf_gqa.evaluate.quality.token_scores import compare


SAMPLE_TOKENS, SAMPLES = 512, 32
CHOOSE_TOKENS = MEASURE_TOKENS = 8_192
GROUPED = "group,fold,refit"
CANDIDATES = 8
INITS = {"echo": ("own", "fit"), "cross_layer_kv": ("own", "mean", "fit")}


@dataclass(frozen=True)
class SharingCell(Cell):
    """One uptraining of a student whose `shared_layers` borrow from the nearest earlier owner."""

    pattern: str = "echo"
    shared_layers: tuple[int, ...] = ()
    shared_init: str = "own"

    @property
    def name(self) -> str:
        return f"{self.way} {self.budget_fraction:.2%} seed{self.seed}"

    @property
    def way(self) -> str:
        """What is converted, without what is trained."""
        layers = ",".join(map(str, self.shared_layers)) or "none"
        begins = "" if self.shared_init == "own" else f" {self.shared_init}"
        return f"{self.pattern} {layers} heads{self.num_key_value_heads}{begins}"


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
        return convert(
            base,
            sharing=cell.pattern,
            shared_layers=cell.shared_layers,
            shared_init=cell.shared_init,
            calibration=self.calibration if cell.shared_init == "fit" else None,
        )

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

    @torch.inference_mode()
    def untrained(self, cell: SharingCell) -> dict:
        """A student as it is converted, on the text that `subsets` are measured on."""
        begun = time.perf_counter()
        student = self.student(cell).eval()
        seconds = time.perf_counter() - begun
        sums, tokens = np.zeros(4), self.tokens("held_out_documents", self.donor.sequence_length, MEASURE_TOKENS)
        for rows in tokens.split(8):
            logits = (model(rows, use_cache=False).logits[:, :-1].flatten(0, 1) for model in (self.model, student))
            sums += [values.sum() for values in compare(*logits, rows[:, 1:].flatten())]
        _, loss, kl, agrees = sums / tokens[:, 1:].numel()
        return self.said(cell) | {
            "untrained": {"loss": loss, "kl": kl, "top1_agreement": agrees},
            "conversion_seconds": seconds,
        }

    def uptrained(self, cell: SharingCell) -> dict:
        return self.run(cell) | self.said(cell)

    def said(self, cell: SharingCell) -> dict:
        return {
            "pattern": cell.pattern,
            "shared_layers": list(cell.shared_layers),
            "shared_fraction": len(cell.shared_layers) / self.layers,
            "shared_init": cell.shared_init,
            "num_key_value_heads": cell.num_key_value_heads,
        }


def grid(bench: SharingBench) -> Iterator[SharingCell]:
    """Of students that are uptrained, in order of what is wanted first."""
    picked = {pattern: chosen(read(bench.output), pattern) for pattern in BORROWED}
    quarter, half, most = (
        max(1, int(share * bench.layers)) for share in (0.25, 0.5, 0.8)
    )  # 1, 2, 4 of 5; 1, 3, 4 of 6

    def cells(numbers, shares=(0.01,), seeds=(0,), heads=(8,), chooser="kl", inits=("own", "fit")):
        for seed in seeds:
            for share in shares:
                for count in heads:
                    for number in numbers:
                        for pattern in BORROWED:
                            for init in inits:
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
                                    shared_init=init,
                                )

    yield from cells((half, most, quarter))
    yield from cells((half, most, quarter), heads=(2,))
    yield from cells((half, quarter), chooser="echoatt")
    yield from cells((half, most), seeds=(1, 2))
    yield from cells((half, most), shares=(0.05,))
    yield from cells((half, most), shares=(0.05,), heads=(2,), inits=("own",))
    yield from cells((half, quarter), shares=(0.05,), chooser="echoatt")
    yield from cells((half, quarter), chooser="echoatt", seeds=(1, 2), inits=("own",))
    yield from cells((half,), shares=(0.01, 0.05), chooser="every_2", inits=("own",))
    yield from cells((half,), seeds=(1, 2), chooser="every_2", inits=("own",))
    yield from cells(range(1, bench.layers))
    yield from cells(range(1, bench.layers), heads=(2,))


def untrained_grid(bench: SharingBench) -> Iterator[SharingCell]:
    """What KL chooses, with all heads and with two; each layer alone; what similarity chooses: every way to begin."""
    picked = {pattern: chosen(read(bench.output), pattern) for pattern in BORROWED}
    alone = [(layer,) for layer in range(1, bench.layers)]
    wanted = [
        *((8, pattern, layers) for pattern in BORROWED for layers in picked[pattern]["kl"].values()),
        (2, "echo", ()),
        *((2, pattern, layers) for pattern in BORROWED for layers in picked[pattern]["kl"].values()),
        *((8, pattern, layers) for pattern in BORROWED for layers in alone),
        *((8, pattern, layers) for pattern in BORROWED for layers in picked[pattern]["echoatt"].values()),
    ]
    for heads, pattern, layers in dict.fromkeys(wanted):
        for init in INITS[pattern] if layers else ("own",):
            yield SharingCell(
                objective="none",
                budget_fraction=0.0,
                num_key_value_heads=heads,
                seed=0,
                method=GROUPED,
                pattern=pattern,
                shared_layers=layers,
                shared_init=init,
            )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("data", type=Path)
    parser.add_argument("--donor", choices=DONORS, default="prose")
    parser.add_argument("--output", type=Path)
    parser.add_argument(
        "--only", nargs="+", default=[""], help="students whose cell's name holds the first, the second, ..."
    )
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
        for wanted in asked.only:
            for cell in untrained_grid(bench):
                if wanted in f"{cell.way} untrained":
                    bench.once(f"{cell.way} untrained", lambda cell=cell: bench.untrained(cell))
            for cell in () if asked.no_uptraining else grid(bench):
                if wanted in cell.name:
                    bench.once(cell.name, lambda cell=cell: bench.uptrained(cell))
    results = read(output)
    if asked.plot is not None:
        plot(results, asked.plot)
    print(all_tables(results))


if __name__ == "__main__":
    main()
