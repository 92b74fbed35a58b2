"""The results of benchmarks/decode.py as Markdown and as a plot. `python benchmarks/decode_tables.py FILE.json` makes both again."""

import json
import sys
from pathlib import Path


BEHIND = 0.95  # ours is called slower than stock where stock takes less than this fraction of our time


def seconds(cell: dict, way: str) -> float:
    return cell["ways"][way]["seconds"]


def times(cell: dict, way: str) -> str:
    """How many times as long as ours `way` takes."""
    return f"{seconds(cell, way) / seconds(cell, 'ours'):.2f}" if way in cell["ways"] else ""


def least(cell: dict) -> str:
    """As `times` for stock, of the fastest runs: what other work on the machine delays least."""
    return f"{cell['ways']['stock']['least_seconds'] / cell['ways']['ours']['least_seconds']:.2f}"


def table(head: list[str], rows: list[list[str]]) -> str:
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    return "\n".join(lines + ["| " + " | ".join(row) + " |" for row in rows]) + "\n"


def noise(cell: dict) -> str:
    return f"{max(cell['ways'][way]['noise'] for way in ('ours', 'stock')):.0%}"


def attention_table(cells: list[dict], first: str, label) -> str:
    head = [
        "dtype",
        first,
        "batch",
        "mask",
        "KV heads",
        "ours, ms",
        "stock /",
        "repeat_kv /",
        "enable_gqa /",
        "packed /",
    ]
    rows = [
        [
            *(cell["dtype"], label(cell), str(cell["batch"]), "yes" if cell["masked"] else "no"),
            *(str(cell["kv_heads"]), f"{seconds(cell, 'ours') * 1e3:.2f}"),
            *(times(cell, way) for way in ("stock", "repeat_kv", "enable_gqa", "packed")),
            *(f"{cell['kv_bytes'] / seconds(cell, 'ours') / 1e9:.1f}", noise(cell)),
        ]
        for cell in cells
    ]
    return table([*head, "GB/s", "noise"], rows)


def model_table(cells: list[dict]) -> str:
    most = cells[0]
    kinds = [kind for kind in ("dynamic", "static", "compiled") if f"ours, {kind}" in most["ways"]]
    best = min(kinds, key=lambda cache: seconds(most, f"ours, {cache}"))
    rows = []
    for cell in cells:
        allowed = (most["weight_bytes"] + most["cache_bytes"]) / (cell["weight_bytes"] + cell["cache_bytes"])
        reached = seconds(most, f"ours, {best}") / seconds(cell, f"ours, {best}")
        row = [str(cell["kv_heads"])]
        for cache in kinds:
            ours, stock = (seconds(cell, f"{way}, {cache}") for way in ("ours", "stock"))
            row += [f"{stock * 1e3:.0f}", f"{ours * 1e3:.0f}", f"{stock / ours:.2f}"]
        worst = max(each["noise"] for each in cell["ways"].values())
        rows.append([*row, f"{reached:.2f}", f"{allowed:.2f}", f"{reached / allowed:.0%}", f"{worst:.0%}"])
    caches = [f"{what}, {cache}" for cache in kinds for what in ("stock, ms", "ours, ms", "times faster")]
    return table(
        ["KV heads", *caches, f"against 32 KV heads (ours, {best})", "bytes allow", "reached", "noise"],
        rows,
    )


def slower_cells(found: dict) -> list[str]:
    cells = [*found.get("one_token", []), *found.get("several_tokens", [])]
    slow = [cell for cell in cells if seconds(cell, "stock") < BEHIND * seconds(cell, "ours")]
    return [
        f"{cell['dtype']}, {cell['tokens']} token(s), {cell['keys']} keys, batch {cell['batch']}, {cell['kv_heads']} KV heads, "
        f"{'mask' if cell['masked'] else 'no mask'}: stock takes {times(cell, 'stock')} of our time, {least(cell)} by the fastest runs (noise {noise(cell)})"
        for cell in slow
    ]


def markdown(found: dict) -> str:
    machine = found["machine"]
    parts = [
        "# Attention with fewer KV heads: grouped_sdpa against stock transformers\n",
        f"{machine['device']}, {machine['threads']} threads, torch {machine['torch']}, transformers {machine['transformers']}. "
        f"Copying memory moves {machine['copy_bytes_per_second'] / 1e9:.1f} GB/s, read and written together. "
        "32 query heads, head_dim 128, medians; `/` columns are times as long as ours; GB/s are those of keys and values "
        "read once; noise is the larger distance of the quartiles, ours or stock, over the median. "
        "Written by `python benchmarks/decode.py`.\n",
    ]
    if "one_token" in found:
        parts += ["## Attention alone, one token\n"]
        parts += [attention_table(found["one_token"], "context", lambda cell: str(cell["keys"]))]
    if "several_tokens" in found:
        parts += ["## Attention alone, several tokens\n"]
        parts += [attention_table(found["several_tokens"], "path", lambda cell: cell["path"])]
    if "model" in found:
        parts += [
            "## A whole decode step\n",
            "6 layers, hidden 2048, intermediate 5632, 32 heads, vocabulary 1024, bfloat16, batch 4, 2048 cached tokens. "
            "Compiled: `torch.compile` on a static cache.\n",
        ]
        parts += [model_table(found["model"])]
    slow = slower_cells(found)
    parts += [f"## Slower than stock by more than {1 - BEHIND:.0%}\n"]
    parts += ["\n".join(f"- {line}" for line in slow) + "\n" if slow else "No cell.\n"]
    return "\n".join(parts)


def plot(found: dict, path: Path) -> None:
    """Time of one token over the context, batch 1, no mask: a panel for each dtype."""
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    cells = [cell for cell in found.get("one_token", []) if cell["batch"] == 1 and not cell["masked"]]
    if not cells:
        return
    figure = Figure(figsize=(10, 4), layout="constrained")
    FigureCanvasSVG(figure)
    for index, dtype in enumerate(("bfloat16", "float32")):
        axes = figure.add_subplot(1, 2, index + 1)
        for colour, kv_heads in enumerate((32, 8, 4, 1)):
            line = [cell for cell in cells if cell["dtype"] == dtype and cell["kv_heads"] == kv_heads]
            for way, style in (("stock", "--"), ("ours", "-")):
                milliseconds = [seconds(cell, way) * 1e3 for cell in line]
                label = f"{kv_heads} KV heads, {way}"
                axes.plot(
                    [cell["keys"] for cell in line], milliseconds, style, color=f"C{colour}", marker=".", label=label
                )
        axes.set(xscale="log", yscale="log", xlabel="cached tokens", ylabel="ms for one token", title=dtype)
        axes.legend(fontsize=7)
    figure.savefig(path, metadata={"Date": None})


if __name__ == "__main__":
    source = Path(sys.argv[1])
    results = json.loads(source.read_text())
    source.with_suffix(".md").write_text(markdown(results))
    plot(results, source.with_suffix(".svg"))
