"""What is trained towards what, and for how much of the budget."""

import math
from dataclasses import asdict, dataclass, fields

from ..refusal import Refusal


TRAINED = ("all", "attention", "key_value")
WEIGHTS = ("kl", "cross_entropy", "teacher_choice", "attention_output", "hidden_state")
SCHEDULES = ("cosine", "linear", "constant")


@dataclass(frozen=True, slots=True, kw_only=True)
class Objective:
    """Weights of the parts of a loss, all per token.

    Args:
        kl: forward KL from teacher to student, times temperature squared (Hinton et al. 2015, arXiv 1503.02531).
        cross_entropy: with the text.
        teacher_choice: cross-entropy with the teacher's likeliest token.
        attention_output: squared error of each layer's attention output, as a fraction of the teacher's mean square,
            averaged over layers (as in LoLCATs, arXiv 2410.10254).
        hidden_state: the same for the output of each layer.
        temperature: of the KL.
        teacher_forced: give each attention module of the student the teacher's input to it, so that layers learn
            independently of each other's errors (block-wise distillation, Puzzle, arXiv 2411.19146). Only
            `attention_output` can then be learned.

    Raises:
        Refusal: a weight below zero, none above, or parts that exclude each other.
    """

    kl: float = 0.0
    cross_entropy: float = 0.0
    teacher_choice: float = 0.0
    attention_output: float = 0.0
    hidden_state: float = 0.0
    temperature: float = 1.0
    teacher_forced: bool = False

    def __post_init__(self):
        weights = {name: getattr(self, name) for name in WEIGHTS}
        for name, value in (weights | {"temperature": self.temperature}).items():
            if not _is_number(value):
                raise Refusal(f"objective: {name} = {value!r} is not a number from 0. Use 0 or more.")
        if self.temperature == 0:
            raise Refusal("objective: temperature = 0 has no softmax. Use a number above 0, usually 1.")
        if not any(weights.values()):
            raise Refusal(
                f"objective: every weight is 0, so there is nothing to learn. Set one of {', '.join(weights)}."
            )
        if self.teacher_forced and [name for name, value in weights.items() if value] != ["attention_output"]:
            raise Refusal(
                "objective: teacher_forced gives the student's layers inputs that are not its own, so only "
                "attention_output means anything. Set the other weights to 0."
            )

    @property
    def needs_teacher(self) -> bool:
        return bool(self.kl or self.teacher_choice or self.matches_layers)

    @property
    def matches_layers(self) -> bool:
        return bool(self.attention_output or self.hidden_state)


@dataclass(frozen=True, slots=True, kw_only=True)
class Phase:
    """A stretch of the run.

    Args:
        share: of the budget's tokens; the shares of all phases are scaled to sum to 1.
        objective: what is learned.
        train: "all" parameters, those of "attention", or only the converted "key_value" projections.
        learning_rate: factor on the run's learning rate.
        attention_learning_rate: the same for attention parameters, which conversion changed most; None: no difference.
        warmup: share of the phase in which the learning rate rises from 0.
        schedule: how it falls after that: "cosine" or "linear" to 0, or "constant".
    """

    share: float = 1.0
    objective: Objective
    train: str = "all"
    learning_rate: float = 1.0
    attention_learning_rate: float | None = None
    warmup: float = 0.05
    schedule: str = "cosine"

    def __post_init__(self):
        if isinstance(self.objective, dict):
            object.__setattr__(self, "objective", _from_dict(Objective, self.objective, "objective"))
        if not isinstance(self.objective, Objective):
            raise Refusal(
                f"phase: objective = {self.objective!r} is not weights, such as {{'kl': 1.0}}. Write them out."
            )
        if self.train not in TRAINED:
            raise Refusal(f"phase: train = {self.train!r} is unknown. Use one of {', '.join(TRAINED)}.")
        if self.objective.teacher_forced and self.train == "all":
            raise Refusal(
                "phase: teacher_forced teaches attention modules only, so train = 'all' would leave the rest to weight decay. "
                "Use train = 'attention' or 'key_value'."
            )
        if self.schedule not in SCHEDULES:
            raise Refusal(f"phase: schedule = {self.schedule!r} is unknown. Use one of {', '.join(SCHEDULES)}.")
        if self.attention_learning_rate is None:
            object.__setattr__(self, "attention_learning_rate", self.learning_rate)
        for name in ("share", "learning_rate", "attention_learning_rate"):
            if not _is_number(getattr(self, name)) or getattr(self, name) == 0:
                raise Refusal(f"phase: {name} = {getattr(self, name)!r} would do nothing. Use a positive number.")
        if not _is_number(self.warmup) or self.warmup >= 1:
            raise Refusal(f"phase: warmup = {self.warmup!r} is a share of the phase. Use a number from 0 to below 1.")

    def rate_at(self, progress: float, of_attention: bool = False) -> float:
        """Factor on the run's learning rate, at `progress` from 0 to 1 of this phase."""
        peak = self.attention_learning_rate if of_attention else self.learning_rate
        if progress < self.warmup:
            return peak * progress / self.warmup
        fallen = min(1.0, (progress - self.warmup) / (1 - self.warmup))
        shape = {"cosine": (1 + math.cos(math.pi * fallen)) / 2, "linear": 1 - fallen, "constant": 1.0}
        return peak * shape[self.schedule]

    def to_dict(self) -> dict:
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict) -> "Phase":
        return _from_dict(cls, values, "phase")


def locate(phases: tuple[Phase, ...], progress: float) -> int:
    """Index of the phase that a run is in, at `progress` from 0 to 1 of the whole budget."""
    ends = _ends(phases)
    return next((index for index, end in enumerate(ends) if progress < end - 1e-9), len(phases) - 1)


def rate_of_step(phases: tuple[Phase, ...], step: int, num_steps: int, of_attention: bool = False) -> float:
    """Factor on the learning rate of `step` (from 0): that of the middle of the step in its phase, so never 0."""
    ends = _ends(phases)
    index = locate(phases, step / num_steps)
    begin = ends[index - 1] if index else 0.0
    middle = (step / num_steps + min((step + 1) / num_steps, ends[index])) / 2
    inside = (middle - begin) / (ends[index] - begin)
    return phases[index].rate_at(min(1.0, max(0.0, inside)), of_attention)


def _ends(phases: tuple[Phase, ...]) -> list[float]:
    total = sum(phase.share for phase in phases)
    return [sum(phase.share for phase in phases[: index + 1]) / total for index in range(len(phases))]


def _is_number(value) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value < math.inf


def _from_dict(cls, values, where: str):
    known = [field.name for field in fields(cls)]
    if not isinstance(values, dict):
        raise Refusal(f"{where}: got {values!r}, expected an object with keys of {', '.join(known)}.")
    unknown = sorted(map(str, set(values) - set(known)))
    if unknown:
        raise Refusal(f"{where}: unknown key '{unknown[0]}'. Known: {', '.join(known)}.")
    try:
        return cls(**values)
    except TypeError as error:
        raise Refusal(f"{where}: {error}. Known keys: {', '.join(known)}.") from None
