"""Uptrain adapters only: key and value projections in full, LoRA on attention's other two, everything else frozen.

Run: `python examples/uptrain_lora.py [OUTPUT]`. Offline, a minute on a CPU. The exported student is a plain checkpoint.
"""

import sys
import tempfile
from pathlib import Path

from peft import get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainingArguments

from hf_gqa import convert
from hf_gqa.uptrain import PackedCollator, UptrainCallback, UptrainTrainer, lora_config, sampled_rows


DONOR = Path(__file__).parent / "donor"
BUDGET_TOKENS, SEQUENCE_LENGTH = 16_384, 128


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
        trainer = UptrainTrainer(
            model=get_peft_model(student, lora_config(student, rank=8)),
            teacher=DONOR,
            uptrain=UptrainCallback(
                budget_tokens=BUDGET_TOKENS, tokens_per_step=2 * SEQUENCE_LENGTH, export_dir=output, source=DONOR
            ),
            args=TrainingArguments(
                output_dir=f"{work}/run",
                per_device_train_batch_size=2,
                learning_rate=1e-3,
                logging_steps=16,
                save_strategy="no",
                remove_unused_columns=False,
                use_cpu=True,
                report_to="none",
            ),
            train_dataset=rows.select(range(128)),
            eval_dataset=rows.select(range(128, 160)),
            data_collator=PackedCollator(),
            processing_class=tokenizer,
        )
        trainer.model.print_trainable_parameters()
        before = trainer.evaluate()
        trainer.train()
        after = trainer.evaluate()
    print(
        f"held-out loss: {before['eval_loss']:.3f} -> {after['eval_loss']:.3f}, donor {after['eval_teacher_loss']:.3f}"
    )
    print(f"gap closed: {after['eval_gap_closed_fraction']:.1%} after {BUDGET_TOKENS:,} tokens; student in {output}")


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else "students/uptrained-lora")
