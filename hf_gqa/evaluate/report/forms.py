"""How the values of a report are written: on the page, which the terminal follows, and on the card."""

from collections.abc import Callable
from typing import Any, NamedTuple

from ...human_units import heads_in_words, human_bytes, human_count, number, percent, times
from .values import Interval


NOTHING = "-"


class Form(NamedTuple):
    """One kind of value in both places; each takes the value and gives text of ours, without markup."""

    page: Callable[[Any], str]
    card: Callable[[Any], str]


class Difference(NamedTuple):
    """Between donor and student: the value itself, where it is known without its interval, and the interval."""

    value: float | None
    interval: Interval | None


def in_both(write: Callable[[Any], str]) -> Form:
    return Form(page=write, card=write)


def change(value: float) -> str:
    return "0" if value == 0 else f"{value:+.3g}"


def _three_digits(value: float) -> str:
    return f"{value:.3g}"


def _with_x(value: float) -> str:
    return f"{number(value)}x"


def _in_range(value: str, low: str, high: str) -> str:
    return f"{value} ({low} to {high})"


def _on_page(said: Callable[[float], str]) -> Callable[[Difference], str]:
    """With its interval; without one the value alone, if there is one."""

    def write(found: Difference) -> str:
        value, interval = found
        if interval is None:
            return "no interval" if value is None else f"{said(value)} (no interval)"
        return _in_range(said(interval.value), said(interval.low), said(interval.high))

    return write


def _on_card(said: Callable[[float], str], signed: bool = False) -> Callable[[Difference], str]:
    """With its interval, or nothing: a card's differences all have one."""

    def write(found: Difference) -> str:
        interval = found.interval
        if interval is None:
            return NOTHING
        plus = "+" if signed and interval.value > 0 else ""
        return _in_range(plus + said(interval.value), said(interval.low), said(interval.high))

    return write


def _smaller(sizes: tuple[float, float]) -> str:
    before, after = sizes
    if before == after:
        return "same"
    if not before or not after:
        return ""
    if after < before:
        return f"{times(before / after)} smaller" if before / after >= 1.1 else f"{percent(1 - after / before)} smaller"
    return f"{times(after / before)} larger" if after / before >= 1.1 else f"{percent(after / before - 1)} larger"


def _fits_on_page(tokens: int | None) -> str:
    return "unbounded" if tokens is None else f"{tokens:,}" if tokens else "none"


def _fits_on_card(tokens: int | None) -> str:
    return "any" if tokens is None else f"{tokens:,}"


def _score_with(plus_minus: Callable[[float], str]) -> Callable[[tuple[float, float | None]], str]:
    return lambda score: number(score[0]) if score[1] is None else f"{number(score[0])} {plus_minus(score[1])}"


TEXT = in_both(str)
COUNT = in_both(lambda value: f"{value:,}")
NUMBER = in_both(number)
SHARE = in_both(percent)
BYTES = in_both(human_bytes)
BYTES_OR_NOTHING = in_both(lambda size: human_bytes(size) if size else NOTHING)
HEADS = in_both(heads_in_words)
PARAMETERS = Form(page=human_count, card=lambda value: f"{value:,}")
THREE_DIGITS = in_both(_three_digits)
TWO_OF_THREE_DIGITS = in_both(lambda values: ", ".join(map(_three_digits, values)))
SECONDS = in_both(lambda value: f"{number(value)} s")
TIMES = Form(page=times, card=_with_x)
PRODUCT = in_both(lambda values: " x ".join(f"{value:,}" for value in values))
FITS = Form(page=_fits_on_page, card=_fits_on_card)

CHANGE = Form(page=_on_page(change), card=_on_card(number, signed=True))
RATIO = Form(page=_on_page(lambda value: f"{value:.4g}x"), card=_on_card(_with_x))
KL = Form(page=_on_page(_three_digits), card=_on_card(number))
AGREEMENT = Form(page=_on_page(percent), card=_on_card(percent))
COSINE = Form(page=_on_page(number), card=_on_card(number))
CORRELATION = Form(page=lambda found: number(found.value), card=lambda found: NOTHING)
SMALLER = Form(page=_smaller, card=lambda sizes: NOTHING)

SPEEDUP = Form(
    page=lambda ratios: _in_range(*map(times, ratios)),
    card=lambda ratios: _in_range(_with_x(ratios[0]), *map(number, ratios[1:])),
)
CONTEXTS = Form(
    page=lambda ends: f"{ends[0]}" if ends[0] == ends[1] else f"{ends[0]}-{ends[1]}",
    card=lambda ends: f"{ends[0]:,} to {ends[1]:,}",
)
SOURCES = Form(page=lambda ends: f"{ends[0]}-{ends[1]}", card=CONTEXTS.card)
SCORE = Form(page=_score_with(lambda error: f"± {error:.2g}"), card=_score_with(lambda error: f"({number(error)})"))
