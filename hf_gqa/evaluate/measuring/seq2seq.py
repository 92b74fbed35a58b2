"""The measurement of encoder-decoders: loss of targets by source length, ROUGE of what is written, cache, speed."""

from dataclasses import replace
from functools import partial

from transformers import PreTrainedModel

from ...convert.model_kind import SEQ2SEQ
from ...convert.student import open_student
from ...progress_bar import progress_bar
from ...text.pairs import open_pairs
from ..cost.memory import capacity, parse_memory
from ..cost.seq2seq_cache import cache_bytes_of_a_token, measured_cache_bytes_of_a_token, seq2seq_heads
from ..cost.seq2seq_memory import source_that_fits
from ..cost.seq2seq_speed import SEQ2SEQ_DECODING, check_seq2seq_speed, position_limits
from ..cost.speed import measure_speed
from ..inputs.padding import evenly_spread
from ..inputs.seq2seq_pairs import Seq2SeqText, read_seq2seq_text
from ..quality.bootstrap import FEWEST_GROUPS
from ..quality.by_length import by_source_length
from ..quality.rouge import check_rouge, rouge, samples, sources_of, without_words, written
from ..quality.target_tokens import score_pairs
from ..quality.token_scores import TokenScores
from ..report import Capacity, Continuation, Rouge, TextFacts
from .facts import compared, losses_of, text_facts
from .measured import (
    Asked,
    CacheBytes,
    LayerHeads,
    Losses,
    Measured,
    MeasuredModel,
    batch_size_of,
    longest_context,
    refuse_options,
    timed,
    trained_tokens,
)


class Seq2SeqMeasurement:
    """Checked and explained, and not begun.

    Raises:
        Refusal: text, sizes or options that these models cannot be measured with.
    """

    def __init__(self, asked: Asked):
        self.asked, self.pair, pair = asked, asked.pair, asked.pair
        recipe = asked.recipe
        refuse_options(recipe, "an encoder-decoder", "sampled_tokens", "stride", "tasks", "prompts", "text_column")
        if recipe.rouge_pairs != 0:
            check_rouge()
        limits = [position_limits(model.config) for model in (pair.donor, pair.student)]
        self.longest, targets = (min(filter(None, both), default=None) for both in zip(*limits, strict=True))
        context = longest_context(recipe, self.longest, trained_tokens(pair.tokenizer))
        self.recipe = recipe = replace(
            recipe,
            context_length=context,
            batch_size=batch_size_of(recipe, context),
            speed_context_lengths=recipe.speed_context_lengths or tuple(sorted({max(1, context // 4), context})),
            generation_tokens=min(recipe.generation_tokens, targets - 1) if targets else recipe.generation_tokens,
        )
        if recipe.speed:
            sizes = recipe.speed_batch_sizes, recipe.speed_context_lengths
            check_seq2seq_speed(pair.donor, pair.student, *sizes, recipe.decode_tokens, recipe.repetitions)
        pairs = open_pairs(recipe.text_source(), recipe.source_column, recipe.target_column)
        self.text: Seq2SeqText = read_seq2seq_text(pairs, pair.tokenizer, context, targets, recipe.max_tokens)

    def explanation(self) -> dict:
        return {
            "text_tokens": self.text.tokens,
            "text_bytes": self.text.text_bytes,
            "pairs": len(self.text.pairs),
            "rouge_pairs": len(self._to_write()),
            "recall_prompts_per_length": 0,
            "tasks": [],
        }

    def measure(self) -> Measured:
        recipe, pair = self.recipe, self.pair
        with progress_bar("Targets", self.text.tokens, "tok", unit_scale=True) as bar:
            scores = score_pairs(pair.donor, pair.student, self.text.rows, recipe.batch_size, bar.update)
        rouges, written_samples = self._written()
        measure = partial(
            measure_speed, pair.donor, pair.student, way=SEQ2SEQ_DECODING, decode_tokens=recipe.decode_tokens
        )
        speed, not_timed = timed(recipe, measure)
        size, bootstrap = self.text.text_bytes, self.asked.bootstrap
        return Measured(
            donor=measured_model(pair.donor, losses_of(scores.donor_loss_N, size)),
            student=measured_model(pair.student, losses_of(scores.student_loss_N, size)),
            report=replace(
                compared(scores, size, bootstrap),
                by_source_length=by_source_length(scores, bootstrap),
                rouge=rouges,
                speed=speed,
                capacity=self._capacity(),
                continuations=written_samples,
            ),
            text=self._text_facts(scores),
            notes=(*self._notes(scores), *not_timed),
        )

    def _to_write(self) -> list[int]:
        return evenly_spread(len(self.text.pairs), self.recipe.rouge_pairs)

    def _written(self) -> tuple[tuple[Rouge, ...], tuple[Continuation, ...]]:
        chosen, recipe, pair = self._to_write(), self.recipe, self.pair
        if not chosen:
            return (), ()
        pairs = [self.text.pairs[number] for number in chosen]
        models = [pair.donor, pair.student]
        if self.asked.converted is not None:
            converted = open_student(self.asked.converted, pair.student.dtype, SEQ2SEQ).model
            models.append(converted.eval().to(pair.student.device))
        options = {"num_beams": recipe.num_beams, "most_tokens": recipe.generation_tokens}
        with progress_bar("Writing", len(models) * len(chosen), "pair") as bar:
            sources = sources_of(self.text, chosen)
            texts = [
                written(model, pair.tokenizer, sources, batch_size=recipe.batch_size, seen=bar.update, **options)
                for model in models
            ]
        scored = rouge(pairs, *texts[:2], **options, bootstrap=self.asked.bootstrap)
        return scored, samples(pairs, *texts[:2], texts[2] if len(texts) > 2 else ())

    def _capacity(self) -> tuple[Capacity, ...]:
        recipe = self.recipe
        longest = partial(source_that_fits, target_tokens=recipe.generation_tokens)
        return tuple(
            capacity(self.pair.donor, self.pair.student, parse_memory(memory), batch, longest)
            for memory in recipe.memory
            for batch in recipe.speed_batch_sizes
        )

    def _text_facts(self, scores: TokenScores) -> TextFacts:
        return text_facts(
            *(self.asked, self.recipe, self.text),
            documents=len(self.text.pairs),
            tokens=len(scores),
            windows=scores.windows,
            longest_context_tokens=self.longest,
            targets=len(self.text.rows),
            truncated_sources=self.text.truncated_sources,
        )

    def _notes(self, scores: TokenScores) -> list[str]:
        notes = list(self.text.notes)
        if scores.windows < FEWEST_GROUPS:
            notes.append(f"The text has {scores.windows} pairs; intervals need {FEWEST_GROUPS}. Give more text.")
        chosen = len(self._to_write())
        unread = without_words(self.text.pairs) if chosen else 0
        if unread:
            notes.append(
                f"ROUGE reads Latin letters and digits only: {unread:,} of {len(self.text.rows):,} references hold none and "
                f"count as 0."
            )
        if 0 < chosen < len(self.text.pairs):
            notes.append(f"ROUGE is of {chosen:,} of the {len(self.text.pairs):,} pairs, evenly spread (rouge_pairs).")
        return notes


def measured_model(model: PreTrainedModel, losses: Losses) -> MeasuredModel:
    """An encoder-decoder with its heads and its caches."""
    heads = seq2seq_heads(model.config)
    own, cross = cache_bytes_of_a_token(model.config, model.dtype)
    own_measured, cross_measured = measured_cache_bytes_of_a_token(model)
    return MeasuredModel(
        losses=losses,
        cache=CacheBytes(
            cache_bytes_per_token_computed=own,
            cache_bytes_per_token_measured=own_measured,
            cache_bytes_per_token_beyond_window=own,
            cache_bytes_per_source_token_computed=cross,
            cache_bytes_per_source_token_measured=cross_measured,
        ),
        heads=LayerHeads(
            num_hidden_layers=len(heads.decoder),
            num_key_value_heads=heads.decoder,
            cross_num_key_value_heads=heads.cross,
            encoder_num_key_value_heads=heads.encoder,
        ),
    )
