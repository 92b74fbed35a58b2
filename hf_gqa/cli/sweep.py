"""hf-gqa sweep: many plans for one donor in one table."""

from dataclasses import asdict
from pathlib import Path

import typer
from rich.table import Table

from ..evaluate.recipe import EvaluationRecipe
from ..human_units import human_bytes
from ..methods import METHODS
from ..refusal import Refusal
from ..sharing import SHARINGS
from ..uptrain.recipe import UptrainRecipe
from ..workflow.run_recipe import taught_by
from ..workflow.sweep import Sweep
from ..workflow.sweep_table import PLOT_FILE, SWEEP_FILE, TABLE_FILE, SweepTable
from .evaluate import HELP
from .options import CalibrationFiles, CalibrationTokens, Json
from .printing import console, errors_as_messages, print_json
from .recipe_options import with_options_of


@with_options_of(EvaluationRecipe, HELP)
def sweep(
    asked,
    donor: str = typer.Argument(..., help="Folder or Hub repository of the donor; it is only read."),
    output_dir: Path = typer.Argument(..., help="Folder to write; plans that it holds already are not run again."),
    num_key_value_heads: str = typer.Option(..., help="KV heads, comma-separated, such as 8,4,2,1."),
    methods: str = typer.Option("mean_pool", help=f"Comma-separated: {', '.join(METHODS.names())}; join steps with +."),
    sharing: str = typer.Option("own", help=f"Sharing patterns, comma-separated: {', '.join(SHARINGS.names())}."),
    calibration: CalibrationFiles = None,
    calibration_tokens: CalibrationTokens = None,
    uptrain: Path = typer.Option(None, help="YAML with keys of hf-gqa uptrain; the donor teaches if not said."),
    keep_students: bool = typer.Option(False, "--keep-students", help="Leave the students on disk, not only reports."),
    overwrite: bool = typer.Option(False, "--overwrite", help="Discard an earlier sweep in OUTPUT_DIR."),
    json: Json = False,
) -> None:
    """Convert DONOR by every combination, uptrain and evaluate each, and compare them.

    Run it again after an interruption, or with more plans: what is there is kept.
    """
    with errors_as_messages(json):
        uptraining = None
        if uptrain is not None:
            uptraining = UptrainRecipe.from_dict(taught_by(donor, UptrainRecipe.read(uptrain)), str(uptrain))
        ready = Sweep(
            donor,
            output_dir,
            whole_numbers(num_key_value_heads),
            asked.recipe(),
            methods=tuple(method.replace("+", ",") for method in methods.split(",")),
            sharings=tuple(sharing.split(",")),
            calibration=calibration or (),
            calibration_tokens=calibration_tokens,
            uptraining=uptraining,
            keep_students=keep_students,
            overwrite=overwrite,
            announce=(lambda *_: None) if json else print_plan,
        )
        table = ready()
    if json:
        print_json(asdict(table))
    else:
        print_table(table)
        names = ", ".join(str(output_dir / name) for name in (SWEEP_FILE, TABLE_FILE, PLOT_FILE))
        console().print(f"Wrote {names}.")


def whole_numbers(text: str) -> list[int]:
    """'8,4,2' -> [8, 4, 2]; raises Refusal for anything else."""
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise Refusal(f"num_key_value_heads = '{text}': not whole numbers. Give such as 8,4,2,1.") from None


def print_plan(name: str, number: int, plans: int) -> None:
    console().print(f"plan {number} of {plans}: {name}")


def print_table(table: SweepTable) -> None:
    cached = table.donor_cache_bytes_per_token is not None
    size = "cache per token" if cached else "parameters"
    of_donor = human_bytes(table.donor_cache_bytes_per_token) if cached else f"{table.donor_parameters:,}"
    shown = Table("plan", size, "loss", "over the donor", "KL", "same top token", "decode", "allowed")
    shown.add_row("donor", of_donor, f"{table.donor_loss_nats_per_token:.3f}", *[""] * 5)
    for row in table.rows:
        interval = row.loss_difference
        over = f"{row.loss_nats_per_token - table.donor_loss_nats_per_token:+.3f}"
        over += f" [{interval.low:+.3f}, {interval.high:+.3f}]" if interval is not None else ""
        speed, allowed = (f"{x:.2f}x" if x else "" for x in (row.decode_speedup, row.allowed_decode_speedup))
        shown.add_row(
            f"{row.plan} {'*' if row.on_front else ''}",
            f"{human_bytes(row.size)} ({row.cache_fraction:.3g})" if cached else f"{row.size:,}",
            f"{row.loss_nats_per_token:.3f}",
            over,
            f"{row.kl_nats_per_token:.3f}",
            f"{row.top1_agreement_fraction:.1%}",
            speed,
            allowed,
        )
    console().print(shown)
    console().print(f"* no other plan has both {'a smaller cache' if cached else 'fewer parameters'} and a lower loss.")
