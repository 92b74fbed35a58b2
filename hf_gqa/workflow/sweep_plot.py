"""Quality against what is saved, one point for each plan, with the front of those that no other beats."""

from io import StringIO

from .sweep_table import SweepRow, SweepTable


def plot_sweep(table: SweepTable) -> str:
    """SVG: loss over cache, and over decoding speed where it was timed; the donor is a cross."""
    from matplotlib import style
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    timed = table.donor_decode_tokens_per_second is not None
    text = StringIO()
    with style.context(["default", {"svg.hashsalt": "sweep", "svg.fonttype": "none", "text.parse_math": False}]):
        figure = Figure(figsize=(12 if timed else 6.5, 4.8), layout="constrained")
        FigureCanvasSVG(figure)
        panels = figure.subplots(1, 2 if timed else 1, sharey=True, squeeze=False)[0]
        over_size, *others = panels
        cached = table.donor_cache_bytes_per_token is not None
        of_donor = table.donor_cache_bytes_per_token if cached else table.donor_parameters
        _draw(over_size, table, lambda row: row.size, of_donor, front=True)
        if cached:
            over_size.set_xscale("log", base=2)
        over_size.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
        over_size.set_xlabel(f"{'cache, bytes per token' if cached else 'parameters'} (less is better)")
        over_size.set_ylabel(f"loss, nats per token, on {table.text_tokens:,} tokens (less is better)")
        if timed:
            of_donor = table.donor_decode_tokens_per_second
            _draw(others[0], table, lambda row: row.decode_tokens_per_second, of_donor)
            others[0].set_xlabel("decoding, tokens per second (more is better)")
        figure.suptitle(f"{table.donor}: {table.dtype} on {table.device}", x=0.01, ha="left", fontsize=11)
        figure.savefig(text, format="svg", metadata={"Date": None})
    return text.getvalue()


def _draw(axes, table: SweepTable, place, donor_place: float, front: bool = False) -> None:
    """A colour for each way to convert, names at the points, bars for the intervals."""
    kinds = sorted({_kind(row) for row in table.rows})
    for number, kind in enumerate(kinds):
        rows = sorted((row for row in table.rows if _kind(row) == kind and place(row)), key=place)
        below, above = ([_interval(row, table)[end] for row in rows] for end in (0, 1))
        points = [place(row) for row in rows], [row.loss_nats_per_token for row in rows]
        axes.errorbar(
            *points, yerr=(below, above), marker="o", capsize=3, label=kind, color=f"C{number}", linestyle=":"
        )
    for row in table.rows:
        if place(row):
            axes.annotate(
                str(row.num_key_value_heads),
                (place(row), row.loss_nats_per_token),
                xytext=(6, 5),
                textcoords="offset points",
                fontsize=8,
            )
    axes.plot([donor_place], [table.donor_loss_nats_per_token], "kX", markersize=9, label="donor")
    if front:
        best = sorted((row for row in table.rows if row.on_front), key=place)
        axes.plot(
            [place(row) for row in best], [row.loss_nats_per_token for row in best], "k-", alpha=0.3, label="front"
        )
    axes.axhline(table.donor_loss_nats_per_token, color="black", linewidth=0.8, linestyle="--")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)


def _kind(row: SweepRow) -> str:
    shared = "" if row.sharing == "own" else f", {row.sharing}"
    return f"{row.method}{shared}{f', {row.uptrain_tokens:,} tokens' if row.uptrain_tokens else ''}"


def _interval(row: SweepRow, table: SweepTable) -> tuple[float, float]:
    """How far the interval of the difference reaches below and above the loss."""
    if row.loss_difference is None:
        return 0.0, 0.0
    value = row.loss_nats_per_token - table.donor_loss_nats_per_token
    return max(0.0, value - row.loss_difference.low), max(0.0, row.loss_difference.high - value)
