"""The measurement of encoders: masked tokens where there is a head that guesses them, embeddings, and speed of reading."""

from dataclasses import replace
from functools import partial

from ...convert.model_kind import MASKED_LM
from ...progress_bar import progress_bar
from ...refusal import Refusal
from ..cost.encoding_speed import measure_encoding_speed
from ..cost.speed import FEWEST_REPETITIONS
from ..inputs.documents import Documents, read_documents
from ..quality.embeddings import compare_embeddings, embedded
from ..quality.masked_tokens import MASKED_FRACTION, encoder_windows, masked_windows, score_masked
from ..report import Embeddings, TextFacts
from .facts import compared, losses_of, notes_on_windows, text_facts
from .measured import (
    Asked,
    Measured,
    MeasuredModel,
    MeasuredParts,
    batch_size_of,
    longest_context,
    refuse_options,
    timed,
    trained_tokens,
)


class EncoderMeasurement:
    """Checked and explained, and not begun.

    Raises:
        Refusal: text, sizes or options that these models cannot be measured with.
    """

    def __init__(self, asked: Asked):
        self.asked, self.pair, pair = asked, asked.pair, asked.pair
        recipe = asked.recipe
        refuse_options(recipe, "an encoder", "sampled_tokens", "stride", "tasks", "prompts")
        limit = pair.longest_context_tokens
        context = longest_context(recipe, limit, trained_tokens(pair.tokenizer))
        lengths = recipe.speed_context_lengths or tuple(sorted({max(1, context // 4), context}))
        self.recipe = recipe = replace(
            recipe,
            context_length=context,
            batch_size=batch_size_of(recipe, context),
            speed_context_lengths=lengths,
        )
        self._check_speed(limit)
        self.documents: Documents = read_documents(
            recipe.text_source(), pair.tokenizer, context, recipe.max_tokens, for_encoder=True
        )
        self.windows = [tokens for tokens, _ in encoder_windows(self.documents, pair.tokenizer, context)]
        self.masked = (
            masked_windows(self.documents, pair.tokenizer, context, recipe.seed) if pair.kind == MASKED_LM else []
        )

    def _check_speed(self, limit: int | None) -> None:
        recipe = self.recipe
        if recipe.speed and recipe.repetitions < FEWEST_REPETITIONS:
            raise Refusal(
                f"speed: repetitions = {recipe.repetitions} are too few for a median. Use {FEWEST_REPETITIONS} or more."
            )
        if recipe.speed and limit is not None and max(recipe.speed_context_lengths) > limit:
            raise Refusal(
                f"speed: sequences of {max(recipe.speed_context_lengths):,} tokens are longer than the {limit:,} positions "
                f"of the models. Use fewer."
            )

    def explanation(self) -> dict:
        return {
            "text_tokens": self.documents.tokens,
            "text_bytes": self.documents.text_bytes,
            "masked_tokens": sum(len(window.masked) for window in self.masked),
            "recall_prompts_per_length": 0,
            "tasks": [],
        }

    def measure(self) -> Measured:
        donor = student = MeasuredModel()
        report = MeasuredParts()
        if self.masked:
            scores = self._score()
            losses = (scores.donor_loss_N, scores.student_loss_N)
            donor, student = (MeasuredModel(losses=losses_of(losses_N, None)) for losses_N in losses)
            report = compared(scores, None, self.asked.bootstrap)
        speed, not_timed = timed(self.recipe, partial(measure_encoding_speed, self.pair.donor, self.pair.student))
        return Measured(
            donor=donor,
            student=student,
            report=replace(report, embeddings=self._embeddings(), encoding_speed=speed),
            text=self._text_facts(),
            notes=(*self._notes(), *not_timed),
        )

    def _score(self):
        pair, recipe = self.pair, self.recipe
        with progress_bar("Masked", sum(map(len, self.windows)), "tok", unit_scale=True) as bar:
            mask_token = pair.tokenizer.mask_token_id
            return score_masked(pair.donor, pair.student, self.masked, mask_token, recipe.batch_size, bar.update)

    def _embeddings(self) -> Embeddings:
        pair, recipe = self.pair, self.recipe
        with progress_bar("Embeddings", 2 * sum(map(len, self.windows)), "tok", unit_scale=True) as bar:
            both = [
                embedded(model, self.windows, recipe.batch_size, bar.update) for model in (pair.donor, pair.student)
            ]
        return compare_embeddings(*both, self.asked.bootstrap)

    def _text_facts(self) -> TextFacts:
        masked = sum(len(window.masked) for window in self.masked)
        return text_facts(
            *(self.asked, self.recipe, self.documents),
            documents=len(self.documents),
            tokens=masked or self.documents.tokens,
            windows=len(self.windows),
            longest_context_tokens=self.pair.longest_context_tokens,
            masked_fraction=MASKED_FRACTION if masked else None,
        )

    def _notes(self) -> list[str]:
        longest = self.pair.longest_context_tokens
        notes = [
            *self.documents.notes,
            *notes_on_windows(len(self.windows), self.recipe.context_length, longest),
        ]
        name = type(self.pair.donor).__name__
        if not self.masked and self.pair.donor.base_model is not self.pair.donor:
            notes.append(f"What {name} makes of its embeddings was not evaluated, only the embeddings.")
        return notes
