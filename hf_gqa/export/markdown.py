"""Text from outside as Markdown that shows it and does nothing else: names, recipes and answers may hold anything."""

import re


SPECIAL = re.compile(r"[\\`*_{}\[\]|~$@<>&]|:(?=//)")
SPECIAL_FIRST = re.compile(r"[#+=-]|\d+(?=[.)](\s|$))")  # of a line: a heading, a list, a rule


def plain(text: str) -> str:
    """On one line, every special character escaped; `<` and `&` start neither tags nor entities."""
    escaped = SPECIAL.sub(r"\\\g<0>", " ".join(str(text).split()))
    first = SPECIAL_FIRST.match(escaped)
    if first is None:
        return escaped
    end = first.end() if first[0].isdigit() else 0
    return f"{escaped[:end]}\\{escaped[end:]}"


def code(text: str) -> str:
    """A code span on one line, with more backticks around it than within; a `|` in it ends no cell of a table."""
    line = " ".join(str(text).split()).replace("|", "\\|")
    fence = "`" * (_longest_run(line) + 1)
    return f"{fence} {line} {fence}" if line.startswith("`") or line.endswith("`") else f"{fence}{line}{fence}"


def block(text: str, language: str = "") -> str:
    """A fenced block whose fence is longer than any run of backticks in it."""
    fence = "`" * max(3, _longest_run(text) + 1)
    return f"{fence}{language}\n{text.rstrip()}\n{fence}"


def table(header: list[str], rows: list[list[str]]) -> str:
    """Numbers, in all columns but the first, are aligned to the right; cells are Markdown already."""
    lines = [header, ["---", *["---:"] * (len(header) - 1)], *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def _longest_run(text: str) -> int:
    return max((len(run) for run in re.findall(r"`+", text)), default=0)
