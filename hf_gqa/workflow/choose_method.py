"""Which methods convert a donor best: some are tried on part of the calibration text and measured on the rest.

Shapes: N rows, L tokens of a row.
"""

import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass

import torch
from transformers import PreTrainedModel

from ..convert.calibration import calibrate
from ..convert.donor import Donor, donor_from_model
from ..convert.in_memory import convert
from ..convert.plan import ConversionPlan
from ..evaluate.quality.token_scores import score
from ..refusal import Refusal
from .rows_as_windows import rows_as_windows


CANDIDATES = (  # the cheap ones first; those that a family defeats are skipped
    "mean_pool",
    "group,align,mean_pool,renormalise",
    "group,align,mean_pool,refit",
    "group,fold",
    "group,fold,refit",
    "group,fold,refit_queries,refit",
)
HELD_OUT_EVERY = 8  # of so many rows, one is measured on


def without_moves(donor: Donor, method: str) -> str:
    """The methods that a donor can take whose heads have positions of their own."""
    return method.replace("group,", "") if donor.has_head_positions else method


@dataclass(frozen=True, slots=True, kw_only=True)
class Trial:
    """One candidate.

    Args:
        kl: to the donor, in nats per token, on rows that it was not calibrated on; None if it was refused.
        loss: of the student there, in nats per token.
        seconds: that the conversion took.
        refused: why it was not tried.
    """

    method: tuple[str, ...]
    kl: float | None = None
    loss: float | None = None
    seconds: float | None = None
    refused: str | None = None

    def to_dict(self) -> dict:
        return asdict(self) | {"method": list(self.method)}


def choose_method(
    model: PreTrainedModel, tokens_NL: torch.Tensor, candidates: Sequence[str] = CANDIDATES, **plan_fields
) -> tuple[Trial, ...]:
    """Every candidate's trial, the best first, those refused last.

    Args:
        model: the donor; untouched.
        tokens_NL: calibration text; one row of `HELD_OUT_EVERY` is kept to measure on.
        candidates: methods, each as a plan's.
        plan_fields: of a `ConversionPlan`, all but `method`.

    Raises:
        Refusal: a single row, or no candidate that fits the donor.
    """
    if len(tokens_NL) < 2:
        raise Refusal(
            f"method = auto: {len(tokens_NL)} row of calibration text cannot be calibrated on and measured on. Give more text."
        )
    held_out = torch.zeros(len(tokens_NL), dtype=torch.bool)
    held_out[HELD_OUT_EVERY // 2 :: HELD_OUT_EVERY] = True
    held_out[-1] |= not held_out.any()
    donor = donor_from_model(model)
    calibration = calibrate(donor, model, tokens_NL[~held_out])
    windows = rows_as_windows(tokens_NL[held_out])
    trials = []
    for candidate in candidates:
        plan = ConversionPlan(method=without_moves(donor, candidate), **plan_fields)
        begun = time.perf_counter()
        try:
            student = convert(model, plan, calibration=calibration)
        except Refusal as refusal:
            trials.append(Trial(method=plan.method, refused=str(refusal)))
            continue
        seconds = time.perf_counter() - begun
        scores = score(model, student, windows, batch_size=8)
        kl, loss = float(scores.kl_N.mean()), float(scores.student_loss_N.mean())
        trials.append(Trial(method=plan.method, kl=kl, loss=loss, seconds=seconds))
    if all(trial.kl is None for trial in trials):
        raise Refusal(f"method = auto: nothing that was tried fits this donor ({trials[0].refused})")
    return tuple(sorted(trials, key=lambda trial: (trial.kl is None, trial.kl)))
