"""hf-gqa run: one recipe from donor to card."""

from dataclasses import asdict
from pathlib import Path

import typer

from ..evaluate.report import PAGE_FILE
from ..workflow.run_recipe import REPORT, STUDENT, Run, read_run_recipe
from .convert import print_explanation
from .evaluate import print_evaluation
from .options import Json
from .printing import console, errors_as_messages, print_json
from .report_tables import print_report
from .uptrain import print_run


def run(
    recipe: Path = typer.Argument(..., help="YAML with donor, output_dir, convert, evaluate, and perhaps uptrain."),
    output_dir: str = typer.Option(None, help="Folder for all that is made; wins over the recipe's."),
    donor: str = typer.Option(None, help="Folder or Hub repository; wins over the recipe's."),
    resume: bool = typer.Option(
        False, "--resume", help="Go on with an earlier run; a changed evaluation is done again."
    ),
    overwrite: bool = typer.Option(
        False, "--overwrite", help="Discard an earlier run; with --resume only what its recipe no longer asks for."
    ),
    dry_run: bool = typer.Option(False, "--dry-run", help="Check the recipe, explain the conversion, do nothing."),
    json: Json = False,
) -> None:
    """Convert, uptrain, evaluate and write the card, as RECIPE says.

    The folder then holds the student with its card, ready for hf-gqa push, and the report.
    """
    instead = {name: value for name, value in (("output_dir", output_dir), ("donor", donor)) if value is not None}
    with errors_as_messages(json):
        announce = (lambda stage, facts: None) if json else print_stage
        ready = Run(read_run_recipe(recipe, **instead), resume=resume, overwrite=overwrite, announce=announce)
        if dry_run and not json:
            print_stage("convert", ready.conversion)
        report = None if dry_run else ready()
    folder = ready.folder
    if json:
        facts = {"recipe": ready.recipe.to_dict(), "conversion": asdict(ready.conversion), "written": not dry_run}
        print_json(facts | {"report": report.to_dict() if report else None})
    elif report is None:
        console().print("Nothing was done (--dry-run).")
    else:
        print_report(report)
        console().print(f"Wrote {folder / STUDENT} with its card, and {folder / REPORT / PAGE_FILE}.")


def print_stage(stage: str, facts) -> None:
    out = console()
    out.print()
    if stage == "convert":
        print_explanation(facts, "student")
    elif stage == "uptrain":
        print_run(facts)
    elif stage == "evaluate":
        print_evaluation(facts)
