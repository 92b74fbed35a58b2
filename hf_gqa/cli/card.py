"""hf-gqa card: the model card of a student from the report of its evaluation, or hold a card against its report."""

from pathlib import Path

import typer

from ..evaluate.report import PAGE_FILE, Report
from ..export.card_lint import lint_card
from ..export.licence import find_licence, licence_of_donor
from ..export.model_card import is_ours, make_card, write_card
from ..export.pushed_files import CARD_FILE, EVALUATION_FOLDER
from ..refusal import Refusal
from ..staging import replace_file
from .options import Json
from .printing import CHECK_FAILED, console, errors_as_messages, print_json


def card(
    student: Path = typer.Argument(..., help="Folder of the student."),
    report: Path = typer.Option(
        None, help="report.json of its evaluation, or the folder with it. [default: the one beside its card]"
    ),
    output: Path = typer.Option(None, help="File to write. [default: README.md of the student, with its report]"),
    donor: str = typer.Option(None, help="Folder or Hub repository of its donor, whose card states the licence."),
    name: str = typer.Option(None, help="What readers load it by, owner/name. [default: the folder's name]"),
    base_model: str = typer.Option(None, help="The donor's Hub repository, where a copy of it was converted."),
    overwrite: bool = typer.Option(False, "--overwrite", help="Replace a card that hf-gqa did not make."),
    check: bool = typer.Option(False, "--check", help="Write nothing; compare the card that is there with the report."),
    json: Json = False,
) -> None:
    """Make the model card of STUDENT from the report of its evaluation.

    The report goes along into the student's folder, so that whoever reads the card can check it.
    """
    with errors_as_messages(json):
        student = student.expanduser()
        source = (report or student / EVALUATION_FOLDER).expanduser()
        values = Report.read(source)
        target = (output or student / CARD_FILE).expanduser()
        if check:
            problems = _check(target, values, student, json)
            if problems:
                raise typer.Exit(CHECK_FAILED)
            return
        _refuse_others(target, overwrite)
        licence = licence_of_donor(donor, student) if donor else find_licence(student)
        made = make_card(values, student, name=name, base_model=base_model, licence=licence)
        if output is None:
            page = (source if source.is_dir() else source.parent) / PAGE_FILE
            write_card(made, values, student, licence, page if page.is_file() else None)
        else:
            replace_file(target, str(made))
    if json:
        print_json({"card": str(target), "metadata": made.data.to_dict()})
    else:
        stated = licence.license_name or licence.license or "none"
        console().print(f"Wrote {target}. Licence: {stated}, {licence.source}.")
        console().print(f"Push it with the student: hf-gqa push {student} OWNER/NAME")


def _check(target: Path, report: Report, student: Path, as_json: bool) -> list[str]:
    if not target.is_file():
        raise Refusal(f"{target}: no such card. Make it with hf-gqa card {student} --report REPORT.")
    problems = lint_card(target.read_text(encoding="utf-8", errors="replace"), report, student)
    if as_json:
        print_json({"card": str(target), "problems": problems})
    else:
        for problem in problems:
            console().print(f"{target}:{problem}", style="red")
        if not problems:
            console().print(f"{target}: every number is one of the report")
    return problems


def _refuse_others(target: Path, overwrite: bool) -> None:
    if target.is_dir():
        raise Refusal(f"{target}: is a folder. Give a file, such as {target / CARD_FILE}.")
    if target.is_file() and not overwrite and not is_ours(target.read_text(encoding="utf-8", errors="replace")):
        raise Refusal(
            f"{target}: exists, and hf-gqa did not make it. Give --overwrite to replace it, or another --output."
        )
