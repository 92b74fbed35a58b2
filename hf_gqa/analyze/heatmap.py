"""Two maps of every pair of layers: how alike their attention is, and what borrowing costs."""

from io import StringIO

import numpy as np

from .result import AnalysisResult


MOST_NUMBERED_LAYERS = 16  # with more, numbers in the cells cannot be read


def draw_heatmap(result: AnalysisResult) -> str:
    """SVG."""
    from matplotlib import style
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.colors import LogNorm
    from matplotlib.figure import Figure

    text = StringIO()
    with style.context(["default", {"svg.hashsalt": "analysis", "svg.fonttype": "none", "text.parse_math": False}]):
        figure = Figure(figsize=(12, 5.4), layout="constrained")
        FigureCanvasSVG(figure)
        alike, costs = figure.subplots(1, 2)
        similarity_LL = np.array(result.similarity)
        np.fill_diagonal(similarity_LL, np.nan)
        _draw(alike, similarity_LL, "{:.2f}", cmap="viridis")
        alike.set_title("cosine of attention matrices")
        alike.set_ylabel("layer")
        alike.set_xlabel("layer")
        cost_LL = np.full_like(similarity_LL, np.nan)
        for pair in result.pairs:
            cost_LL[pair.borrower, pair.owner] = max(pair.kl, 1e-9)
        _draw(costs, cost_LL, "{:.2g}", cmap="magma_r", norm=LogNorm())
        costs.set_title(f"KL to the donor, {result.sharing} of one pair")
        costs.set_ylabel("borrower")
        costs.set_xlabel("owner")
        figure.suptitle(f"{result.donor}: {len(result.kinds)} layers", x=0.01, ha="left", fontsize=11)
        figure.savefig(text, format="svg", metadata={"Date": None})
    return text.getvalue()


def _draw(axes, values_LL: np.ndarray, words: str, **colors) -> None:
    """Rows and columns are layers; the colour bar beside it, and the numbers where they can be read."""
    image = axes.imshow(values_LL, **colors)
    bar = axes.figure.colorbar(image, ax=axes, shrink=0.85)
    bar.ax.yaxis.set_major_formatter("{x:.3g}")
    bar.ax.yaxis.set_minor_formatter("{x:.3g}")
    layers = len(values_LL)
    every = max(1, layers // MOST_NUMBERED_LAYERS)
    axes.set_xticks(range(0, layers, every))
    axes.set_yticks(range(0, layers, every))
    if layers > MOST_NUMBERED_LAYERS:
        return
    for (row, column), value in np.ndenumerate(values_LL):
        if np.isfinite(value):
            red, green, blue, _ = image.cmap(image.norm(value))
            dark = 0.3 * red + 0.6 * green + 0.1 * blue < 0.5
            shown = {"ha": "center", "va": "center", "fontsize": 8, "color": "white" if dark else "black"}
            axes.text(column, row, words.format(value), **shown)
