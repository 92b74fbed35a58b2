"""Options that several commands have, with the same words."""

from pathlib import Path
from typing import Annotated

import typer

from ..export.calibration_text import DEFAULT_TOKENS


Revision = Annotated[str | None, typer.Option(help="Branch, tag or commit of the donor on the Hub.")]
WeightsOnly = Annotated[bool, typer.Option("--weights-only", help="Read a donor that ships code as its native class.")]
TrustRemoteCode = Annotated[
    bool, typer.Option("--trust-remote-code", help="The same, after running the donor's code once to compare.")
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]
CalibrationFiles = Annotated[
    list[str] | None,
    typer.Option(
        "--calibration",
        help="Text that methods look at the donor with: files or folders, or what --save-calibration kept. Without any "
        "they go by the weights alone.",
    ),
]
CalibrationDataset = Annotated[
    str | None,
    typer.Option(help="In place of --calibration: a dataset, as NAME, NAME:CONFIGURATION or NAME:CONFIGURATION:SPLIT."),
]
CalibrationTokens = Annotated[
    int | None,
    typer.Option(help=f"Tokens of --calibration, by default {DEFAULT_TOKENS:,}; without it, the donor writes them."),
]
SaveCalibration = Annotated[
    Path | None, typer.Option(help="File to keep what was gathered in, for another --calibration; *.safetensors.")
]
