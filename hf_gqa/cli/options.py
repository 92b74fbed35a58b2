"""Options that several commands have, with the same words."""

from typing import Annotated

import typer


Revision = Annotated[str | None, typer.Option(help="Branch, tag or commit of the donor on the Hub.")]
WeightsOnly = Annotated[bool, typer.Option("--weights-only", help="Read a donor that ships code as its native class.")]
TrustRemoteCode = Annotated[
    bool, typer.Option("--trust-remote-code", help="The same, after running the donor's code once to compare.")
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]
