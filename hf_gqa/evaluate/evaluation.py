"""From a student and its donor on disk to a report."""

import shlex
import sys
from dataclasses import asdict, fields, replace
from functools import cached_property
from pathlib import Path
from typing import get_origin

import datasets
import numpy as np
from transformers import PreTrainedModel

from ..convert.donor import Donor, open_donor
from ..progress_bar import progress_bar
from ..refusal import Refusal
from .bootstrap import FEWEST_GROUPS, Bootstrap
from .continuations import continuations, prompts_from
from .documents import Documents, read_documents, sampled_documents
from .facts import differences, model_facts, settings
from .lm_eval_tasks import check_tasks, equivalent_command, run_tasks
from .memory import capacity, parse_memory
from .opened import Pair, open_pair
from .peak_memory import peak_memory_bytes
from .quality import TokenScores, by_context, score
from .recall import lengths, lengths_left_out, recall
from .recipe import EvaluationRecipe
from .report import FORMAT, ModelFacts, Report, Retrieval, TextFacts
from .retrieval import RETRIEVAL
from .speed import check_speed, measure_speed


LONGEST_UNASKED = 2048
TOKENS_AT_ONCE = 8192


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
        if not sys.stderr.isatty():
            datasets.disable_progress_bars()
        self.donor_name = donor_name or (donor.name if isinstance(donor, Donor) else str(donor))
        donor = donor if isinstance(donor, Donor) else open_donor(donor)
        self.converted, self.failed = converted, []
        self.memory_bytes = [parse_memory(size) for size in recipe.memory]
        check_tasks(recipe.tasks, folder_of_tasks(recipe))
        self.pair: Pair = open_pair(student, donor, recipe.dtype, recipe.device, recipe.attn_implementation)
        self.recipe = resolve_sizes(recipe, self.pair)
        self._check_speed()
        self.documents: Documents = self._documents()

    def _check_speed(self) -> None:
        recipe, pair = self.recipe, self.pair
        if recipe.speed:
            sizes = recipe.speed_batch_sizes, recipe.speed_context_lengths
            check_speed(pair.donor, pair.student, *sizes, recipe.decode_tokens, recipe.repetitions)

    def _documents(self) -> Documents:
        recipe, pair = self.recipe, self.pair
        if recipe.sampled_tokens is not None:
            sampled = (recipe.sampled_tokens, recipe.context_length, recipe.seed)
            return sampled_documents(pair.donor, pair.tokenizer, *sampled)
        return read_documents(recipe.text_source(), pair.tokenizer, recipe.context_length, recipe.max_tokens)

    def explanation(self) -> dict:
        """What will be measured, before it is."""
        recipe = self.recipe
        return {
            "donor": self.donor_name,
            "student": self.pair.student_name,
            "text_tokens": self.documents.tokens,
            "text_bytes": self.documents.text_bytes,
            "context_tokens": recipe.context_length,
            "stride_tokens": recipe.stride,
            "batch_size": recipe.batch_size,
            "dtype": self.dtype_name,
            "device": str(self.pair.student.device),
            "recall_prompts_per_length": recipe.retrieval_samples,
            "tasks": list(recipe.tasks),
            "speed_points": len(recipe.speed_batch_sizes) * len(recipe.speed_context_lengths) if recipe.speed else 0,
        }

    @property
    def dtype_name(self) -> str:
        return str(self.pair.student.dtype).removeprefix("torch.")

    @cached_property
    def bootstrap(self) -> Bootstrap:
        recipe = self.recipe
        return Bootstrap(seed=recipe.seed, resamples=recipe.resamples, confidence_fraction=recipe.confidence)

    def run(self) -> Report:
        """Measure everything the recipe asks for.

        Raises:
            Refusal: a loss that is NaN or Inf, or a task that cannot be run.
        """
        scores = self._score()
        recalled = self._recall()
        speed, not_timed = self._speed()
        donor, student, manifest = self.pair.donor, self.pair.student, self.pair.opened_student.manifest
        kl_N, agrees_N = scores.kl_N, scores.agrees_N
        return Report(
            format=FORMAT,
            donor=self._facts(donor, self.donor_name, scores.donor_loss_N, self.pair.opened_donor.folder),
            student=self._facts(
                student, self.pair.student_name, scores.student_loss_N, self.pair.opened_student.folder
            ),
            kl_nats_per_token=float(kl_N.mean()),
            top1_agreement_fraction=float(agrees_N.mean()),
            differences=differences(scores, self.documents.text_bytes, self.bootstrap),
            by_context=by_context(scores, self.recipe.context_length, self.bootstrap),
            retrieval=recalled,
            tasks=self._tasks(),
            speed=speed,
            capacity=tuple(
                capacity(donor, student, size, batch)
                for size in self.memory_bytes
                for batch in self.recipe.speed_batch_sizes
            ),
            continuations=self._continuations(),
            text=self._text_facts(scores),
            settings=settings(self.recipe, student),
            conversion=asdict(manifest) if manifest is not None else None,
            recipe=None,
            command=self.command(),
            notes=(*self.pair.notes, *self._notes(scores), *self._not_recalled(recalled), *not_timed, *self.failed),
        )

    def _score(self) -> TokenScores:
        recipe, pair = self.recipe, self.pair
        with progress_bar("Text", self.documents.tokens, "tok", unit_scale=True) as bar:
            windows = self.documents.windows(recipe.context_length, recipe.stride)
            return score(pair.donor, pair.student, windows, recipe.batch_size, bar.update)

    def _recall(self):
        recipe, pair = self.recipe, self.pair
        if not recipe.retrieval_samples:
            return ()
        prompts = len(RETRIEVAL.names()) * len(lengths(recipe.context_length)) * recipe.retrieval_samples
        with progress_bar("Recall", prompts, "prompt") as bar:
            return recall(
                *(pair.donor, pair.student, pair.tokenizer),
                longest_context_tokens=recipe.context_length,
                samples=recipe.retrieval_samples,
                seed=recipe.seed,
                batch_size=recipe.batch_size,
                bootstrap=self.bootstrap,
                progress=bar.update,
            )

    def _not_recalled(self, recalled: tuple[Retrieval, ...]) -> tuple[str, ...]:
        return lengths_left_out(recalled, self.recipe.context_length) if self.recipe.retrieval_samples else ()

    def _tasks(self):
        recipe, pair = self.recipe, self.pair
        if not recipe.tasks:
            return ()
        return run_tasks(
            *(pair.donor, pair.student, pair.tokenizer, recipe.tasks),
            tasks_folder=folder_of_tasks(recipe),
            limit=recipe.limit,
            num_fewshot=recipe.num_fewshot,
            batch_size=recipe.batch_size,
            seed=recipe.seed,
            bootstrap=self.bootstrap,
        )

    def _speed(self):
        recipe = self.recipe
        if not recipe.speed:
            return (), ()
        points = len(recipe.speed_batch_sizes) * len(recipe.speed_context_lengths)
        with progress_bar("Speed", points, "size") as bar:
            return measure_speed(
                *(self.pair.donor, self.pair.student),
                batch_sizes=recipe.speed_batch_sizes,
                context_lengths=recipe.speed_context_lengths,
                decode_tokens=recipe.decode_tokens,
                repetitions=recipe.repetitions,
                seed=recipe.seed,
                progress=lambda point: bar.update(),
            )

    def _continuations(self):
        recipe, pair = self.recipe, self.pair
        prompts = recipe.prompts or prompts_from(self.documents, pair.tokenizer, recipe.context_length)
        return continuations(pair, prompts, recipe.continuation_tokens, self.converted)

    def _facts(self, model: PreTrainedModel, name: str, losses_N: np.ndarray, folder: Path) -> ModelFacts:
        return model_facts(model, name, losses_N, self.documents.text_bytes, self._peak_memory(folder, name))

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
            )
        except Refusal as error:
            self.failed.append(f"The peak memory of {name} was not measured: {error}")
            return None

    def _text_facts(self, scores: TokenScores) -> TextFacts:
        documents, recipe = self.documents, self.recipe
        return TextFacts(
            sources=recipe.text or (recipe.dataset_name or f"sampled from {self.donor_name}",),
            fingerprint=documents.fingerprint,
            documents=len(documents),
            tokens=len(scores),
            text_bytes=documents.text_bytes,
            windows=scores.windows,
            context_tokens=recipe.context_length,
            stride_tokens=recipe.stride,
            longest_context_tokens=self.pair.longest_context_tokens,
        )

    def _notes(self, scores: TokenScores) -> list[str]:
        notes, recipe, longest = list(self.documents.notes), self.recipe, self.pair.longest_context_tokens
        if scores.windows < FEWEST_GROUPS:
            notes.append(
                f"The text has {scores.windows} windows; intervals need {FEWEST_GROUPS}. Give more text, or a shorter "
                f"context_length."
            )
        if longest is not None and longest > recipe.context_length:
            notes.append(
                f"The models take {longest:,} tokens; what happens beyond {recipe.context_length:,} was not measured."
            )
        if recipe.tasks:
            notes.append(f"lm_eval's own command for the student's tasks: {self._command_of_lm_eval()}")
        return notes

    def _command_of_lm_eval(self) -> str:
        recipe, manifest = self.recipe, self.pair.opened_student.manifest
        return equivalent_command(
            *(self.pair.student_name, recipe.tasks, recipe.tasks_folder),
            dtype=self.dtype_name,
            device=str(self.pair.student.device),
            limit=recipe.limit,
            num_fewshot=recipe.num_fewshot,
            batch_size=recipe.batch_size,
            seed=recipe.seed,
            trust_remote_code=manifest is not None and manifest.export == "bundle",
        )

    def command(self) -> str:
        """That repeats this evaluation, with every size that was resolved."""
        words = ["hf-gqa", "evaluate", self.pair.student_name, "--donor", self.donor_name]
        asked = self.recipe.to_dict()
        for field in fields(EvaluationRecipe):
            if field.name in asked:
                words += option_words(field, asked[field.name])
        return shlex.join(words)


def folder_of_tasks(recipe: EvaluationRecipe) -> Path | None:
    return Path(recipe.tasks_folder).expanduser() if recipe.tasks_folder else None


def option_words(field, value) -> list[str]:
    """A field of a recipe as options of a command."""
    flag = f"--{field.name.replace('_', '-')}"
    if isinstance(value, bool):
        return [flag if value else f"--no-{flag[2:]}"]
    values = value if get_origin(field.type) is tuple else [value]
    return [word for item in values for word in (flag, str(item))]


def resolve_sizes(recipe: EvaluationRecipe, pair: Pair) -> EvaluationRecipe:
    """The recipe with the sizes that it leaves open."""
    longest = pair.longest_context_tokens
    context = recipe.context_length or min(longest or LONGEST_UNASKED, LONGEST_UNASKED)
    if longest is not None and context > longest:
        raise Refusal(
            f"context_length = {context:,}: the models have positions for {longest:,} tokens. Use {longest:,} or fewer."
        )
    if recipe.stride is not None and recipe.stride > context:
        raise Refusal(
            f"stride = {recipe.stride:,} is more than context_length = {context:,}. Use {context:,} or fewer."
        )
    most = context - recipe.decode_tokens if context > 2 * recipe.decode_tokens else max(1, context // 2)
    return replace(
        recipe,
        context_length=context,
        stride=recipe.stride or context,
        batch_size=recipe.batch_size or max(1, min(32, TOKENS_AT_ONCE // context)),
        speed_context_lengths=recipe.speed_context_lengths or tuple(sorted({max(1, context // 4), most})),
    )


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
