"""Uptrain with the plain Trainer: the callback brings the budget, the safety and the export; the loss is Trainer's own.

Run: `python examples/uptrain_trainer.py [OUTPUT]`. Offline, a minute on a CPU. The donor writes the little text it needs.
"""

import sys
import tempfile
from pathlib import Path

from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainingArguments

from hf_gqa import convert
from hf_gqa.uptrain import PackedCollator, UptrainCallback, sampled_rows


DONOR = Path(__file__).parent / "donor"
BUDGET_TOKENS, SEQUENCE_LENGTH, ROWS = 16_384, 128, 8


def main(output: str) -> None:
    donor = AutoModelForCausalLM.from_pretrained(DONOR, dtype="float32")
    tokenizer = AutoTokenizer.from_pretrained(DONOR)
    student = convert(donor, num_key_value_heads=2)
    with tempfile.TemporaryDirectory() as work:
        rows = sampled_rows(
            donor,
            tokenizer,
            Path(work) / "text",
            donor_id="demo",
            tokens=20_480,
            sequence_length=SEQUENCE_LENGTH,
            seed=0,
        )
        trainer = Trainer(
            model=student,
            args=TrainingArguments(
                output_dir=f"{work}/run",
                per_device_train_batch_size=ROWS,
                learning_rate=1e-3,
                logging_steps=4,
                eval_strategy="steps",
                eval_steps=8,
                save_strategy="no",
                remove_unused_columns=False,
                use_cpu=True,
                report_to="none",
            ),
            train_dataset=rows.select(range(128)),
            eval_dataset=rows.select(range(128, 160)),
            data_collator=PackedCollator(),
            processing_class=tokenizer,
            callbacks=[
                UptrainCallback(
                    budget_tokens=BUDGET_TOKENS, tokens_per_step=ROWS * SEQUENCE_LENGTH, export_dir=output, source=DONOR
                )
            ],
        )
        before = trainer.evaluate()["eval_loss"]
        trainer.train()
        after = trainer.evaluate()["eval_loss"]
    print(
        f"held-out loss: {before:.3f} -> {after:.3f} after {BUDGET_TOKENS:,} tokens of plain training; student in {output}"
    )


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else "students/uptrained-plain")
