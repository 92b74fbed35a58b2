"""Train the donor of the T5 benchmark: a T5 with as many KV heads as query heads, from scratch, with transformers alone.

Run: `python benchmarks/t5_donor.py SCITLDR OUTPUT [--steps N] [--heads KV]`, where SCITLDR holds the jsonl files of SciTLDR-A.
"""

import argparse
import json
import time
from pathlib import Path

import torch
from t5_data import Corpus, TrainingPairs
from torch.utils.data import SequentialSampler
from transformers import (
    DataCollatorForSeq2Seq,
    Seq2SeqTrainer,
    Seq2SeqTrainingArguments,
    T5Config,
    T5ForConditionalGeneration,
    set_seed,
)


BATCH_SIZE, LEARNING_RATE, WARMUP_STEPS, STEPS, SEED = 16, 2e-3, 100, 2000, 0


class InOrder(Seq2SeqTrainer):
    """Takes the examples as they come: they are drawn at random already, and batches are of one task."""

    def _get_train_sampler(self, *args):
        return SequentialSampler(self.train_dataset)


def arguments(folder: Path, steps: int, seed: int, **changes) -> Seq2SeqTrainingArguments:
    """A constant rate after a warm-up, so that uptraining goes on as the donor's own training would."""
    wanted = {
        "max_steps": steps,
        "per_device_train_batch_size": BATCH_SIZE,
        "learning_rate": LEARNING_RATE,
        "lr_scheduler_type": "constant_with_warmup",
        "warmup_steps": WARMUP_STEPS,
        "logging_steps": 50,
        "save_steps": 250,
        "save_total_limit": 2,
        "report_to": [],
        "use_cpu": True,
        "seed": seed,
        "disable_tqdm": True,
    }
    return Seq2SeqTrainingArguments(output_dir=str(folder), **(wanted | changes))


def tiny_t5(corpus: Corpus) -> T5ForConditionalGeneration:
    tokenizer = corpus.tokenizer
    config = T5Config(
        vocab_size=len(tokenizer),
        d_model=64,
        d_kv=8,
        d_ff=128,
        num_layers=2,
        num_heads=8,
        feed_forward_proj="gated-gelu",
        dropout_rate=0.0,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        decoder_start_token_id=tokenizer.pad_token_id,
    )
    return T5ForConditionalGeneration(config)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("scitldr", type=Path)
    parser.add_argument("output", type=Path)
    parser.add_argument("--steps", type=int, default=STEPS)
    asked = parser.parse_args()
    torch.set_num_threads(1)
    set_seed(SEED)
    corpus = Corpus(asked.scitldr)
    model = tiny_t5(corpus)
    trainer = InOrder(
        model=model,
        args=arguments(asked.output / "checkpoints", asked.steps, SEED),
        train_dataset=TrainingPairs(corpus, asked.steps * BATCH_SIZE, BATCH_SIZE, SEED),
        data_collator=DataCollatorForSeq2Seq(corpus.tokenizer),
    )
    started = time.time()
    trainer.train(resume_from_checkpoint=any((asked.output / "checkpoints").glob("checkpoint-*")))
    model.save_pretrained(asked.output)
    corpus.tokenizer.save_pretrained(asked.output)
    record = {"steps": asked.steps, "batch_size": BATCH_SIZE, "seed": SEED, "seconds": round(time.time() - started)}
    (asked.output / "training.json").write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
