"""The verdict on a conversion, in a few plain sentences that say no more than the numbers of its report."""

from collections.abc import Callable, Sequence

from ...human_units import human_bytes, percent, times
from .values import ContextLoss, EncodingSpeed, Interval, Report, Retrieval, Rouge, Speed, TaskScore
from .words import words_of


SAME_SIZE_FRACTION = 0.005
COULD_FRACTION = 0.5  # of the answers right; a donor below it says little about what its student lost
STANDARD_ERRORS = 1.96


def verdict(report: Report) -> str:
    """What became of cache and speed, what it cost, and whether recall or tasks fell.

    There is no single figure of quality kept: an average hides what was lost, so each loss is said as it was measured.
    """
    if report.donor.cache_bytes_per_token_measured is None:
        sentences = [_encoding_speed(report.encoding_speed)]
    else:
        sentences = [f"{_cache(report)}, and {_speed(report.speed, words_of(report).context)}"]
    sentences += [_cost(report), _embeddings(report), _rouge(report.rouge)]
    sentences += [_recall(report.retrieval), _tasks(report.tasks)]
    return " ".join(f"{sentence}." for sentence in sentences if sentence)


def confidence(report: Report) -> str:
    """'95%'."""
    return percent(report.settings.confidence_fraction)


def fallen_recall(rows: Sequence[Retrieval]) -> list[Retrieval]:
    """Where the student gets fewer answers right than chance explains, or fewer and likelier wrong; worst first."""

    def fell(row: Retrieval) -> bool:
        lost = row.donor_accuracy_fraction - row.student_accuracy_fraction
        shares = (row.donor_accuracy_fraction, row.student_accuracy_fraction)
        error = (sum(share * (1 - share) for share in shares) / row.samples) ** 0.5
        less_likely = row.difference is not None and row.difference.low > 0
        return lost > 0 and (less_likely or lost > STANDARD_ERRORS * error)

    return sorted(filter(fell, rows), key=lambda row: row.student_accuracy_fraction - row.donor_accuracy_fraction)


def _cache(report: Report) -> str:
    before, after = report.donor.cache_bytes_per_token_measured, report.student.cache_bytes_per_token_measured
    if before <= 0 or after <= 0:
        return "No cache was measured"
    sources = [model.cache_bytes_per_source_token_measured for model in (report.donor, report.student)]
    if not all(sources):
        return f"The cache is {_size(before, after, 'token')}"
    return f"The cache is {_size(before, after, 'written token')}, of the source {_size(*sources, 'source token')}"


def _size(before: float, after: float, each: str) -> str:
    ratio = before / after
    if abs(ratio - 1) < SAME_SIZE_FRACTION:
        return f"as large as the donor's ({human_bytes(after)} per {each})"
    size = f"{times(ratio)} smaller" if ratio > 1 else f"{times(1 / ratio)} larger"
    return f"{size} ({human_bytes(before)} to {human_bytes(after)} per {each})"


def _encoding_speed(cells: Sequence[EncodingSpeed]) -> str:
    if not cells:
        return "Speed was not measured"
    measured = _range([cell.speedup for cell in cells], times)
    batch = _range([cell.batch_size for cell in cells], str)
    length = _range([cell.length_tokens for cell in cells], str)
    faster = sum(cell.speedup_low > 1 for cell in cells)
    slower = sum(cell.speedup_high < 1 for cell in cells)
    said = f"Reading is faster in {faster} and slower in {slower} of {len(cells)} settings"
    return f"{said} ({measured} at batch {batch} and length {length})"


def _embeddings(report: Report) -> str:
    found = report.embeddings
    if found is None:
        return ""
    bounds = (
        ""
        if found.cosine is None
        else (f" ({confidence(report)} interval {found.cosine.low:.4g} to {found.cosine.high:.4g})")
    )
    ranked = (
        ""
        if found.spearman is None
        else (f", and the rank correlation of their similarities to one another is {found.spearman:.4g}")
    )
    return f"Its embeddings have a cosine of {found.mean_cosine:.4g} to the donor's{bounds}{ranked}"


def _rouge(rows: Sequence[Rouge]) -> str:
    if not rows:
        return ""
    row = rows[-1]
    figures = f"{row.metric} {row.donor_fraction:.3g} to {row.student_fraction:.3g}"
    if row.difference is None:
        return f"What it writes was scored with no interval, because there are too few pairs ({figures})"
    if row.difference.low <= 0 <= row.difference.high:
        return f"No difference in what it writes was seen ({figures})"
    return f"What it writes is {'nearer to' if row.difference.low > 0 else 'farther from'} the references ({figures})"


def _speed(cells: Sequence[Speed], length: str) -> str:
    if not cells:
        return "speed was not measured"
    batch = _range([cell.batch_size for cell in cells], str)
    context = _range([cell.context_tokens for cell in cells], str)
    measured = _range([cell.decode_speedup for cell in cells], times)
    allowed = _range([cell.allowed_decode_speedup for cell in cells], times)
    return (
        f"{_faster_or_slower(cells)} ({measured} at batch {batch} and {length} {context}; "
        f"the bytes moved would allow {allowed})"
    )


def _faster_or_slower(cells: Sequence[Speed]) -> str:
    """Of a cell, only if all its pairs of runs say the same."""
    faster = sum(cell.decode_speedup_low > 1 for cell in cells)
    slower = sum(cell.decode_speedup_high < 1 for cell in cells)
    if faster == len(cells):
        return "decoding is faster wherever it was measured"
    if slower == len(cells):
        return "decoding is slower wherever it was measured"
    if not faster:
        return (
            f"decoding is no faster, and slower in {slower} of {len(cells)} settings"
            if slower
            else "decoding is no faster"
        )
    return f"decoding is faster in {faster} of {len(cells)} settings" + (f" and slower in {slower}" if slower else "")


def _range(values: list, said: Callable) -> str:
    low, high = said(min(values)), said(max(values))
    return low if low == high else f"{low} to {high}"


def _cost(report: Report) -> str:
    donor, student, interval = report.donor, report.student, report.differences.loss_nats_per_token
    if donor.loss_nats_per_token is None:
        return ""
    change = student.loss_nats_per_token - donor.loss_nats_per_token
    figures = f"perplexity {donor.perplexity:.4g} to {student.perplexity:.4g}; KL {report.kl_nats_per_token:.3g}"
    agreement = f"; {words_of(report).agreement} {percent(report.top1_agreement_fraction)} of the time"
    if interval is None:
        said = f"{abs(change):.3g} nats per token {'lower' if change < 0 else 'higher'}"
        return f"The loss is {said} ({figures}), with no interval because the text is too short for one{agreement}"
    bounds = f"{confidence(report)} interval {interval.low:.3g} to {interval.high:.3g}; {figures}"
    if interval.low <= 0 <= interval.high:
        said = f"No difference in loss was seen ({change:+.3g} nats per token, {bounds})"
    elif change < 0:
        said = f"The loss is {abs(change):.3g} nats per token lower than the donor's ({bounds})"
    else:
        said = f"It costs {change:.3g} nats per token of loss ({bounds})"
    return said + _worst_context(report.by_context, interval) + _worst_source(report, interval) + agreement


def _worst_context(rows: Sequence[ContextLoss], overall: Interval) -> str:
    """Contexts where it costs more than on the average, beyond both intervals."""
    worse = [row for row in rows if row.difference is not None and row.difference.low > max(overall.high, 0)]
    if not worse:
        return ""
    worst = max(worse, key=lambda row: row.difference.value)
    return (
        f", {worst.difference.value:.3g} at {worst.first_context_tokens} to {worst.last_context_tokens} "
        "tokens of context"
    )


def _worst_source(report: Report, overall: Interval) -> str:
    """The same for the lengths of sources."""
    limit = max(overall.high, 0)
    worse = [row for row in report.by_source_length if row.difference is not None and row.difference.low > limit]
    if not worse:
        return ""
    worst = max(worse, key=lambda row: row.difference.value)
    return f", {worst.difference.value:.3g} for sources of {worst.first_source_tokens} to {worst.last_source_tokens} tokens"


def _recall(rows: Sequence[Retrieval]) -> str:
    if not rows:
        return ""
    fallen = fallen_recall(rows)
    if fallen:
        worst = fallen[0]
        return (
            f"Retrieval fell in {len(fallen)} of {len(rows)} settings, most on {worst.task} at {worst.context_tokens} tokens: "
            f"{percent(worst.donor_accuracy_fraction)} to {percent(worst.student_accuracy_fraction)} of answers right"
        )
    best = max(row.donor_accuracy_fraction for row in rows)
    if best < COULD_FRACTION:
        return f"Retrieval says little: the donor itself gets at most {percent(best)} of the answers right"
    return f"No fall in retrieval was seen ({_range([row.samples for row in rows], str)} samples per setting)"


def _tasks(scores: Sequence[TaskScore]) -> str:
    judged = [score for score in scores if score.difference is not None]
    worse = [s for s in judged if (s.difference.high < 0 if s.higher_is_better else s.difference.low > 0)]
    if not worse:
        return ""
    names = ", ".join(dict.fromkeys(score.task for score in worse[:3])) + (", ..." if len(worse) > 3 else "")
    return f"Worse beyond their intervals: {len(worse)} of {len(judged)} task scores ({names})"
