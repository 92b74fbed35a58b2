"""The tables of a report, each described once: what its columns or rows say, and their names on page and card.

Where the places differ in order, a column stands twice, once for each.
"""

from collections.abc import Callable
from typing import Any

from .forms import (
    BYTES,
    CHANGE,
    CONTEXTS,
    COUNT,
    FITS,
    NUMBER,
    PRODUCT,
    SCORE,
    SECONDS,
    SHARE,
    SOURCES,
    SPEEDUP,
    TEXT,
    THREE_DIGITS,
    TIMES,
    TWO_OF_THREE_DIGITS,
    Difference,
)
from .table import CODE, NAME, Column, Table


def _less(donor: str, student: str) -> Callable[[Any], Difference]:
    """Of a row, the student's field less the donor's."""
    return lambda row: Difference(getattr(row, student) - getattr(row, donor), row.difference)


LOSSES = (
    Column("donor_loss_nats_per_token", NUMBER, page="donor", card="donor's loss"),
    Column("student_loss_nats_per_token", NUMBER, page="student", card="student's loss"),
    Column("kl_nats_per_token", NUMBER, card="KL"),
    Column(
        _less("donor_loss_nats_per_token", "student_loss_nats_per_token"),
        CHANGE,
        page="difference in nats per token",
        card="difference of the losses",
    ),
    Column("kl_nats_per_token", THREE_DIGITS, page="KL"),
)

BY_CONTEXT = Table(
    rows="by_context",
    caption="Loss by tokens of context before the predicted token",
    title="by tokens of context",
    columns=(
        Column(("first_context_tokens", "last_context_tokens"), CONTEXTS, page="context, tokens", card="tokens before"),
        Column("tokens", COUNT, page="scored tokens", card="tokens scored"),
        *LOSSES,
    ),
)

BY_SOURCE_LENGTH = Table(
    rows="by_source_length",
    caption="Loss of the targets by tokens of their source",
    title="by tokens of the source",
    columns=(
        Column(("first_source_tokens", "last_source_tokens"), SOURCES, both="source, tokens"),
        Column("pairs", COUNT, both="pairs"),
        Column("tokens", COUNT, page="target tokens", card="tokens scored"),
        *LOSSES,
    ),
)

ROUGE = Table(
    rows="rouge",
    caption="Mean F1, as rouge-score computes it",
    title="ROUGE of what they write",
    columns=(
        Column("metric", TEXT, page="F1", card="mean F1", outside=CODE),
        Column("pairs", COUNT, both="pairs"),
        Column("num_beams", TEXT, card="beams"),
        Column("most_tokens", COUNT, card="most tokens"),
        Column("donor_fraction", NUMBER, both="donor"),
        Column("student_fraction", NUMBER, both="student"),
        Column(_less("donor_fraction", "student_fraction"), CHANGE, both="difference"),
    ),
)

RETRIEVAL = Table(
    rows="retrieval",
    caption="Answers by greedy decoding, and the loss of the right answer",
    title="recall",
    columns=(
        Column("task", TEXT, both="task", outside=NAME),
        Column("context_tokens", COUNT, page="context, tokens", card="context"),
        Column("samples", TEXT, both="samples"),
        Column("donor_accuracy_fraction", SHARE, both="donor right"),
        Column("student_accuracy_fraction", SHARE, both="student right"),
        Column(
            ("donor_answer_loss_nats_per_token", "student_answer_loss_nats_per_token"),
            TWO_OF_THREE_DIGITS,
            page="answer loss of donor, student",
        ),
        Column("donor_answer_loss_nats_per_token", NUMBER, card="donor's loss of the answer"),
        Column("student_answer_loss_nats_per_token", NUMBER, card="student's"),
        Column(lambda row: Difference(None, row.difference), CHANGE, page="its difference", card="difference"),
    ),
)

TASKS = Table(
    rows="tasks",
    caption="Scores ± standard error, as lm_eval computes them",
    title="tasks, ± standard error",
    columns=(
        Column(lambda row: f"{row.task} (v{row.version})", TEXT, page="task"),
        Column(
            lambda row: f"{row.metric} ({'higher' if row.higher_is_better else 'lower'} is better)", TEXT, page="metric"
        ),
        Column("task", TEXT, card="task", outside=CODE),
        Column("metric", TEXT, card="metric", outside=CODE),
        Column("version", TEXT, card="version", outside=CODE),
        Column("num_fewshot", TEXT, both="shots"),
        Column("samples", COUNT, both="n"),
        Column(lambda row: "higher" if row.higher_is_better else "lower", TEXT, card="better"),
        Column(("donor", "donor_stderr"), SCORE, page="donor", card="donor (stderr)"),
        Column(("student", "student_stderr"), SCORE, page="student", card="student (stderr)"),
        Column(_less("donor", "student"), CHANGE, both="difference"),
    ),
)

SPEED = Table(
    rows="speed",
    caption="Tokens per second of the whole batch, and seconds to the first token",
    title="speed",
    columns=(
        Column("batch_size", TEXT, page="batch"),
        Column("context_tokens", COUNT, page="{words.context}"),
        Column(("batch_size", "context_tokens"), PRODUCT, card="batch x {words.context}"),
        Column("repetitions", TEXT, card="runs"),
        Column("donor_decode_tokens_per_second", NUMBER, page="donor tokens/s", card="donor, tokens/s"),
        Column("student_decode_tokens_per_second", NUMBER, page="student tokens/s", card="student, tokens/s"),
        Column(
            ("decode_speedup", "decode_speedup_low", "decode_speedup_high"),
            SPEEDUP,
            page="faster by",
            card="decoding (range)",
        ),
        Column("allowed_decode_speedup", TIMES, page="allowed", card="bytes would allow"),
        Column(
            ("donor_first_token_seconds", "student_first_token_seconds"),
            TWO_OF_THREE_DIGITS,
            page="first token, seconds",
        ),
        Column("donor_first_token_seconds", SECONDS, card="donor's first token"),
        Column("student_first_token_seconds", SECONDS, card="student's first token"),
        Column("first_token_speedup", TIMES, card="first token"),
    ),
)

ENCODING_SPEED = Table(
    rows="encoding_speed",
    caption="Sequences per second",
    title="speed of reading",
    columns=(
        Column("batch_size", TEXT, page="batch"),
        Column("length_tokens", COUNT, page="length, tokens"),
        Column(("batch_size", "length_tokens"), PRODUCT, card="batch x length"),
        Column("repetitions", TEXT, card="runs"),
        Column("donor_sequences_per_second", NUMBER, page="donor sequences/s", card="donor, sequences/s"),
        Column("student_sequences_per_second", NUMBER, page="student sequences/s", card="student, sequences/s"),
        Column(("speedup", "speedup_low", "speedup_high"), SPEEDUP, page="faster by", card="reading (range)"),
    ),
)

CAPACITY = Table(
    rows="capacity",
    caption="{words.context} that fits beside the weights, for each sequence of the batch",
    title="tokens that fit beside the weights",
    columns=(
        Column("memory_bytes", BYTES, both="memory"),
        Column("batch_size", TEXT, both="batch"),
        Column(
            "donor_context_tokens",
            FITS,
            both="donor's {words.context}, tokens",
        ),
        Column(
            "student_context_tokens",
            FITS,
            both="student's {words.context}, tokens",
        ),
    ),
)

TABLES = (BY_CONTEXT, BY_SOURCE_LENGTH, ROUGE, RETRIEVAL, TASKS, SPEED, ENCODING_SPEED, CAPACITY)
