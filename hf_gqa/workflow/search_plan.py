"""A plan found by looking at the donor with text: KV heads of each layer for a budget, methods by trial, or both."""

from collections.abc import Sequence
from dataclasses import dataclass

from transformers import PreTrainedModel

from ..convert.calibration import Calibration
from ..convert.donor import Donor
from ..convert.plan import ConversionPlan
from .choose_method import CANDIDATES, Trial, choose_method, without_moves
from .head_budget import Allotment, allot_heads


AUTO = "auto"


@dataclass(frozen=True, slots=True, kw_only=True)
class FoundPlan:
    """A plan and how it was found.

    Args:
        allotment: of the budget; None where there was none.
        trials: of methods, the best first; empty where the method was given.
    """

    plan: ConversionPlan
    allotment: Allotment | None = None
    trials: tuple[Trial, ...] = ()

    def to_dict(self) -> dict:
        """What a manifest keeps."""
        return {
            "allotment": None if self.allotment is None else self.allotment.to_dict(),
            "trials": [trial.to_dict() for trial in self.trials],
        }


def search_plan(
    donor: Donor,
    model: PreTrainedModel,
    calibration: Calibration,
    *,
    method: str | Sequence[str] = AUTO,
    budget_bytes: int | None = None,
    candidates: Sequence[str] = CANDIDATES,
    **plan_fields,
) -> FoundPlan:
    """Look at the donor for what the plan leaves open.

    Args:
        model: the donor loaded; untouched.
        calibration: the text; all of it is for the conversion that follows.
        method: as a plan's, or "auto" to try `candidates`.
        budget_bytes: of cache for a token, in place of `num_key_value_heads`.
        plan_fields: of a `ConversionPlan`.

    Raises:
        Refusal: a budget that no assignment meets, or too little text.
    """
    searched = method == AUTO or list(method) == [AUTO]
    allotment = None
    if budget_bytes is not None:
        closed_form = without_moves(donor, "group,align,mean_pool" if donor.has_head_norms else "group,fold")
        seed = plan_fields.get("seed", 0)
        allotment = allot_heads(donor, model, calibration, budget_bytes, closed_form if searched else method, seed)
        plan_fields |= allotment.plan_fields
    if not searched:
        return FoundPlan(plan=ConversionPlan(method=method, **plan_fields), allotment=allotment)
    trials = choose_method(model, calibration.tokens_NL.long(), candidates, **plan_fields)
    plan = ConversionPlan(method=trials[0].method, **plan_fields)
    return FoundPlan(plan=plan, allotment=allotment, trials=trials)
