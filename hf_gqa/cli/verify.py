"""hf-gqa verify: check a student in a fresh process, and against its donor."""

from pathlib import Path

import typer

from ..convert.donor import open_donor
from ..export.verify import TOLERANCE
from ..export.verify import verify as run_checks
from ..refusal import shown
from .options import Json, Revision, WeightsOnly
from .printing import CHECK_FAILED, console, errors_as_messages, print_json


def verify(
    output: Path = typer.Argument(..., help="Folder of the student."),
    donor: str = typer.Option(None, help="Folder or Hub repository of its donor, to compare logits with."),
    revision: Revision = None,
    weights_only: WeightsOnly = False,
    dtype: str = typer.Option("float32", help=f"To compute in: {', '.join(TOLERANCE)}."),
    trust_remote_code: bool = typer.Option(
        False,
        "--trust-remote-code",
        help="Run a bundle's code even if it is not this hf_gqa's, and a donor's to compare.",
    ),
    json: Json = False,
) -> None:
    """Check the student in OUTPUT in a fresh process.

    It is loaded where hf_gqa cannot be imported, and compared with its manifest and, given the donor, with its logits.
    """
    with errors_as_messages(json):
        opened = None
        if donor:
            opened = open_donor(
                donor, revision=revision, weights_only=weights_only, trust_remote_code=trust_remote_code
            )
        checks = run_checks(output, opened, dtype=dtype, trust_remote_code=trust_remote_code)
    passed = all(check.passed is not False for check in checks)
    if json:
        print_json({"passed": passed, "checks": [check.to_dict() for check in checks]})
    else:
        marks = {True: "ok    ", False: "FAILED", None: "not run"}
        for check in checks:
            style = "red" if check.passed is False else None
            console().print(shown(f"{marks[check.passed]} {check.name}: {check.detail}"), style=style)
    if not passed:
        raise typer.Exit(CHECK_FAILED)
