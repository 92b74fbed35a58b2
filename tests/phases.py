"""Tiny runs of the UptrainTrainer with any objective."""

import pytest
import torch
from transformers import TrainingArguments

from hf_gqa import Refusal, convert
from hf_gqa.uptrain.callback import UptrainCallback
from hf_gqa.uptrain.phases import Objective, Phase
from hf_gqa.uptrain.trainer import UptrainTrainer

from .tiny_donors import VOCAB_SIZE, tiny_donor


LENGTH, ROWS, RATE = 12, 4, 1e-3
EPSILON = 1e-4  # of Adam: large enough that rounding errors of gradients near 0 move nothing
MIXED = Objective(kl=0.6, cross_entropy=0.3, teacher_choice=0.2, temperature=2.0)
OBJECTIVES_BY_HAND = {
    "mixed": MIXED,
    "attention_output": Objective(attention_output=0.5),
    "forced": Objective(attention_output=2.0, teacher_forced=True),
    "hidden_state": Objective(hidden_state=1.0, cross_entropy=0.1),
    "everything": Objective(kl=1.0, attention_output=0.5, hidden_state=0.2, teacher_choice=0.1),
}
every_objective = pytest.mark.parametrize("objective", OBJECTIVES_BY_HAND.values(), ids=OBJECTIVES_BY_HAND)
TEXT = Objective(cross_entropy=1.0)


def refused(function, *args, **kwargs) -> str:
    with pytest.raises(Refusal) as refusal:
        function(*args, **kwargs)
    return str(refusal.value)


def arguments(folder, **changes) -> TrainingArguments:
    given = {
        "output_dir": str(folder / "run"), "use_cpu": True, "disable_tqdm": True, "report_to": "none", "logging_steps": 1,
        "save_strategy": "no", "per_device_train_batch_size": 2, "num_train_epochs": 100, "learning_rate": 1e-3,
    }  # fmt: skip
    return TrainingArguments(**given | changes)


def phase_of(objective: Objective) -> Phase:
    return Phase(objective=objective, train="attention" if objective.teacher_forced else "all")


def rows_of(num_rows: int = ROWS, seed: int = 0) -> list[dict]:
    """Each with labels at another number of tokens; none at the first, which nothing predicts (some Trainers count it)."""
    generator = torch.Generator().manual_seed(seed)
    rows = []
    for row in range(num_rows):
        tokens = torch.randint(3, VOCAB_SIZE, (LENGTH,), generator=generator)
        labels = tokens.clone()
        labels[0] = -100
        labels[2 : 2 + 2 * (row % ROWS)] = -100
        rows.append({"input_ids": tokens, "labels": labels, "attention_mask": torch.ones_like(tokens)})
    return rows


def batch_of(rows: list[dict]) -> dict[str, torch.Tensor]:
    return {name: torch.stack([row[name] for row in rows]) for name in rows[0]}


def models_of(model_type: str = "llama", export: str = "auto"):
    donor = tiny_donor(model_type)
    return convert(donor, num_key_value_heads=2, export=export), donor


def trainer_of(folder, student, teacher, phases, num_steps=4, rows=None, batch_size=ROWS, **options) -> UptrainTrainer:
    """One that sees `ROWS` rows at each step, in however many pieces; `args` are for the Trainer."""
    trainer_class, rows = options.pop("trainer_class", UptrainTrainer), rows or rows_of()
    callbacks, eval_rows = options.pop("callbacks", []), options.pop("eval_rows", None)
    given = {"per_device_train_batch_size": batch_size, "gradient_accumulation_steps": ROWS // batch_size}
    args = arguments(
        folder,
        **given
        | {"learning_rate": RATE, "adam_epsilon": EPSILON, "remove_unused_columns": False}
        | options.pop("args", {}),
    )
    step_tokens = ROWS * LENGTH
    uptrain = UptrainCallback(
        **{"budget_tokens": num_steps * step_tokens, "tokens_per_step": step_tokens, "phases": phases} | options
    )
    return trainer_class(
        model=student, args=args, train_dataset=rows, eval_dataset=eval_rows, uptrain=uptrain, teacher=teacher,
        callbacks=callbacks,
    )  # fmt: skip


def uptrained(*args, resume=None, **kwargs) -> UptrainTrainer:
    trainer = trainer_of(*args, **kwargs)
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def losses_of(trainer) -> list[float]:
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def assert_close(found: dict, expected: dict, atol: float = 1e-6) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(
            found[name], tensor, rtol=0, atol=atol, msg=lambda text, name=name: f"{name}: {text}"
        )


def data_set(num_rows: int, length: int = 12, seed: int = 0) -> list[dict]:
    tokens = torch.randint(3, VOCAB_SIZE, (num_rows, length), generator=torch.Generator().manual_seed(seed))
    return [{"input_ids": row, "labels": row.clone()} for row in tokens]


PEFT_ASKS = "ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"  # of transformers, in peft's constructor
PEFT_SAYS = "ignore:fan_in_fan_out is set to"  # gpt2 has layers of both kinds
