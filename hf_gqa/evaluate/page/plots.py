"""The plots of the page: donor in circles, student in squares, what the bytes would allow in dashes."""

from collections.abc import Iterable, Sequence
from math import sqrt

from ...human_units import human_bytes
from ..report import Capacity, ContextLoss, Report, Retrieval, Speed, TaskScore
from ..report.words import words_of
from .svg import DONOR, GRID, INK, STUDENT, THIRD, drawing


DONOR_LINE = {"color": DONOR, "marker": "o"}
STUDENT_LINE = {"color": STUDENT, "marker": "s"}
MOST_TICKS, MOST_LETTERS = 6, 28
INCHES_PER_ROW = 0.32


def context_plots(report: Report) -> list[str]:
    rows = report.by_context
    return [
        drawing("context-loss", "Loss by context", lambda axes: _draw_context_loss(axes, rows)),
        drawing("context-difference", "Student less donor, and KL", lambda axes: _draw_context_difference(axes, rows)),
    ]


def retrieval_plots(report: Report) -> list[str]:
    """Of each task, answers that are right and the loss of the right answer."""
    plots = []
    for number, task in enumerate(_in_order(row.task for row in report.retrieval)):
        rows = [row for row in report.retrieval if row.task == task]
        title = _shown(task)
        plots += [
            drawing(f"right-{number}", f"{title}: answers right", lambda axes, rows=rows: _draw_answers(axes, rows)),
            drawing(
                f"answer-{number}",
                f"{title}: loss of the answer",
                lambda axes, rows=rows: _draw_answer_loss(axes, rows),
            ),
        ]
    return plots


def speed_plots(report: Report) -> list[str]:
    """Of each batch size, tokens per second and the speed-up beside the allowed one."""
    plots = []
    for batch in _in_order(row.batch_size for row in report.speed):
        rows, label = [row for row in report.speed if row.batch_size == batch], f"tokens of {words_of(report).context}"
        plots += [
            drawing(
                f"decode-{batch}",
                f"Decoding, batch {batch}",
                lambda axes, rows=rows, label=label: _draw_decoding(axes, rows, label),
            ),
            drawing(
                f"speedup-{batch}",
                f"Speed-up, batch {batch}",
                lambda axes, rows=rows, label=label: _draw_speedup(axes, rows, label),
            ),
        ]
    return plots


def capacity_plots(report: Report) -> list[str]:
    rows, limit = report.capacity, report.text.longest_context_tokens
    if not any(row.donor_context_tokens or row.student_context_tokens for row in rows):
        return []
    height = 1.2 + INCHES_PER_ROW * len(rows)
    what = words_of(report).context
    title = f"{what.capitalize()} that fits beside the weights"
    return [drawing("capacity", title, lambda axes: _draw_capacity(axes, rows, limit, what), height)]


def task_plots(report: Report) -> list[str]:
    """Of metrics that are shares; others have no common axis and stand in the table."""
    rows = [row for row in report.tasks if row.higher_is_better and 0 <= min(row.donor, row.student) <= 1]
    rows = [row for row in rows if max(row.donor, row.student) <= 1]
    height = 1.2 + INCHES_PER_ROW * len(rows)
    return [drawing("tasks", "Scores ± standard error", lambda axes: _draw_tasks(axes, rows), height)] if rows else []


def _draw_context_loss(axes, rows: Sequence[ContextLoss]) -> None:
    x = _middles(rows)
    axes.plot(x, [row.donor_loss_nats_per_token for row in rows], **DONOR_LINE)
    axes.plot(x, [row.student_loss_nats_per_token for row in rows], **STUDENT_LINE)
    _context_axis(axes, [max(row.first_context_tokens, 1) for row in rows], "tokens of context")
    axes.set_ylabel("nats per token")


def _draw_context_difference(axes, rows: Sequence[ContextLoss]) -> None:
    x = _middles(rows)
    axes.axhline(0, color=INK, linewidth=1)
    known = [(middle, row.difference) for middle, row in zip(x, rows, strict=True) if row.difference is not None]
    if known:
        lows, highs = [interval.low for _, interval in known], [interval.high for _, interval in known]
        axes.fill_between([middle for middle, _ in known], lows, highs, color=STUDENT, alpha=0.25, linewidth=0)
    axes.plot(x, [row.student_loss_nats_per_token - row.donor_loss_nats_per_token for row in rows], **STUDENT_LINE)
    axes.plot(x, [row.kl_nats_per_token for row in rows], color=THIRD, marker="^", linestyle="--")
    _context_axis(axes, [max(row.first_context_tokens, 1) for row in rows], "tokens of context")
    axes.set_ylabel("nats per token")


def _draw_answers(axes, rows: Sequence[Retrieval]) -> None:
    from matplotlib.ticker import PercentFormatter

    x = [row.context_tokens for row in rows]
    axes.plot(x, [row.donor_accuracy_fraction for row in rows], **DONOR_LINE)
    axes.plot(x, [row.student_accuracy_fraction for row in rows], **STUDENT_LINE)
    axes.set_ylim(-0.05, 1.05)
    axes.yaxis.set_major_formatter(PercentFormatter(1))
    _context_axis(axes, x, "tokens of context")


def _draw_answer_loss(axes, rows: Sequence[Retrieval]) -> None:
    x = [row.context_tokens for row in rows]
    axes.plot(x, [row.donor_answer_loss_nats_per_token for row in rows], **DONOR_LINE)
    axes.plot(x, [row.student_answer_loss_nats_per_token for row in rows], **STUDENT_LINE)
    axes.set_ylim(bottom=0)
    axes.set_ylabel("nats per token")
    _context_axis(axes, x, "tokens of context")


def _draw_decoding(axes, rows: Sequence[Speed], label: str) -> None:
    x = [row.context_tokens for row in rows]
    axes.plot(x, [row.donor_decode_tokens_per_second for row in rows], **DONOR_LINE)
    axes.plot(x, [row.student_decode_tokens_per_second for row in rows], **STUDENT_LINE)
    axes.set_ylim(bottom=0)
    axes.set_ylabel("tokens per second")
    _context_axis(axes, x, label)


def _draw_speedup(axes, rows: Sequence[Speed], label: str) -> None:
    x, measured = [row.context_tokens for row in rows], [row.decode_speedup for row in rows]
    below = [row.decode_speedup - row.decode_speedup_low for row in rows]
    above = [row.decode_speedup_high - row.decode_speedup for row in rows]
    axes.axhline(1, color=INK, linewidth=1)
    axes.plot(x, [row.allowed_decode_speedup for row in rows], color=THIRD, marker="^", linestyle="--")
    axes.errorbar(x, measured, yerr=[below, above], capsize=3, **STUDENT_LINE)
    axes.set_ylim(bottom=min(0.5, *measured))
    axes.set_ylabel("student over donor")
    _context_axis(axes, x, label)


def _draw_capacity(axes, rows: Sequence[Capacity], limit: int | None, what: str) -> None:
    from matplotlib.ticker import LogLocator, NullLocator

    axes.set_xscale("log")
    for y, row in enumerate(rows):
        both = [tokens for tokens in (row.donor_context_tokens, row.student_context_tokens) if tokens]
        axes.plot(both, [y] * len(both), color=GRID, linewidth=3)
        for tokens, look in ((row.donor_context_tokens, DONOR_LINE), (row.student_context_tokens, STUDENT_LINE)):
            if tokens:
                axes.plot([tokens], [y], linestyle="", **look)
    if limit:
        axes.axvline(limit, color=THIRD, linestyle="--", linewidth=1.5)
    axes.xaxis.set_major_locator(LogLocator(numticks=MOST_TICKS))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(lambda value, _: _tokens(value))
    axes.set_xlabel(f"tokens of {what} for each sequence")
    _name_rows(axes, [f"{human_bytes(row.memory_bytes)}, batch {row.batch_size}" for row in rows])


def _draw_tasks(axes, rows: Sequence[TaskScore]) -> None:
    for shift, model, look in ((-0.12, "donor", DONOR_LINE), (0.12, "student", STUDENT_LINE)):
        y = [number + shift for number in range(len(rows))]
        errors = [getattr(row, f"{model}_stderr") or 0 for row in rows]
        axes.errorbar([getattr(row, model) for row in rows], y, xerr=errors, linestyle="", capsize=3, **look)
    axes.set_xlim(0, 1)
    _name_rows(axes, [_shown(f"{row.task} {row.metric}") for row in rows])


def _name_rows(axes, names: Sequence[str]) -> None:
    axes.set_yticks(range(len(names)), names)
    axes.set_ylim(len(names) - 0.4, -0.6)
    axes.grid(visible=False, axis="y")


def _context_axis(axes, contexts: Sequence[int], label: str) -> None:
    """Logarithmic, with ticks where something was measured, as many as there is room for."""
    from matplotlib.ticker import NullLocator

    axes.set_xscale("log", base=2)
    axes.xaxis.set_minor_locator(NullLocator())
    ticks = _apart(sorted(set(contexts)))
    axes.set_xticks(ticks, [_tokens(tick) for tick in ticks])
    axes.set_xlabel(label)


def _apart(contexts: Sequence[int]) -> list[int]:
    """The first of them and those that are far enough from the one before."""
    factor = max(1.2, (contexts[-1] / contexts[0]) ** (1 / MOST_TICKS))
    ticks = [contexts[0]]
    for context in contexts:
        if context >= ticks[-1] * factor:
            ticks.append(context)
    return ticks


def _middles(rows: Sequence[ContextLoss]) -> list[float]:
    return [sqrt(max(row.first_context_tokens, 1) * max(row.last_context_tokens, 1)) for row in rows]


def _tokens(value: float) -> str:
    """131072 -> '128k', as contexts are named; 1000 -> '1,000', 10**7 -> '10M'."""
    value = round(value)
    if value >= 1024 and value % 1024 == 0:
        return f"{value // 1024}k"
    for size, letter in ((10**9, "G"), (10**6, "M")):
        if value >= size:
            return f"{value / size:.3g}{letter}"
    return f"{value:,}"


def _shown(outside: str) -> str:
    """Names that matplotlib's own font has letters for, and short enough to stand beside a plot."""
    plain = "".join(letter if " " <= letter <= "~" else "?" for letter in outside)
    return plain if len(plain) <= MOST_LETTERS else f"{plain[: MOST_LETTERS - 3]}..."


def _in_order(values: Iterable) -> list:
    return list(dict.fromkeys(values))
