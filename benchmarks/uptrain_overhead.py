"""Time of a training step, and memory of the teacher, by objective: what distilling costs beside plain training.

Run: `python benchmarks/uptrain_overhead.py [--rounds 5] [--output FILE]`. The embedded donor, 8 -> 2 KV heads, random tokens (timing does
not depend on them). Each way trains a few steps in turn, round after round; medians over all steps. Processor seconds are what the
process used, so other work on the machine counts less than in seconds of the clock.
"""

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, PrinterCallback, Trainer, TrainerCallback, TrainingArguments
from transformers.utils import logging
from uptrain import machine

from hf_gqa import convert
from hf_gqa.uptrain import Objective, PackedCollator, Phase, UptrainCallback, UptrainTrainer
from hf_gqa.uptrain.teacher import teacher_memory


DONOR = Path(__file__).parents[1] / "examples" / "donor"
STEPS = 8
SECOND_MODEL = "a second model"
WAYS = {
    "plain Trainer, all parameters": None,
    "cross-entropy, all parameters": ("cross_entropy", "all", None),
    "cross-entropy, attention": ("cross_entropy", "attention", None),
    "KL, all parameters, second model": ("kl", "all", SECOND_MODEL),
    "KL, attention, second model": ("kl", "attention", SECOND_MODEL),
    "KL, attention, shared teacher": ("kl", "attention", DONOR),
    "distill (attention matching), shared teacher": ("match", "attention", DONOR),
}
OBJECTIVES = {
    "cross_entropy": Objective(cross_entropy=1.0),
    "kl": Objective(kl=1.0),
    "match": Objective(attention_output=1.0, teacher_forced=True),
}


class Clock(TrainerCallback):
    def __init__(self):
        self.wall, self.processor = [], []

    def on_step_begin(self, *args, **kwargs):
        self.begun = time.perf_counter(), time.process_time()

    def on_step_end(self, *args, **kwargs):
        self.wall.append(time.perf_counter() - self.begun[0])
        self.processor.append(time.process_time() - self.begun[1])


def make(way, rows: int, length: int, folder: str) -> Trainer:
    donor = AutoModelForCausalLM.from_pretrained(DONOR, dtype=torch.float32)
    generator = torch.Generator().manual_seed(0)
    positions = list(range(length))
    data = [
        {"input_ids": torch.randint(2048, (length,), generator=generator).tolist(), "position_ids": positions}
        for _ in range(rows * STEPS)
    ]
    arguments = TrainingArguments(
        output_dir=folder,
        per_device_train_batch_size=rows,
        max_steps=STEPS,
        bf16=True,
        use_cpu=True,
        logging_steps=STEPS,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        remove_unused_columns=False,
    )
    common = {"args": arguments, "train_dataset": data, "data_collator": PackedCollator()}
    student = convert(donor, num_key_value_heads=2)
    if way is None:
        return Trainer(model=student, **common)
    objective, train, teacher = way
    uptrain = UptrainCallback(
        budget_tokens=rows * length * STEPS,
        tokens_per_step=rows * length,
        phases=[Phase(objective=OBJECTIVES[objective], train=train)],
    )
    teacher = donor if teacher == SECOND_MODEL else teacher
    return UptrainTrainer(model=student, teacher=teacher, uptrain=uptrain, **common)


def measure(rounds: int, rows: int, length: int) -> list[dict]:
    with tempfile.TemporaryDirectory() as folder:
        trainers, clocks = {}, {}
        for name, way in WAYS.items():
            trainers[name], clocks[name] = make(way, rows, length, folder), Clock()
            trainers[name].remove_callback(PrinterCallback)
            trainers[name].add_callback(clocks[name])
        for _ in range(rounds):
            for trainer in trainers.values():
                trainer.train()
    plain = statistics.median(clocks["plain Trainer, all parameters"].processor)
    found = []
    for name, trainer in trainers.items():
        teacher = getattr(trainer, "teacher", None)
        memory = teacher_memory(teacher, trainer.model) if teacher is not None else None
        processor = statistics.median(clocks[name].processor)
        found.append(
            {
                "way": name,
                "tokens_per_step": rows * length,
                "processor_seconds": processor,
                "seconds": statistics.median(clocks[name].wall),
                "times_plain": processor / plain,
                "teacher_own_bytes": memory.own_bytes if memory else 0,
                "teacher_shared_bytes": memory.shared_bytes if memory else 0,
            }
        )
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--rows", type=int, nargs="*", default=[1, 8])
    parser.add_argument("--output", type=Path)
    asked = parser.parse_args()
    torch.set_num_threads(1)
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    results = [found for rows in asked.rows for found in measure(asked.rounds, rows, 256)]
    print(
        "| objective | tokens per step | processor ms | times plain | teacher's own bytes | shared with the student |"
    )
    print("|---|---|---|---|---|---|")
    for found in results:
        print(
            f"| {found['way']} | {found['tokens_per_step']:,} | {1000 * found['processor_seconds']:.0f} | "
            f"{found['times_plain']:.2f} | {found['teacher_own_bytes']:,} | {found['teacher_shared_bytes']:,} |"
        )
    if asked.output is not None:
        asked.output.write_text(json.dumps({"machine": machine(), "results": results}, indent=2) + "\n")


if __name__ == "__main__":
    main()
