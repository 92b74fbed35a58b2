"""Convert a model in memory."""

import copy

import torch
from transformers import PreTrainedModel

from ..runtime.grouped_attention import NAME
from .assembled import assembled_student
from .calibration import Calibration, calibrated
from .donor import donor_from_model
from .grouped_attention import use_grouped_attention
from .plan import ConversionPlan, make_plan
from .target import choose_target


def convert(
    model: PreTrainedModel,
    plan: ConversionPlan | None = None,
    *,
    calibration: Calibration | torch.Tensor | None = None,
    **plan_fields,
) -> PreTrainedModel:
    """A new model that follows the plan; `model` is untouched and shares no memory with it.

    Source: GQA (Ainslie et al. 2023, arXiv 2305.13245) for the default method, `mean_pool`.

    Args:
        model: the donor: any transformers model of a known family, base or with a head, on one device.
        plan: what the student shall be; or give its fields, as in `convert(model, num_key_value_heads=2)`.
        calibration: rows of token ids `[N, L]` that methods may look at the donor with, or what `calibrate` made of
            them; without it they go by the weights alone.

    Returns:
        The student, in the donor's dtype, device and training mode: of the donor's own class where that can express
        the plan, else of a class that `save_pretrained` ships along with the weights.

    Raises:
        Refusal: the plan does not fit the donor, or the donor is not one that can be converted.
    """
    plan = make_plan(plan, plan_fields)
    donor = donor_from_model(model)
    target = choose_target(donor, plan)
    attention = _attention_for(target.model_class, model.config._attn_implementation)
    known = calibrated(donor, plan, target, calibration, model)
    student = assembled_student(donor, plan, target, known, model.dtype, "eager" if attention == NAME else attention)
    if attention == NAME:  # not by name: it may be a class that transformers keeps from everything called sdpa
        use_grouped_attention(student)
    if getattr(model, "generation_config", None) is not None:
        student.generation_config = copy.deepcopy(model.generation_config)
    student.train(model.training)
    return student.to(model.device)


def _attention_for(model_class: type[PreTrainedModel], wanted: str) -> str | None:
    """The donor's attention implementation; the default where a class does not call attention through an interface."""
    return wanted if wanted == "eager" or model_class._can_set_attn_implementation() else None
