"""hf-gqa refresh: give a bundle that an older hf_gqa wrote the code of this one."""

import json as json_text
from pathlib import Path

import typer

from ..export.refresh import FileChange, RefreshPlan, carry_out, plan_refresh
from ..human_units import human_bytes
from .options import Json
from .printing import console, errors_as_messages, failed_check_as_message, print_json


SHOWN_OF_A_HASH = 8


def refresh(
    folder: Path = typer.Argument(
        ..., metavar="DIR", help="Folder of the bundle; replaced at one stroke or not at all."
    ),
    dry_run: bool = typer.Option(False, "--dry-run", help="Show what would change and write nothing."),
    overwrite_modified: bool = typer.Option(
        False,
        "--overwrite-modified",
        help="Replace code that was changed since it was written, and remove code that is not of hf_gqa.",
    ),
    json: Json = False,
) -> None:
    """Renew the code of the bundle in DIR, which an older hf_gqa wrote.

    Weights and all other files stay byte for byte. What will be done is shown first, and verify passes before it is.
    """
    with errors_as_messages(json), failed_check_as_message(json):
        plan = plan_refresh(folder, overwrite_modified=overwrite_modified)
        if not json:
            _announce(plan)
        checks = [] if dry_run else carry_out(plan)
    if json:
        done = {"written": plan.is_needed and not dry_run, "checks": [check.to_dict() for check in checks]}
        print_json(plan.to_dict() | done)
    elif dry_run:
        console().print("Nothing was written (--dry-run).")
    elif plan.is_needed:
        console().print(f"Refreshed {folder}; verify passed.")


def _announce(plan: RefreshPlan) -> None:
    """What will change, before it does."""
    out, before, after = console(), plan.versions_before, plan.versions_after
    if not plan.is_needed:
        out.print(f"Nothing to refresh: {plan.folder} has the code of this hf_gqa ({after['hf_gqa']}).")
        return
    out.print(f"{plan.folder} ({plan.model_type})")
    for name in after:
        out.print(f"  {name}: {before.get(name)} -> {after[name]}")
    width = max((len(change.file) for change in plan.files), default=0)
    for change in plan.files:
        out.print(f"  {change.change:<7}  {change.file:<{width}}  {_sides(change)}")
    for key, (old, new) in plan.config.items():
        out.print(f"  config.json: {key}: {json_text.dumps(old)} -> {json_text.dumps(new)}")
    if plan.modified:
        out.print(f"  lost, for no hf_gqa shipped it: {', '.join(plan.modified)}")


def _sides(change: FileChange) -> str:
    sides = ((change.sha256_before, change.bytes_before), (change.sha256_after, change.bytes_after))
    return " -> ".join(f"{sha256[:SHOWN_OF_A_HASH]} {human_bytes(size)}" for sha256, size in sides if sha256)
