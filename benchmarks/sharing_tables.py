"""The results of benchmarks/sharing.py: what each chooser chose, as Markdown and as a plot."""

import statistics
from pathlib import Path

from hf_gqa.analyze.borrowing import BORROWED
from hf_gqa.analyze.solver import cheapest_choices, choose, greedy_choices


CHOOSERS = ("kl", "echoatt", "every_2")


def pair_costs(results: list[dict], pattern: str) -> dict[tuple[int, int], float]:
    pairs = next(found["pairs"] for found in results if found["cell"] == f"pairs {pattern}")
    return {tuple(pair["owners"][0]): pair["kl"] for pair in pairs}


def chosen(results: list[dict], pattern: str) -> dict[str, dict[int, tuple[int, ...]]]:
    """By chooser and number of borrowers, the borrowers.

    "sum" has the smallest sum of pair costs, "kl" is the best of the `CANDIDATES` with the smallest, measured whole; "best" is what
    the held-out text itself would choose, "every_2" every second layer.
    """
    found = {one["cell"]: one for one in results}
    layers = len(found["similarity"]["similarity"])
    kinds, saved = ["layer"] * layers, [1] * layers
    costs = pair_costs(results, pattern)
    exact, greedy = cheapest_choices(kinds, costs, saved), greedy_choices(kinds, costs, saved)
    measured = {borrowers_of(one): one["kl"] for one in found[f"subsets {pattern}"]["subsets"]}
    listed = {borrowers_of(one): one["kl"] for one in found[f"shortlists {pattern}"]["shortlists"]}
    numbers = range(1, layers)
    return {
        "sum": {number: tuple(choose(exact, number).borrowers) for number in numbers},
        "kl": {n: min((s for s in listed if len(s) == n), key=listed.get) for n in numbers},
        "greedy": {number: tuple(greedy[number].borrowers) for number in numbers},
        "every_2": {layers // 2: tuple(range(1, layers, 2))},
        "echoatt": {number: tuple(sorted(found["similarity"]["ranked"][:number])) for number in numbers},
        "best": {n: min((s for s in measured if len(s) == n), key=measured.get) for n in numbers},
        "worst": {n: max((s for s in measured if len(s) == n), key=measured.get) for n in numbers},
    }


def borrowers_of(found: dict) -> tuple[int, ...]:
    return tuple(sorted(borrower for borrower, _ in found["owners"]))


def all_tables(results: list[dict]) -> str:
    found = [choice_table(results, pattern) for pattern in BORROWED]
    return "\n\n".join([*found, init_table(results), uptrained_table(results)])


def choice_table(results: list[dict], pattern: str) -> str:
    """Held-out text, no training: KL to the donor of each chooser's set, and where it stands among all of its size."""
    found = {one["cell"]: one for one in results}
    measured = {borrowers_of(one): one for one in found[f"subsets {pattern}"]["subsets"]}
    layers = len(found["similarity"]["similarity"])
    lines = [
        f"| {pattern}: layers that borrow | chooser | which | loss | KL | top-1 | place |",
        "|---|---|---|---|---|---|---|",
    ]
    for number in range(1, layers):
        of_size = sorted((s for s in measured if len(s) == number), key=lambda s: measured[s]["kl"])
        for chooser in ("best", "kl", "sum", "greedy", "echoatt", "worst"):
            layers_chosen = chosen(results, pattern)[chooser][number]
            one = measured[layers_chosen]
            lines.append(
                f"| {number} of {layers} ({number / layers:.0%}) | {chooser} | {', '.join(map(str, layers_chosen))} | "
                f"{one['loss']:.3f} | {one['kl']:.4f} | {one['top1_agreement']:.1%} | "
                f"{of_size.index(layers_chosen) + 1} of {len(of_size)} |"
            )
    return "\n".join(lines)


def untrained(results: list[dict], pattern: str, heads: int) -> dict[tuple[int, ...], dict[str, dict]]:
    """Borrowers -> how it began -> scores, for students that nobody trained."""
    found: dict[tuple[int, ...], dict[str, dict]] = {}
    for one in results:
        if "untrained" in one and (one["pattern"], one["num_key_value_heads"]) == (pattern, heads):
            found.setdefault(tuple(one["shared_layers"]), {})[one["shared_init"]] = one["untrained"]
    return found


def init_table(results: list[dict]) -> str:
    """Held-out text, no training: loss and KL of each way to begin."""
    lines = ["| pattern | KV heads | layers that borrow | own | mean | fit |", "|---|---|---|---|---|---|"]
    for pattern in BORROWED:
        for heads in (8, 2):
            for layers, ways in sorted(untrained(results, pattern, heads).items(), key=lambda one: (len(one[0]), one)):
                said = [
                    f"{ways[way]['loss']:.3f}, {ways[way]['kl']:.3f}" if way in ways else ""
                    for way in ("own", "mean", "fit")
                ]
                lines.append(f"| {pattern} | {heads} | {', '.join(map(str, layers)) or 'none'} | {' | '.join(said)} |")
    return "\n".join(lines)


def uptrained_table(results: list[dict]) -> str:
    """Means over seeds."""
    groups: dict[tuple, list[dict]] = {}
    for one in results:
        if "after" in one:
            key = one["budget_fraction"], one["num_key_value_heads"], one["pattern"], tuple(one["shared_layers"])
            groups.setdefault((*key, one.get("shared_init", "own")), []).append(one)
    lines = [
        "| tokens | KV heads | pattern | layers that borrow | chooser | begins | loss before | KL before | loss after | KL after | "
        "top-1 | seeds |"
    ]
    lines.append("|" + "---|" * 12)
    for (share, heads, pattern, layers, init), found in sorted(
        groups.items(), key=lambda pair: (pair[0][:3], len(pair[0][3]), pair[0][3:])
    ):
        picked = chosen(results, pattern)
        names = [name for name in (*CHOOSERS, "best") if picked[name].get(len(layers)) == layers]
        before = [statistics.fmean(one["before"][name] for one in found) for name in ("loss", "kl")]
        after = [statistics.fmean(one["after"][name] for one in found) for name in ("loss", "kl", "top1_agreement")]
        spread = f" ± {statistics.stdev(one['after']['loss'] for one in found):.3f}" if len(found) > 1 else ""
        lines.append(
            f"| {found[0]['tokens']:,} ({share:.0%}) | {heads} | {pattern} | {', '.join(map(str, layers))} | {', '.join(names)} | "
            f"{init} | {before[0]:.3f} | {before[1]:.3f} | {after[0]:.3f}{spread} | {after[1]:.3f} | {after[2]:.1%} | "
            f"{len(found)} |"
        )
    return "\n".join(lines)


COLORS = {"kl": "C0", "echoatt": "C3", "every_2": "C8", "best": "C2", "worst": "C7"}
FITTED = {8: ("C4", "all heads"), 2: ("C1", "2 KV heads")}
LINES = {"own": "-", "fit": "--"}
MARKERS = {0.01: "o", 0.05: "s"}


def plot(results: list[dict], path: Path) -> None:
    """KL over the fraction of layers that borrow, a column for each pattern, before uptraining above and after it below."""
    from matplotlib import style
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    with style.context({"svg.hashsalt": "sharing", "svg.fonttype": "none"}):
        figure = Figure(figsize=(13, 9), layout="constrained")
        FigureCanvasSVG(figure)
        panels = figure.subplots(2, 2, sharex=True, sharey="row")
        for row, draw, when in zip(panels, (plot_before, plot_after), ("before uptraining", "after"), strict=True):
            for axes, pattern in zip(row, BORROWED, strict=True):
                draw(axes, results, pattern)
                axes.set_yscale("log")
                axes.set_title(f"{pattern}, {when}")
                axes.grid(alpha=0.3)
            row[0].set_ylabel("KL to the donor on held-out text, nats per token")
            handles = {
                label: handle for axes in row for handle, label in zip(*axes.get_legend_handles_labels(), strict=True)
            }
            row[1].legend(handles.values(), handles.keys(), loc="center left", bbox_to_anchor=(1.02, 0.5), fontsize=8)
        for axes in panels[-1]:
            axes.set_xlabel("layers that borrow, %")
        figure.savefig(path, metadata={"Date": None})


def plot_before(axes, results: list[dict], pattern: str) -> None:
    found = {one["cell"]: one for one in results}
    layers = len(found["similarity"]["similarity"])
    measured = {borrowers_of(one): one["kl"] for one in found[f"subsets {pattern}"]["subsets"]}
    picked = chosen(results, pattern)
    for name, color in COLORS.items():
        x = [100 * number / layers for number in picked[name]]
        y = [measured[borrowers] for borrowers in picked[name].values()]
        line = "-" if name in CHOOSERS else ":"
        axes.plot(x, y, marker=".", color=color, label=f"{name}, own", linestyle=line)
    for heads, (color, words) in FITTED.items():
        known = untrained(results, pattern, heads)
        for init, line in (("own", "-."), ("fit", "--")):
            if (heads, init) == (8, "own"):
                continue  # is the line of kl
            points = [
                (100 * n / layers, known[s][init]["kl"]) for n, s in picked["kl"].items() if init in known.get(s, {})
            ]
            if points:
                axes.plot(*zip(*points, strict=True), color=color, linestyle=line, label=f"kl, {words}, {init}")


def plot_after(axes, results: list[dict], pattern: str) -> None:
    """Means over seeds; what both choosers pick is drawn as KL's."""
    picked = chosen(results, pattern)
    found: dict[tuple, dict[float, list[float]]] = {}
    for one in results:
        if "after" not in one or one["pattern"] != pattern:
            continue
        layers = tuple(one["shared_layers"])
        chooser = next(name for name in CHOOSERS if picked[name].get(len(layers)) == layers)
        kind = one["num_key_value_heads"], chooser, one.get("shared_init", "own"), one["budget_fraction"]
        found.setdefault(kind, {}).setdefault(100 * one["shared_fraction"], []).append(one["after"]["kl"])
    for (heads, chooser, init, share), points in sorted(found.items(), key=lambda pair: (-pair[0][0], *pair[0][1:])):
        x = sorted(points)
        axes.plot(
            x,
            [statistics.fmean(points[fraction]) for fraction in x],
            color=COLORS[chooser] if heads == 8 else FITTED[heads][0],
            linestyle=LINES[init],
            marker=MARKERS[share],
            label=f"{chooser}, {init}, {share:.0%}" + (f", {heads} KV heads" if heads != 8 else ""),
        )
