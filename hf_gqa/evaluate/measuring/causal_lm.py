"""The measurement of decoder-only models: loss by context length, recall, tasks, cache, speed, and continuations."""

from dataclasses import replace
from functools import partial
from pathlib import Path

from ...progress_bar import progress_bar
from ...refusal import Refusal
from ..cost.memory import capacity, parse_memory
from ..cost.speed import check_speed, measure_speed
from ..inputs.documents import Documents, read_documents, sampled_documents
from ..inputs.opened import Pair
from ..quality.by_length import by_context
from ..quality.continuations import continuations, prompts_from
from ..quality.token_scores import TokenScores, score
from ..recipe import EvaluationRecipe
from ..report import Retrieval, TextFacts
from ..retrieval import RETRIEVAL
from ..tasks.lm_eval_tasks import equivalent_command, run_tasks
from ..tasks.recall import lengths, lengths_left_out, recall
from .facts import cache_of, compared, losses_of, notes_on_windows, text_facts
from .measured import Asked, Measured, MeasuredModel, batch_size_of, longest_context, timed


class CausalLMMeasurement:
    """Checked and explained, and not begun.

    Raises:
        Refusal: text, sizes or a speed that these models cannot be measured with.
    """

    def __init__(self, asked: Asked):
        self.asked, self.pair = asked, asked.pair
        self.recipe = recipe = resolve_sizes(asked.recipe, self.pair)
        if recipe.speed:
            sizes = recipe.speed_batch_sizes, recipe.speed_context_lengths
            check_speed(self.pair.donor, self.pair.student, *sizes, recipe.decode_tokens, recipe.repetitions)
        self.documents: Documents = self._documents()

    def _documents(self) -> Documents:
        recipe, pair = self.recipe, self.pair
        if recipe.sampled_tokens is not None:
            sampled = (recipe.sampled_tokens, recipe.context_length, recipe.seed)
            return sampled_documents(pair.donor, pair.tokenizer, *sampled)
        return read_documents(recipe.text_source(), pair.tokenizer, recipe.context_length, recipe.max_tokens)

    def explanation(self) -> dict:
        recipe = self.recipe
        return {
            "text_tokens": self.documents.tokens,
            "text_bytes": self.documents.text_bytes,
            "recall_prompts_per_length": recipe.retrieval_samples,
            "tasks": list(recipe.tasks),
        }

    def measure(self) -> Measured:
        scores = self._score()
        recalled = self._recall()
        donor, student, bootstrap = self.pair.donor, self.pair.student, self.asked.bootstrap
        measure = partial(measure_speed, donor, student, decode_tokens=self.recipe.decode_tokens)
        speed, not_timed = timed(self.recipe, measure)
        size = self.documents.text_bytes
        return Measured(
            donor=MeasuredModel(losses=losses_of(scores.donor_loss_N, size), cache=cache_of(donor)),
            student=MeasuredModel(losses=losses_of(scores.student_loss_N, size), cache=cache_of(student)),
            report=replace(
                compared(scores, size, bootstrap),
                by_context=by_context(scores, self.recipe.context_length, bootstrap),
                retrieval=recalled,
                tasks=self._tasks(),
                speed=speed,
                capacity=tuple(
                    capacity(donor, student, parse_memory(memory), batch)
                    for memory in self.recipe.memory
                    for batch in self.recipe.speed_batch_sizes
                ),
                continuations=self._continuations(),
            ),
            text=self._text_facts(scores),
            notes=(*self._notes(scores), *self._not_recalled(recalled), *not_timed),
        )

    def _score(self) -> TokenScores:
        recipe, pair = self.recipe, self.pair
        with progress_bar("Text", self.documents.tokens, "tok", unit_scale=True) as bar:
            windows = self.documents.windows(recipe.context_length, recipe.stride)
            return score(pair.donor, pair.student, windows, recipe.batch_size, bar.update)

    def _recall(self) -> tuple[Retrieval, ...]:
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
                bootstrap=self.asked.bootstrap,
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
            bootstrap=self.asked.bootstrap,
        )

    def _continuations(self):
        recipe, pair = self.recipe, self.pair
        prompts = recipe.prompts or prompts_from(self.documents, pair.tokenizer, recipe.context_length)
        return continuations(pair, prompts, recipe.continuation_tokens, self.asked.converted)

    def _text_facts(self, scores: TokenScores) -> TextFacts:
        return text_facts(
            *(self.asked, self.recipe, self.documents),
            documents=len(self.documents),
            tokens=len(scores),
            windows=scores.windows,
            longest_context_tokens=self.pair.longest_context_tokens,
        )

    def _notes(self, scores: TokenScores) -> list[str]:
        recipe, longest = self.recipe, self.pair.longest_context_tokens
        notes = [*self.documents.notes, *notes_on_windows(scores.windows, recipe.context_length, longest)]
        if recipe.tasks:
            notes.append(f"lm_eval's own command for the student's tasks: {self._command_of_lm_eval()}")
        return notes

    def _command_of_lm_eval(self) -> str:
        recipe, pair = self.recipe, self.pair
        manifest = pair.opened_student.manifest
        return equivalent_command(
            *(pair.student_name, recipe.tasks, recipe.tasks_folder),
            dtype=str(pair.student.dtype).removeprefix("torch."),
            device=str(pair.student.device),
            limit=recipe.limit,
            num_fewshot=recipe.num_fewshot,
            batch_size=recipe.batch_size,
            seed=recipe.seed,
            trust_remote_code=manifest is not None and manifest.export == "bundle",
        )


def folder_of_tasks(recipe: EvaluationRecipe) -> Path | None:
    return Path(recipe.tasks_folder).expanduser() if recipe.tasks_folder else None


def resolve_sizes(recipe: EvaluationRecipe, pair: Pair) -> EvaluationRecipe:
    """The recipe with the sizes that it leaves open."""
    context = longest_context(recipe, pair.longest_context_tokens)
    if recipe.stride is not None and recipe.stride > context:
        raise Refusal(
            f"stride = {recipe.stride:,} is more than context_length = {context:,}. Use {context:,} or fewer."
        )
    most = context - recipe.decode_tokens if context > 2 * recipe.decode_tokens else max(1, context // 2)
    return replace(
        recipe,
        context_length=context,
        stride=recipe.stride or context,
        batch_size=batch_size_of(recipe, context),
        speed_context_lengths=recipe.speed_context_lengths or tuple(sorted({max(1, context // 4), most})),
    )
