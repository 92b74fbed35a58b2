"""hf-gqa analyze: how alike layers attend, what it costs when they borrow, and the plan for a budget."""

from collections.abc import Sequence
from pathlib import Path

import typer
from rich.table import Table

from ..analyze import Analysis, AnalysisRecipe, AnalysisResult
from ..analyze.borrowing import BORROWED
from ..analyze.recipe import CHOOSERS, DTYPES
from ..analyze.result import PLAN_FILE, Chosen
from ..analyze.write_analysis import check_analysis_folder, write_analysis
from ..convert.donor import open_donor
from ..human_units import human_bytes, human_count
from ..staging import check_apart
from .options import Json, Revision, TrustRemoteCode, WeightsOnly
from .printing import console, errors_as_messages, print_json
from .recipe_options import with_options_of


HELP = {
    "text": "Text to look at the donor with: .txt, .jsonl, .parquet, or folders of them; repeatable.",
    "text_column": "Column to read; 'text', else 'messages', if not said.",
    "sharing": f"The pattern by which layers shall share: {', '.join(BORROWED)}.",
    "shared_layers": "Budget: how many layers shall borrow.",
    "cache_bytes_per_token": "Budget: the most cache per token, in bytes.",
    "parameters": "Budget: the most parameters.",
    "num_key_value_heads": "KV heads of every layer of the student; the donor's if not said.",
    "choose_by": f"What the plan goes by: {', '.join(CHOOSERS)}; kl if not said. Before training kl is better, after it often not.",
    "candidates": "Chosen by kl: measure so many of the cheapest sharings whole before one is the plan; 8 if not said.",
    "tokens": "Measure costs on so many tokens, and check choices on as many more; 16384 if not said.",
    "samples": "Average the similarity of attention over so many samples; 32 if not said.",
    "sample_tokens": "Tokens of a sample; 512, or the longest that the donor takes, if not said.",
    "reach": "Borrow only from so many layers before; from any if not said.",
    "block_layers": "Of which EchoAtt's own choice shares all but the first; 2 if not said.",
    "dtype": f"To compute in: {', '.join(DTYPES)} (auto: the donor's).",
    "device": "Such as cpu or cuda:1; the accelerator, if there is one, if not said.",
    "batch_size": "Rows at once.",
}


@with_options_of(AnalysisRecipe, HELP)
def analyze(
    asked,
    donor: str = typer.Argument(..., help="Folder or Hub repository of the donor; it is only read."),
    output_dir: Path = typer.Option(None, help="Folder to write: analysis.json, heatmap.svg and plan.yaml."),
    overwrite: bool = typer.Option(False, "--overwrite", help="Replace OUTPUT_DIR if it holds an analysis."),
    dry_run: bool = typer.Option(False, "--dry-run", help="Explain the analysis and measure nothing."),
    revision: Revision = None,
    weights_only: WeightsOnly = False,
    trust_remote_code: TrustRemoteCode = False,
    json: Json = False,
) -> None:
    """Find the layers of DONOR that can share, and make the plan for a budget.

    Each pair of layers is tried on the donor itself; what is chosen is measured again on other text.
    """
    with errors_as_messages(json):
        recipe = asked.recipe()
        if output_dir is not None:
            check_analysis_folder(output_dir, overwrite)
        opened = open_donor(donor, revision=revision, weights_only=weights_only, trust_remote_code=trust_remote_code)
        if output_dir is not None:
            check_apart(output_dir, opened.folder, "donor")
        analysis = Analysis(opened, recipe)
        explanation = analysis.explanation()
        if not json:
            print_explanation(explanation)
        result = None
        if not dry_run:
            result = analysis.run()
            if output_dir is not None:
                write_analysis(result, output_dir, overwrite=overwrite)
    if json:
        print_json(result.to_dict() if result else explanation | {"written": False})
    elif result is None:
        console().print("Nothing was measured (--dry-run).")
    else:
        print_result(result)
        if output_dir is not None:
            print_next(result, donor, output_dir)


def print_explanation(facts: dict) -> None:
    table = Table("", "", title=f"layers of {facts['donor']} that can share", title_justify="left", show_header=False)
    table.add_row(
        "pattern", f"{facts['sharing']}: {facts['pairs']} pairs of {facts['layers']} layers, each tried alone"
    )
    table.add_row("similarity", f"{facts['samples']} samples of {facts['sample_tokens']:,} tokens")
    table.add_row(
        "text", f"{facts['tokens_to_choose']:,} tokens to choose by, {facts['tokens_to_check']:,} to check with"
    )
    table.add_row("work", f"{facts['forward_passes']:,} rows read at most, about {duration(facts['seconds'])}")
    table.add_row("model", f"{facts['dtype']} on {facts['device']}")
    console().print(table)


def duration(seconds: float) -> str:
    """90 -> '2 min'."""
    if seconds < 60:
        return f"{max(1, round(seconds))} s"
    return f"{round(seconds / 60)} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def print_result(result: AnalysisResult) -> None:
    table = Table(
        *("borrow", "chooser", "layers", "KL", "summed KL", "loss", "same top token", "cache per token", "parameters"),
        title=f"{result.donor}, {result.sharing}, on {result.tokens_to_check:,} other tokens",
        title_justify="left",
    )
    cache, parameters = human_bytes(result.donor_cache_bytes_per_token), human_count(result.donor_parameters)
    table.add_row("0", "donor", "", "0", "", f"{result.donor_loss:.3f}", "100.0%", cache, parameters)
    for chosen, choosers in merged(result.choices):
        table.add_row(
            str(len(chosen.owners)),
            ", ".join(choosers),
            ", ".join(f"{borrower}<{owner}" for borrower, owner in chosen.owners),
            f"{chosen.kl:.3g}",
            "" if chosen.summed_kl is None else f"{chosen.summed_kl:.3g}",
            f"{chosen.loss:.3f}",
            f"{chosen.top1_agreement:.1%}",
            human_bytes(chosen.cache_bytes_per_token),
            human_count(chosen.parameters),
        )
    out = console()
    out.print(table)
    out.print("3<2: layer 3 borrows from layer 2. KL to the donor in nats per token; summed: of each borrower alone.")
    out.print(f"EchoAtt keeps {', '.join(map(str, result.kept)) or 'no layer'} untouched. {verdict(result)}")
    for note in result.notes:
        out.print(f"note: {note}")


def merged(choices: Sequence[Chosen]) -> list[tuple[Chosen, list[str]]]:
    """(choice, everyone who chose it), fewest borrowers first."""
    by_owners: dict[tuple, tuple[Chosen, list[str]]] = {}
    for chosen in choices:
        by_owners.setdefault(chosen.owners, (chosen, []))[1].append(chosen.chooser)
    return sorted(by_owners.values(), key=lambda pair: len(pair[0].owners))


def verdict(result: AnalysisResult) -> str:
    """Which chooser has the smaller KL, over the numbers of borrowers at which they differ."""
    by_number: dict[int, dict] = {}
    for chosen in result.choices:
        by_number.setdefault(len(chosen.owners), {}).setdefault(chosen.chooser, chosen)
    both = [found for found in by_number.values() if {"kl", "echoatt"} <= found.keys()]
    differing = [found for found in both if found["kl"].owners != found["echoatt"].owners]
    better = sum(found["kl"].kl < found["echoatt"].kl for found in differing)
    if not differing:
        return "Both choosers choose the same layers."
    return (
        f"Without training, chosen by KL beats chosen by similarity at {better} of {len(differing)} numbers of borrowers where "
        f"they differ."
    )


def print_next(result: AnalysisResult, donor: str, output_dir: Path) -> None:
    console().print(f"Wrote {output_dir}.")
    if result.plan is not None:
        console().print(f"Convert: hf-gqa convert {donor} ./my-student --plan {output_dir / PLAN_FILE}")
