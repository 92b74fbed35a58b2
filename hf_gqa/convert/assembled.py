"""A student in memory, of converted tensors."""

import torch
from transformers import PreTrainedModel

from .donor import Donor
from .plan import ConversionPlan
from .surgery import converted_shards
from .target import Target


def assembled_student(
    donor: Donor, plan: ConversionPlan, target: Target, known: dict, dtype: torch.dtype, attention: str | None
) -> PreTrainedModel:
    """The student, in memory of its own; tensors that a donor keeps in another dtype than the rest keep it.

    Args:
        known: of the text, as `calibrated` found it.
        attention: implementation; None for the class's default.
    """
    state = {}
    for _, tensors in converted_shards(donor, plan, target, **known):
        state.update((name, tensor.clone()) for name, tensor in tensors.items())
    student, loading = target.model_class.from_pretrained(
        None,
        config=target.config,
        state_dict=dict(state),
        dtype=dtype,
        attn_implementation=attention,
        output_loading_info=True,
    )
    assert not loading["missing_keys"] and not loading["unexpected_keys"], loading
    for name, tensor in student.state_dict(keep_vars=True).items():
        if name in state and tensor.dtype != state[name].dtype:  # loading casts everything to one dtype
            tensor.data = state[name]
    return student
