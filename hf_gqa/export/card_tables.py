"""The tables of a card: the numbers of a report as Markdown, each formatted in one place."""

from ..evaluate.report import Interval, ModelFacts, Report
from ..evaluate.report.verdict import confidence
from ..evaluate.report.words import words_of
from ..human_units import heads_in_words, human_bytes, number, percent
from .markdown import code, plain, table


NOTHING = "-"


def tables(report: Report) -> dict[str, str]:
    """Name of the section -> its table; sections of which nothing was measured have none."""
    rows = {
        "quality": _quality(report),
        "by_context": _by_context(report),
        "by_source_length": _by_source_length(report),
        "rouge": _rouge(report),
        "cache": _cache(report),
        "speed": _speed(report),
        "encoding_speed": _encoding_speed(report),
        "capacity": _capacity(report),
        "retrieval": _retrieval(report),
        "tasks": _tasks(report),
    }
    return {name: table(*found) for name, found in rows.items() if found[1]}


def _interval(interval: Interval | None, said=number, sign: bool = True) -> str:
    if interval is None:
        return NOTHING
    plus = "+" if sign and interval.value > 0 else ""
    return f"{plus}{said(interval.value)} ({said(interval.low)} to {said(interval.high)})"


def _quality(report: Report):
    donor, student, difference = report.donor, report.student, report.differences
    header = ["", "donor", "student", f"student against donor ({confidence(report)} interval)"]
    ratio, words = (
        _interval(difference.perplexity_ratio, lambda value: f"{number(value)}x", sign=False),
        words_of(report),
    )
    rows = []
    if donor.loss_nats_per_token is not None:
        kl = _interval(difference.kl_nats_per_token, sign=False)
        agreement = _interval(difference.top1_agreement_fraction, percent, sign=False)
        rows = [
            [words.perplexity, number(donor.perplexity), number(student.perplexity), ratio],
            _pair(words.loss, donor, student, "loss_nats_per_token", difference.loss_nats_per_token),
            ["KL from the donor, nats per token", NOTHING, number(report.kl_nats_per_token), kl],
            [words.same_token, NOTHING, percent(report.top1_agreement_fraction), agreement],
        ]
    if donor.bits_per_byte is not None:
        rows.insert(2, _pair("bits per byte", donor, student, "bits_per_byte", difference.bits_per_byte))
    return header, rows + _embeddings(report)


def _embeddings(report: Report) -> list[list[str]]:
    found = report.embeddings
    if found is None:
        return []
    cosine = _interval(found.cosine, sign=False)
    rows = [["cosine of its embeddings to the donor's", NOTHING, number(found.mean_cosine), cosine]]
    if found.spearman is not None:
        rows.append(["rank correlation of similarities", NOTHING, number(found.spearman), NOTHING])
    return rows


def _pair(label: str, donor: ModelFacts, student: ModelFacts, name: str, difference: Interval | None) -> list[str]:
    return [label, number(getattr(donor, name)), number(getattr(student, name)), _interval(difference)]


def _by_context(report: Report):
    header = ["tokens before", "tokens scored", "donor's loss", "student's loss", "KL", "difference of the losses"]
    rows = [
        [
            f"{row.first_context_tokens:,} to {row.last_context_tokens:,}",
            number(row.tokens),
            number(row.donor_loss_nats_per_token),
            number(row.student_loss_nats_per_token),
            number(row.kl_nats_per_token),
            _interval(row.difference),
        ]
        for row in report.by_context
    ]
    return header, rows


def _by_source_length(report: Report):
    header = [
        "source, tokens",
        "pairs",
        "tokens scored",
        "donor's loss",
        "student's loss",
        "KL",
        "difference of the losses",
    ]
    rows = [
        [
            f"{row.first_source_tokens:,} to {row.last_source_tokens:,}",
            f"{row.pairs:,}",
            number(row.tokens),
            number(row.donor_loss_nats_per_token),
            number(row.student_loss_nats_per_token),
            number(row.kl_nats_per_token),
            _interval(row.difference),
        ]
        for row in report.by_source_length
    ]
    return header, rows


def _rouge(report: Report):
    rows = [
        [
            code(row.metric),
            f"{row.pairs:,}",
            str(row.num_beams),
            f"{row.most_tokens:,}",
            number(row.donor_fraction),
            number(row.student_fraction),
            _interval(row.difference),
        ]
        for row in report.rouge
    ]
    return ["mean F1", "pairs", "beams", "most tokens", "donor", "student", "difference"], rows


def _encoding_speed(report: Report):
    header = ["batch x length", "runs", "donor, sequences/s", "student, sequences/s", "reading (range)"]
    rows = [
        [
            f"{row.batch_size:,} x {row.length_tokens:,}",
            str(row.repetitions),
            number(row.donor_sequences_per_second),
            number(row.student_sequences_per_second),
            f"{number(row.speedup)}x ({number(row.speedup_low)} to {number(row.speedup_high)})",
        ]
        for row in report.encoding_speed
    ]
    return header, rows


def _cache(report: Report):
    facts = {
        "KV heads of a layer": lambda model: heads_in_words(model.num_key_value_heads),
        "KV heads of a layer to the encoder": lambda model: heads_in_words(model.cross_num_key_value_heads),
        "KV heads of an encoder layer": lambda model: heads_in_words(model.encoder_num_key_value_heads),
        "query heads of a layer": lambda model: str(model.num_attention_heads),
        "cache per token, computed": lambda model: human_bytes(model.cache_bytes_per_token_computed),
        "cache per token, measured": lambda model: human_bytes(model.cache_bytes_per_token_measured),
        "cache per token beyond the window": lambda model: human_bytes(model.cache_bytes_per_token_beyond_window),
        "cache per source token, computed": lambda model: human_bytes(model.cache_bytes_per_source_token_computed),
        "cache per source token, measured": lambda model: human_bytes(model.cache_bytes_per_source_token_measured),
        "parameters": lambda model: f"{model.parameters:,}",
        "weights": lambda model: human_bytes(model.weight_bytes),
        "peak memory": lambda model: human_bytes(model.peak_memory_bytes) if model.peak_memory_bytes else NOTHING,
    }
    windows = any(
        model.cache_bytes_per_token_beyond_window != model.cache_bytes_per_token_computed
        for model in (report.donor, report.student)
    )
    absent = set() if windows else {"cache per token beyond the window"}
    if not report.donor.cross_num_key_value_heads:
        absent |= {name for name in facts if "encoder" in name or "source" in name}
    if report.donor.cache_bytes_per_token_computed is None:
        absent |= {name for name in facts if "cache" in name}
    return ["", "donor", "student"], [
        [label, said(report.donor), said(report.student)] for label, said in facts.items() if label not in absent
    ]


def _speed(report: Report):
    header = [f"batch x {words_of(report).context}", "runs", "donor, tokens/s", "student, tokens/s", "decoding (range)"]
    header += ["bytes would allow", "donor's first token", "student's first token", "first token"]
    rows = [
        [
            f"{row.batch_size:,} x {row.context_tokens:,}",
            str(row.repetitions),
            number(row.donor_decode_tokens_per_second),
            number(row.student_decode_tokens_per_second),
            f"{number(row.decode_speedup)}x ({number(row.decode_speedup_low)} to {number(row.decode_speedup_high)})",
            f"{number(row.allowed_decode_speedup)}x",
            f"{number(row.donor_first_token_seconds)} s",
            f"{number(row.student_first_token_seconds)} s",
            f"{number(row.first_token_speedup)}x",
        ]
        for row in report.speed
    ]
    return header, rows


def _capacity(report: Report):
    rows = [
        [
            human_bytes(row.memory_bytes),
            str(row.batch_size),
            _any_or(row.donor_context_tokens),
            _any_or(row.student_context_tokens),
        ]
        for row in report.capacity
    ]
    what = words_of(report).context
    return ["memory", "batch", f"donor's {what}, tokens", f"student's {what}, tokens"], rows


def _any_or(tokens: int | None) -> str:
    return "any" if tokens is None else f"{tokens:,}"


def _retrieval(report: Report):
    header = ["task", "context", "samples", "donor right", "student right"]
    header += ["donor's loss of the answer", "student's", "difference"]
    rows = [
        [
            plain(row.task),
            f"{row.context_tokens:,}",
            str(row.samples),
            percent(row.donor_accuracy_fraction),
            percent(row.student_accuracy_fraction),
            number(row.donor_answer_loss_nats_per_token),
            number(row.student_answer_loss_nats_per_token),
            _interval(row.difference),
        ]
        for row in report.retrieval
    ]
    return header, rows


def _tasks(report: Report):
    header = ["task", "metric", "version", "shots", "n", "better", "donor (stderr)", "student (stderr)", "difference"]
    rows = [
        [
            code(row.task),
            code(row.metric),
            code(row.version),
            str(row.num_fewshot),
            f"{row.samples:,}",
            "higher" if row.higher_is_better else "lower",
            _with_stderr(row.donor, row.donor_stderr),
            _with_stderr(row.student, row.student_stderr),
            _interval(row.difference),
        ]
        for row in report.tasks
    ]
    return header, rows


def _with_stderr(value: float, stderr: float | None) -> str:
    return number(value) if stderr is None else f"{number(value)} ({number(stderr)})"
