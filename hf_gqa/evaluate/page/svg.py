"""Matplotlib drawings as SVG that lives inside a page: its colours and its font follow the page, its ids are its own."""

import re
from collections.abc import Callable
from io import StringIO

from .html import text_of


# Drawn in colours that stand for those of the page, which has other ones for dark and for light.
INK, GRID, DONOR, STUDENT, THIRD = "#010203", "#010204", "#010205", "#010206", "#010207"
PAGE_COLORS = {INK: "ink", GRID: "line", DONOR: "donor", STUDENT: "student", THIRD: "third"}
STYLE = {
    "svg.fonttype": "none",  # text stays text
    "text.parse_math": False,  # and a $ a $
    "font.size": 10,
    "axes.titlesize": 11,
    "axes.titlelocation": "left",
    "axes.titlepad": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.linewidth": 0.8,
    "lines.linewidth": 2,
    "lines.markersize": 5.5,
    "xtick.major.size": 0,
    "ytick.major.size": 0,
    **dict.fromkeys(("grid.color", "axes.edgecolor", "xtick.color", "ytick.color"), GRID),
    **dict.fromkeys(("text.color", "axes.labelcolor", "axes.titlecolor", "xtick.labelcolor", "ytick.labelcolor"), INK),
}
WIDTH_INCHES, HEIGHT_INCHES = 4.6, 2.9


def drawing(name: str, title: str, draw: Callable, height_inches: float = HEIGHT_INCHES) -> str:
    """An <svg> as wide as a phone; the same drawing gives the same text.

    Args:
        name: unlike that of any other drawing on the page; it begins every id.
        title: what stands above, and what a screen reader says.
        draw: given matplotlib's axes.
    """
    from matplotlib import style
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    file = StringIO()
    with style.context(["default", STYLE, {"svg.hashsalt": name}]):
        figure = Figure(figsize=(WIDTH_INCHES, height_inches), layout="constrained")
        FigureCanvasSVG(figure)
        axes = figure.subplots()
        axes.set_title(title)
        draw(axes)
        figure.savefig(file, format="svg", transparent=True, metadata={"Date": None})
    return _inline(file.getvalue(), name, text_of(title))


def _inline(svg: str, name: str, title: str) -> str:
    """Without what belongs to a file of its own: prolog, metadata, fonts, a style that would hold for the whole page."""
    view_box = re.search(r'viewBox="([^"]*)"', svg)[1]
    content = svg[svg.index(">", svg.index("<svg")) + 1 :]
    content = re.sub(r"<metadata>.*?</metadata>|<style.*?</style>", "", content, flags=re.DOTALL)
    content = re.sub(r'(?<=\s)[\w-]+="[^"]*"', lambda found: _shortened(found[0]), _with_own_ids(content, name))
    content = re.sub(r"\s*\n\s*", "\n", content)
    return f'<svg viewBox="{view_box}" role="img" aria-label="{title}"><title>{title}</title>{content.strip()}\n'


def _with_own_ids(svg: str, name: str) -> str:
    """Ids that nothing refers to are left out; the others would clash with those of the next drawing."""
    svg = svg.replace("xlink:href=", "href=")
    used = set(re.findall(r'(?:href="#|url\(#)([^")]+)', svg))
    svg = re.sub(r' id="([^"]*)"', lambda found: f' id="{name}-{found[1]}"' if found[1] in used else "", svg)
    return re.sub(r'(href="#|url\(#)', rf"\1{name}-", svg)


def _shortened(attribute: str) -> str:
    """One attribute: a hundredth of a unit is fine enough, and colours are those of the page."""
    if attribute.startswith('transform="rotate(-0 '):
        return ""
    if not attribute.startswith("style="):
        return re.sub(r"(\.\d\d)\d+", r"\1", attribute)
    attribute = re.sub(r"font-family: [^;\"]*;? ?", "", attribute)
    attribute = re.sub(r"font: (?:\w+ )?([\d.]+px) [^;\"]*", r"font-size: \1", attribute)
    for drawn, shown in PAGE_COLORS.items():
        attribute = attribute.replace(drawn, f"var(--{shown})")
    return attribute
