"""From a student and its donor on disk to a report."""

import shlex
from dataclasses import fields
from pathlib import Path
from typing import get_origin

from transformers import PreTrainedModel

from ..convert.donor import Donor, open_donor
from ..convert.model_kind import CAUSAL_LM, ENCODER, MASKED_LM, SEQ2SEQ
from ..refusal import Refusal
from ..text.source import keep_bars_on_terminals
from .cost.memory import parse_memory
from .cost.peak_memory import peak_memory_bytes
from .inputs.opened import Pair, open_pair
from .measuring.causal_lm import CausalLMMeasurement, folder_of_tasks
from .measuring.encoder import EncoderMeasurement
from .measuring.facts import model_facts, settings
from .measuring.measured import Asked, MeasuredModel
from .measuring.seq2seq import Seq2SeqMeasurement
from .recipe import EvaluationRecipe
from .report import FORMAT, ModelFacts, Report
from .tasks.lm_eval_tasks import check_tasks


MEASUREMENTS = {
    CAUSAL_LM: CausalLMMeasurement,
    SEQ2SEQ: Seq2SeqMeasurement,
    MASKED_LM: EncoderMeasurement,
    ENCODER: EncoderMeasurement,
}


class Evaluation:
    """An evaluation that has been checked and explained, and not begun.

    Args:
        student: folder or Hub repository; it is only read.
        donor: folder, Hub repository, or a donor opened with `open_donor`.
        recipe: what to measure; or give its fields, as in `text=["held_out.txt"]`.
        converted: the student as it was before uptraining; what it writes is shown beside.
        donor_name: what the report calls an opened donor.

    Raises:
        Refusal: bad input, and models that cannot be compared.
    """

    def __init__(
        self,
        student: str | Path,
        donor: str | Path | Donor,
        recipe: EvaluationRecipe | None = None,
        *,
        converted: str | Path | None = None,
        donor_name: str | None = None,
        **recipe_fields,
    ):
        recipe = recipe if recipe is not None else EvaluationRecipe.from_dict(recipe_fields)
        keep_bars_on_terminals()
        self.donor_name = donor_name or (donor.name if isinstance(donor, Donor) else str(donor))
        donor = donor if isinstance(donor, Donor) else open_donor(donor)
        self.failed: list[str] = []
        for size in recipe.memory:
            parse_memory(size)
        check_tasks(recipe.tasks, folder_of_tasks(recipe))
        self.pair: Pair = open_pair(student, donor, recipe.dtype, recipe.device, recipe.attn_implementation)
        asked = Asked(recipe=recipe, pair=self.pair, donor_name=self.donor_name, converted=converted)
        self.measurement = MEASUREMENTS[self.pair.kind](asked)
        self.recipe = self.measurement.recipe

    def explanation(self) -> dict:
        """What will be measured, before it is."""
        recipe = self.recipe
        return {
            "donor": self.donor_name,
            "student": self.pair.student_name,
            "kind": self.pair.kind,
            "context_tokens": recipe.context_length,
            "stride_tokens": recipe.stride or recipe.context_length,
            "batch_size": recipe.batch_size,
            "dtype": self.dtype_name,
            "device": str(self.pair.student.device),
            "speed_points": len(recipe.speed_batch_sizes) * len(recipe.speed_context_lengths) if recipe.speed else 0,
            **self.measurement.explanation(),
        }

    @property
    def dtype_name(self) -> str:
        return str(self.pair.student.dtype).removeprefix("torch.")

    def run(self) -> Report:
        """Measure everything the recipe asks for.

        Raises:
            Refusal: a loss that is NaN or Inf, or a task that cannot be run.
        """
        found, pair = self.measurement.measure(), self.pair
        manifest = pair.opened_student.manifest
        return Report(
            format=FORMAT,
            kind=pair.kind,
            donor=self._facts(pair.donor, self.donor_name, pair.opened_donor.folder, found.donor),
            student=self._facts(pair.student, pair.student_name, pair.opened_student.folder, found.student),
            text=found.text,
            settings=settings(self.recipe, pair.student),
            conversion=manifest.to_dict() if manifest is not None else None,
            recipe=None,
            command=self.command(),
            notes=(*pair.notes, *found.notes, *self.failed),
            **{field.name: getattr(found.report, field.name) for field in fields(found.report)},
        )

    def _facts(self, model: PreTrainedModel, name: str, folder: Path, measured: MeasuredModel) -> ModelFacts:
        return model_facts(model, name, self._peak_memory(folder, name), measured)

    def _peak_memory(self, folder: Path, name: str) -> int | None:
        """A failure becomes a note: it is no reason to lose what was measured before."""
        recipe = self.recipe
        if not recipe.peak_memory:
            return None
        try:
            return peak_memory_bytes(
                folder,
                dtype=self.dtype_name,
                batch_size=recipe.speed_batch_sizes[-1],
                context_tokens=max(recipe.speed_context_lengths),
                decode_tokens=recipe.decode_tokens,
                attn_implementation=recipe.attn_implementation,
                device=str(self.pair.student.device),
                kind=self.pair.kind,
            )
        except Refusal as error:
            self.failed.append(f"The peak memory of {name} was not measured: {error}")
            return None

    def command(self) -> str:
        """That repeats this evaluation, with every size that was resolved."""
        words = ["hf-gqa", "evaluate", self.pair.student_name, "--donor", self.donor_name]
        asked = self.recipe.to_dict()
        for field in fields(EvaluationRecipe):
            if field.name in asked:
                words += option_words(field, asked[field.name])
        return shlex.join(words)


def option_words(field, value) -> list[str]:
    """A field of a recipe as options of a command."""
    flag = f"--{field.name.replace('_', '-')}"
    if isinstance(value, bool):
        return [flag if value else f"--no-{flag[2:]}"]
    values = value if get_origin(field.type) is tuple else [value]
    return [word for item in values for word in (flag, str(item))]


def evaluate(
    student: str | Path,
    donor: str | Path | Donor,
    recipe: EvaluationRecipe | None = None,
    *,
    converted: str | Path | None = None,
    **recipe_fields,
) -> Report:
    """Measure what a conversion cost and what it bought: quality, fidelity, recall, cache, memory and speed.

    Both models read the same tokens, so that differences are paired; each has a bootstrap interval.

    Args:
        student: folder or Hub repository of the student.
        donor: folder, Hub repository, or a donor opened with `open_donor`.
        recipe: what to measure; or give its fields, as in `text=["held_out.txt"]`.
        converted: the student as it was before uptraining; what it writes is shown beside.

    Returns:
        A `Report`; `report.to_json()` and `Report.read` round-trip exactly.

    Raises:
        Refusal: bad input, models that cannot be compared, or a loss that is NaN or Inf.
    """
    return Evaluation(student, donor, recipe, converted=converted, **recipe_fields).run()
