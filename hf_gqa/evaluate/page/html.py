"""Pieces of an HTML page; whatever comes from outside passes through `text_of`."""

import html
import re
from collections.abc import Iterable, Sequence

from ..report.table import Cells


# Control characters, lone halves of surrogate pairs, and what turns the direction of all that follows.
UNSEEN = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff\u202a-\u202e\u2066-\u2069]")


def text_of(outside: object) -> str:
    """Text that a browser shows as it is: no markup, and what cannot be seen as an escape such as \\x1b."""
    seen = UNSEEN.sub(lambda found: ascii(found[0])[1:-1], str(outside))
    return html.escape(seen, quote=True)


def element(tag: str, content: str, **attributes: str) -> str:
    """`content` is HTML; values of attributes are text. `class_` is written class."""
    said = "".join(f' {name.rstrip("_").replace("_", "-")}="{text_of(value)}"' for name, value in attributes.items())
    return f"<{tag}{said}>{content}</{tag}>"


def table(rows: Cells, caption: str) -> str:
    """In a box of its own that scrolls sideways where the page is narrow; the first cell of a row names it."""
    head = "".join(element("th", text_of(cell), scope="col") if cell else "<td></td>" for cell in rows.header)
    body = "".join(element("tr", _cells(row)) for row in rows.rows)
    whole = f"<table><caption>{text_of(caption)}</caption><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"
    return element("div", whole, class_="scrolls", role="region", tabindex="0", aria_label=caption)


def _cells(row: Sequence[str]) -> str:
    return element("th", text_of(row[0]), scope="row") + "".join(element("td", text_of(cell)) for cell in row[1:])


def details(summary: str, content: str) -> str:
    return f"<details><summary>{text_of(summary)}</summary>{content}</details>"


def block(outside: str, label: str) -> str:
    """Text in which every space counts."""
    return element("pre", text_of(outside), tabindex="0", aria_label=label, dir="auto")


def bullets(items: Iterable[str]) -> str:
    return element("ul", "".join(element("li", text_of(item)) for item in items))


def section(heading: str, *content: str) -> str:
    """Nothing where there is no content."""
    whole = "".join(content)
    return f"<section><h2>{text_of(heading)}</h2>{whole}</section>\n" if whole else ""
