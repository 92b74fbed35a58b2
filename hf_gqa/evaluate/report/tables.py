"""The tables of a report as text, for the page and for the terminal."""

from collections.abc import Callable
from typing import NamedTuple

from ...human_units import heads_in_words, human_bytes, human_count, number, percent, times
from .values import ContextLoss, Interval, ModelFacts, Report
from .verdict import confidence
from .words import words_of


class Rows(NamedTuple):
    """Cells are plain text from outside and from us: whoever shows them escapes them."""

    header: tuple[str, ...]
    rows: list[tuple[str, ...]]


def change(value: float) -> str:
    return "0" if value == 0 else f"{value:+.3g}"


def with_interval(interval: Interval | None, said: Callable[[float], str] = change) -> str:
    if interval is None:
        return "no interval"
    return f"{said(interval.value)} ({said(interval.low)} to {said(interval.high)})"


def main_table(report: Report) -> Rows:
    """Donor, student, and their difference with its interval."""
    header = ("", "donor", "student", f"difference ({confidence(report)} interval)")
    return Rows(header, [*_quality_rows(report), *_cost_rows(report.donor, report.student)])


def _quality_rows(report: Report) -> list[tuple[str, ...]]:
    return [*_loss_rows(report), *_embedding_rows(report)]


def _loss_rows(report: Report) -> list[tuple[str, ...]]:
    donor, student, differences = report.donor, report.student, report.differences
    if donor.loss_nats_per_token is None:
        return []
    words = words_of(report)
    loss, bits = differences.loss_nats_per_token, differences.bits_per_byte
    kl, top1 = differences.kl_nats_per_token, differences.top1_agreement_fraction
    rows = [
        (
            words.loss,
            number(donor.loss_nats_per_token),
            number(student.loss_nats_per_token),
            _measured(student.loss_nats_per_token - donor.loss_nats_per_token, loss, change),
        ),
        (
            words.perplexity,
            number(donor.perplexity),
            number(student.perplexity),
            _measured(student.perplexity / donor.perplexity, differences.perplexity_ratio, lambda x: f"{x:.4g}x"),
        ),
        ("KL to the donor, nats per token", "", "", _measured(report.kl_nats_per_token, kl, lambda x: f"{x:.3g}")),
        ("same likeliest token", "", "", _measured(report.top1_agreement_fraction, top1, percent)),
    ]
    if donor.bits_per_byte is not None:
        difference = _measured(student.bits_per_byte - donor.bits_per_byte, bits, change)
        rows.insert(2, ("bits per byte", number(donor.bits_per_byte), number(student.bits_per_byte), difference))
    return rows


def _embedding_rows(report: Report) -> list[tuple[str, ...]]:
    found = report.embeddings
    if found is None:
        return []
    rows = [("cosine of the embeddings", "", "", _measured(found.mean_cosine, found.cosine, number))]
    if found.spearman is not None:
        rows.append(("rank correlation of similarities", "", "", number(found.spearman)))
    return rows


def _measured(value: float, interval: Interval | None, said: Callable[[float], str]) -> str:
    return f"{said(value)} (no interval)" if interval is None else with_interval(interval, said)


def _cost_rows(donor: ModelFacts, student: ModelFacts) -> list[tuple[str, ...]]:
    kinds = [("KV heads", "num_key_value_heads")]
    if donor.cross_num_key_value_heads:
        kinds = [("KV heads of the decoder", "num_key_value_heads")]
        kinds += [
            ("KV heads across", "cross_num_key_value_heads"),
            ("KV heads of the encoder", "encoder_num_key_value_heads"),
        ]
    rows = [(name, *(heads_in_words(getattr(model, field)) for model in (donor, student)), "") for name, field in kinds]
    sizes = [
        ("cache per token, computed", "cache_bytes_per_token_computed", human_bytes),
        ("cache per token, measured", "cache_bytes_per_token_measured", human_bytes),
        ("cache per token beyond the window", "cache_bytes_per_token_beyond_window", human_bytes),
        ("cache per source token, computed", "cache_bytes_per_source_token_computed", human_bytes),
        ("cache per source token, measured", "cache_bytes_per_source_token_measured", human_bytes),
        ("parameters", "parameters", human_count),
        ("weights", "weight_bytes", human_bytes),
        ("peak memory", "peak_memory_bytes", human_bytes),
    ]
    windowed = any(m.cache_bytes_per_token_beyond_window != m.cache_bytes_per_token_computed for m in (donor, student))
    for name, field, said in sizes:
        before, after = getattr(donor, field), getattr(student, field)
        if (field != "cache_bytes_per_token_beyond_window" or windowed) and None not in (before, after):
            rows.append((name, said(before), said(after), _smaller(before, after)))
    return rows


def _smaller(before: float, after: float) -> str:
    if before == after:
        return "same"
    if not before or not after:
        return ""
    if after < before:
        return f"{times(before / after)} smaller" if before / after >= 1.1 else f"{percent(1 - after / before)} smaller"
    return f"{times(after / before)} larger" if after / before >= 1.1 else f"{percent(after / before - 1)} larger"


def context_range(row: ContextLoss) -> str:
    first, last = row.first_context_tokens, row.last_context_tokens
    return f"{first}" if first == last else f"{first}-{last}"


def by_context_table(report: Report) -> Rows:
    header = ("context, tokens", "scored tokens", "donor", "student", "difference in nats per token", "KL")
    rows = [
        (
            context_range(row),
            f"{row.tokens:,}",
            number(row.donor_loss_nats_per_token),
            number(row.student_loss_nats_per_token),
            _measured(row.student_loss_nats_per_token - row.donor_loss_nats_per_token, row.difference, change),
            f"{row.kl_nats_per_token:.3g}",
        )
        for row in report.by_context
    ]
    return Rows(header, rows)


def by_source_length_table(report: Report) -> Rows:
    header = ("source, tokens", "pairs", "target tokens", "donor", "student", "difference in nats per token", "KL")
    rows = [
        (
            f"{row.first_source_tokens}-{row.last_source_tokens}",
            f"{row.pairs:,}",
            f"{row.tokens:,}",
            number(row.donor_loss_nats_per_token),
            number(row.student_loss_nats_per_token),
            _measured(row.student_loss_nats_per_token - row.donor_loss_nats_per_token, row.difference, change),
            f"{row.kl_nats_per_token:.3g}",
        )
        for row in report.by_source_length
    ]
    return Rows(header, rows)


def rouge_table(report: Report) -> Rows:
    rows = [
        (
            row.metric,
            f"{row.pairs:,}",
            number(row.donor_fraction),
            number(row.student_fraction),
            _measured(row.student_fraction - row.donor_fraction, row.difference, change),
        )
        for row in report.rouge
    ]
    return Rows(("F1", "pairs", "donor", "student", "difference"), rows)


def encoding_speed_table(report: Report) -> Rows:
    header = ("batch", "length, tokens", "donor sequences/s", "student sequences/s", "faster by")
    rows = [
        (
            f"{row.batch_size}",
            f"{row.length_tokens:,}",
            number(row.donor_sequences_per_second),
            number(row.student_sequences_per_second),
            f"{times(row.speedup)} ({times(row.speedup_low)} to {times(row.speedup_high)})",
        )
        for row in report.encoding_speed
    ]
    return Rows(header, rows)


def retrieval_table(report: Report) -> Rows:
    header = ("task", "context, tokens", "samples", "donor right", "student right", "answer loss of donor, student")
    rows = [
        (
            row.task,
            f"{row.context_tokens:,}",
            f"{row.samples}",
            percent(row.donor_accuracy_fraction),
            percent(row.student_accuracy_fraction),
            f"{row.donor_answer_loss_nats_per_token:.3g}, {row.student_answer_loss_nats_per_token:.3g}",
            with_interval(row.difference),
        )
        for row in report.retrieval
    ]
    return Rows((*header, "its difference"), rows)


def tasks_table(report: Report) -> Rows:
    """Scores as lm_eval gives them, each with its standard error."""
    header = ("task", "metric", "shots", "n", "donor", "student", "difference")

    def score(value: float, stderr: float | None) -> str:
        return number(value) if stderr is None else f"{number(value)} ± {stderr:.2g}"

    rows = [
        (
            f"{row.task} (v{row.version})",
            f"{row.metric} ({'higher' if row.higher_is_better else 'lower'} is better)",
            f"{row.num_fewshot}",
            f"{row.samples:,}",
            score(row.donor, row.donor_stderr),
            score(row.student, row.student_stderr),
            _measured(row.student - row.donor, row.difference, change),
        )
        for row in report.tasks
    ]
    return Rows(header, rows)


def speed_table(report: Report) -> Rows:
    header = (
        "batch",
        words_of(report).context,
        "donor tokens/s",
        "student tokens/s",
        "faster by",
        "allowed",
        "first token, seconds",
    )
    rows = [
        (
            f"{row.batch_size}",
            f"{row.context_tokens:,}",
            number(row.donor_decode_tokens_per_second),
            number(row.student_decode_tokens_per_second),
            f"{times(row.decode_speedup)} ({times(row.decode_speedup_low)} to {times(row.decode_speedup_high)})",
            times(row.allowed_decode_speedup),
            f"{row.donor_first_token_seconds:.3g}, {row.student_first_token_seconds:.3g}",
        )
        for row in report.speed
    ]
    return Rows(header, rows)


def capacity_table(report: Report) -> Rows:
    def fits(tokens: int | None) -> str:
        return "unbounded" if tokens is None else f"{tokens:,}" if tokens else "none"

    rows = [
        (
            human_bytes(row.memory_bytes),
            f"{row.batch_size}",
            fits(row.donor_context_tokens),
            fits(row.student_context_tokens),
        )
        for row in report.capacity
    ]
    what = words_of(report).context
    return Rows(("memory", "batch", f"donor's {what}, tokens", f"student's {what}, tokens"), rows)
