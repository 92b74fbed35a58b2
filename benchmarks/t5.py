"""The GQA paper's own setting in small: a T5 of ours to fewer KV heads in decoder self-attention and cross-attention, uptrained, compared.

Run: `python benchmarks/t5_donor.py SCITLDR DONOR`, then `python benchmarks/t5.py SCITLDR DONOR [--output FILE.json]`. The donor's training is
the pre-training; uptraining goes on with it, on examples that the donor never saw, for 5% and 10% of its steps. Cells that the output
already holds are skipped. Needs `rouge_score` for ROUGE.

Source: GQA (Ainslie et al. 2023, arXiv 2305.13245), table 1 and figures 5 and 6.
"""

import argparse
import json
import platform
import random
import statistics
import tempfile
import time
from pathlib import Path

import torch
import transformers
from rouge_score.rouge_scorer import RougeScorer
from t5_data import Corpus, TrainingPairs
from t5_donor import BATCH_SIZE, InOrder, arguments
from transformers import DataCollatorForSeq2Seq, PrinterCallback, T5ForConditionalGeneration, set_seed

from hf_gqa import convert


HEADS, FRACTIONS, SEED = (8, 4, 2, 1), (0.0, 0.05, 0.1), 1
HELD_OUT, GENERATED = 128, 48  # pairs of each task
TIMED_BATCH, TIMED_TOKENS, ROUNDS = 32, 32, 5


class Bench:
    def __init__(self, scitldr: Path, donor: Path):
        self.corpus, self.folder = Corpus(scitldr), donor
        self.record = json.loads((donor / "training.json").read_text(encoding="utf-8"))
        self.collate = DataCollatorForSeq2Seq(self.corpus.tokenizer)
        draw = random.Random(0)
        self.held_out = {task: draw.sample(self.corpus.pairs("dev", task), HELD_OUT) for task in ("restore", "tldr")}

    def student(self, heads: int):
        donor = T5ForConditionalGeneration.from_pretrained(self.folder)
        return convert(donor, num_key_value_heads=heads)

    def uptrained(self, heads: int, fraction: float):
        """The student after its steps; a donor with all its heads goes on training for as long, to compare fairly."""
        set_seed(SEED)
        student, steps = self.student(heads), round(fraction * self.record["steps"])
        if steps:
            with tempfile.TemporaryDirectory() as scratch:
                trainer = InOrder(
                    model=student,
                    args=arguments(Path(scratch), steps, SEED, warmup_steps=0, save_strategy="no"),
                    train_dataset=TrainingPairs(
                        self.corpus, steps * BATCH_SIZE, BATCH_SIZE, self.record["seed"] + SEED
                    ),
                    data_collator=self.collate,
                )
                trainer.remove_callback(PrinterCallback)
                trainer.train()
        return student.eval(), steps

    @torch.no_grad()
    def loss(self, model, task: str) -> float:
        """Nats per target token, of pairs that nobody was trained on."""
        nats = tokens = 0
        pairs = [self.corpus.encoded(pair) for pair in self.held_out[task]]
        for start in range(0, len(pairs), 32):
            batch = self.collate(pairs[start : start + 32])
            count = int((batch["labels"] != -100).sum())
            nats, tokens = nats + model(**batch).loss.item() * count, tokens + count
        return nats / tokens

    @torch.no_grad()
    def rouge(self, model, task: str) -> dict[str, float]:
        """Mean F1 of greedy outputs, in percent."""
        scorer, found = RougeScorer(["rouge1", "rougeL"]), []
        pairs = self.held_out[task][:GENERATED]
        for start in range(0, len(pairs), 32):
            some = pairs[start : start + 32]
            batch = self.collate([self.corpus.encoded(pair) for pair in some])
            written = model.generate(batch["input_ids"], attention_mask=batch["attention_mask"], max_new_tokens=48)
            texts = self.corpus.tokenizer.batch_decode(written, skip_special_tokens=True)
            found += [scorer.score(target, text) for (_, target), text in zip(some, texts, strict=True)]
        return {name: 100 * statistics.mean(score[name].fmeasure for score in found) for name in ("rouge1", "rougeL")}

    def row(self, heads: int, fraction: float) -> dict:
        model, steps = self.uptrained(heads, fraction)
        found = {"num_key_value_heads": heads, "uptrained_fraction": fraction, "steps": steps}
        for task in self.held_out:
            found[f"{task}_loss_nats_per_token"] = self.loss(model, task)
            found |= {f"{task}_{name}": value for name, value in self.rouge(model, task).items()}
        return found

    @torch.no_grad()
    def decode_seconds(self) -> dict[int, float]:
        """Of one core's time per sample, for each number of KV heads: medians of rounds in which all take turns."""
        torch.manual_seed(0)
        tokens = torch.randint(4, 1000, (TIMED_BATCH, 512))
        wanted = {"max_new_tokens": TIMED_TOKENS, "min_new_tokens": TIMED_TOKENS, "do_sample": False}
        models, seconds = {heads: self.student(heads).eval() for heads in HEADS}, {heads: [] for heads in HEADS}
        for model in models.values():
            model.set_attn_implementation("grouped_sdpa")
            model.generate(tokens, **(wanted | {"max_new_tokens": 2, "min_new_tokens": 2}))
        for _ in range(ROUNDS):
            for heads, model in models.items():
                started = time.process_time()
                model.generate(tokens, **wanted)
                seconds[heads].append((time.process_time() - started) / TIMED_BATCH)
        return {heads: statistics.median(found) for heads, found in seconds.items()}


def settings(bench: Bench) -> dict:
    return {
        "device": f"CPU, {platform.machine()}, {torch.get_num_threads()} thread",
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "donor": bench.record,
        "seed": SEED,
        "held_out_pairs": HELD_OUT,
        "rouge_pairs": GENERATED,
        "timed": {"batch": TIMED_BATCH, "tokens_read": 512, "tokens_written": TIMED_TOKENS, "rounds": ROUNDS},
    }


def markdown(result: dict) -> str:
    lines = [
        "| KV heads | uptrained | steps | restore loss | restore ROUGE-L | tldr loss | tldr ROUGE-1 | tldr ROUGE-L |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in result["rows"]:
        lines.append(
            f"| {row['num_key_value_heads']} | {row['uptrained_fraction']:.0%} | {row['steps']} | "
            f"{row['restore_loss_nats_per_token']:.3f} | {row['restore_rougeL']:.1f} | {row['tldr_loss_nats_per_token']:.3f} | "
            f"{row['tldr_rouge1']:.1f} | {row['tldr_rougeL']:.1f} |"
        )
    if "decode_seconds_per_sample" in result:
        lines += ["", "| KV heads | decode ms/sample |", "|---|---|"]
        timed = result["decode_seconds_per_sample"].items()
        lines += [f"| {heads} | {1000 * seconds:.1f} |" for heads, seconds in timed]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("scitldr", type=Path)
    parser.add_argument("donor", type=Path)
    parser.add_argument("--output", type=Path, default=Path("t5.json"))
    asked = parser.parse_args()
    torch.set_num_threads(1)
    bench = Bench(asked.scitldr, asked.donor)
    result = (
        json.loads(asked.output.read_text()) if asked.output.exists() else {"settings": settings(bench), "rows": []}
    )
    done = {(row["num_key_value_heads"], row["uptrained_fraction"]) for row in result["rows"]}
    for fraction in FRACTIONS:
        for heads in HEADS:
            if (heads, fraction) not in done:
                result["rows"].append(bench.row(heads, fraction))
                asked.output.write_text(json.dumps(result, indent=2) + "\n")
                print(result["rows"][-1], flush=True)
    if "decode_seconds_per_sample" not in result:
        result["decode_seconds_per_sample"] = bench.decode_seconds()
        asked.output.write_text(json.dumps(result, indent=2) + "\n")
    print(markdown(result))


if __name__ == "__main__":
    main()
