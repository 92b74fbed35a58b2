"""Sizes, counts, ratios and heads as people say them, the same in every table, page, card and command."""

from collections.abc import Sequence


MANY_LAYERS = 12


def human_bytes(size: float) -> str:
    """1536 -> '1.5 KiB'."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if size < 1024:
            return f"{size:.4g} {unit}"
        size /= 1024
    return f"{size:.4g} TiB"


def human_count(number: int) -> str:
    """5049600 -> '5.05M'."""
    for unit in ("", "K", "M", "B"):
        if number < 999.5:
            return f"{number:.3g}{unit}"
        number /= 1000
    return f"{number:.3g}T"


def number(value: float) -> str:
    """Four digits, thousands in full: 24.0468 -> '24.05', 12288 -> '12,288'."""
    return f"{value:,.0f}" if isinstance(value, int) or 1000 <= abs(value) < 1e9 else f"{value:.4g}"


def percent(fraction: float) -> str:
    """0.8434 -> '84.34%'."""
    return f"{100 * fraction:.4g}%"


def times(ratio: float) -> str:
    """0.5 -> '0.5x'."""
    return f"{ratio:.3g}x"


def heads_in_words(per_layer: Sequence[int]) -> str:
    """(2, 2, 2) -> '2'; (8, 2, 2) -> '8, 2, 2'; of very deep models the numbers that occur."""
    if len(set(per_layer)) == 1:
        return str(per_layer[0])
    if len(per_layer) <= MANY_LAYERS:
        return ", ".join(map(str, per_layer))
    return f"{min(per_layer)} to {max(per_layer)} by layer"
