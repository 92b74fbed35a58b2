"""Tiny runs of transformers' own Trainer with our callback."""

import torch
from transformers import Trainer, TrainerCallback

from hf_gqa import convert
from hf_gqa.uptrain.callback import UptrainCallback

from .phases import LENGTH, arguments, data_set
from .tiny_donors import tiny_donor


def student_of(model_type: str = "llama", export: str = "auto", **changes):
    return convert(tiny_donor(model_type, **changes), num_key_value_heads=2, export=export)


def trained(folder, model=None, num_rows=8, callbacks=(), resume=None, trainer_class=Trainer, rows=None, **options):
    """A finished trainer; options of the callback, and `args` for the Trainer."""
    args = arguments(folder, **options.pop("args", {}))
    uptrain = UptrainCallback(**options)
    trainer = trainer_class(
        model=model if model is not None else student_of(), args=args, train_dataset=rows or data_set(num_rows, LENGTH),
        eval_dataset=data_set(3, LENGTH, seed=5), callbacks=[uptrain, *callbacks],
    )  # fmt: skip
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def values_of(model) -> dict[str, torch.Tensor]:
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


def assert_equal(found: dict, expected: dict) -> None:
    assert found.keys() == expected.keys()
    assert not [name for name in expected if not torch.equal(found[name], expected[name])]


class Steps(TrainerCallback):
    """Which parameters got gradients, and the learning rate, of each step."""

    def __init__(self):
        self.with_gradient, self.rates = [], []

    def on_pre_optimizer_step(self, args, state, control, model, optimizer, **kwargs):
        self.with_gradient.append({name for name, tensor in model.named_parameters() if tensor.grad is not None})
        self.rates.append(optimizer.param_groups[0]["lr"])
