"""The measurement of encoders: masked tokens where there is a head that guesses them, embeddings, and speed of reading."""

from dataclasses import replace

from ...convert.model_kind import MASKED_LM
from ...progress_bar import progress_bar
from ...refusal import Refusal
from ..cost.encoding_speed import measure_encoding_speed
from ..cost.speed import FEWEST_REPETITIONS
from ..inputs.documents import Documents, read_documents
from ..quality.bootstrap import FEWEST_GROUPS
from ..quality.embeddings import compare_embeddings, embedded
from ..quality.masked_tokens import MASKED_FRACTION, encoder_windows, masked_windows, score_masked
from ..report import Embeddings, TextFacts
from .facts import NO_DIFFERENCES, differences, loss_facts
from .measured import TOKENS_AT_ONCE, Asked, Measured, longest_context, refuse_options, trained_tokens


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
            batch_size=recipe.batch_size or max(1, min(32, TOKENS_AT_ONCE // context)),
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
        donor, student, report = {}, {}, {}
        if self.masked:
            scores = self._score()
            donor, student = (loss_facts(losses_N, None) for losses_N in (scores.donor_loss_N, scores.student_loss_N))
            report = {
                "kl_nats_per_token": float(scores.kl_N.mean()),
                "top1_agreement_fraction": float(scores.agrees_N.mean()),
                "differences": differences(scores, None, self.asked.bootstrap),
            }
        speed, not_timed = self._speed()
        report = {"kl_nats_per_token": None, "top1_agreement_fraction": None, "differences": NO_DIFFERENCES} | report
        return Measured(
            donor=donor,
            student=student,
            report=report | {"embeddings": self._embeddings(), "encoding_speed": speed},
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

    def _speed(self):
        recipe = self.recipe
        if not recipe.speed:
            return (), ()
        points = len(recipe.speed_batch_sizes) * len(recipe.speed_context_lengths)
        with progress_bar("Speed", points, "size") as bar:
            return measure_encoding_speed(
                *(self.pair.donor, self.pair.student),
                batch_sizes=recipe.speed_batch_sizes,
                lengths=recipe.speed_context_lengths,
                repetitions=recipe.repetitions,
                seed=recipe.seed,
                progress=lambda point: bar.update(),
            )

    def _text_facts(self) -> TextFacts:
        documents, recipe = self.documents, self.recipe
        masked = sum(len(window.masked) for window in self.masked)
        return TextFacts(
            sources=recipe.text or (recipe.dataset_name,),
            fingerprint=documents.fingerprint,
            documents=len(documents),
            tokens=masked or documents.tokens,
            text_bytes=documents.text_bytes,
            windows=len(self.windows),
            context_tokens=recipe.context_length,
            stride_tokens=None,
            longest_context_tokens=self.pair.longest_context_tokens,
            masked_fraction=MASKED_FRACTION if masked else None,
        )

    def _notes(self) -> list[str]:
        notes, limit = list(self.documents.notes), self.pair.longest_context_tokens
        if len(self.windows) < FEWEST_GROUPS:
            notes.append(
                f"The text has {len(self.windows)} windows; intervals need {FEWEST_GROUPS}. Give more text, or a shorter "
                f"context_length."
            )
        if limit is not None and limit > self.recipe.context_length:
            notes.append(
                f"The models take {limit:,} tokens; what happens beyond {self.recipe.context_length:,} was not measured."
            )
        name = type(self.pair.donor).__name__
        if not self.masked and self.pair.donor.base_model is not self.pair.donor:
            notes.append(f"What {name} makes of its embeddings was not evaluated, only the embeddings.")
        return notes
