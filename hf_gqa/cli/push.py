"""hf-gqa push: check a student and upload it, or write the folder that would be uploaded."""

from pathlib import Path

import typer
from huggingface_hub import constants

from ..convert.donor import open_donor
from ..export.push import PushPlan, PushResult, plan_push, upload, write_instead
from ..human_units import human_bytes
from .options import Json
from .printing import console, errors_as_messages, failed_check_as_message, print_json


def push(
    student: Path = typer.Argument(..., metavar="DIR", help="Folder of the student."),
    repo_id: str = typer.Argument(..., help="Repository on the Hub, owner/name; made if there is none."),
    public: bool = typer.Option(False, "--public", help="Let everybody see it; otherwise it is private."),
    revision: str = typer.Option(None, help="Branch, made if there is none. [default: main]"),
    commit_message: str = typer.Option(None, help="First line of the commit. [default: donor and heads]"),
    donor: str = typer.Option(None, help="Folder or Hub repository of its donor, to compare logits with first."),
    trust_remote_code: bool = typer.Option(
        False, "--trust-remote-code", help="Run a bundle's code even if it is not this hf_gqa's, to check it."
    ),
    no_card: bool = typer.Option(False, "--no-card", help="Push a student without a model card."),
    dry_run: bool = typer.Option(False, "--dry-run", help="Write the folder that would be pushed, as when offline."),
    output: Path = typer.Option(None, help="That folder. [default: pushed/NAME]"),
    overwrite: bool = typer.Option(False, "--overwrite", help="Replace that folder."),
    json: Json = False,
) -> None:
    """Check the student in DIR and push it to the Hub, with its recipe in the commit.

    With HF_HUB_OFFLINE=1 it writes the folder that it would push. Log in first: hf auth login.
    """
    with errors_as_messages(json), failed_check_as_message(json):
        opened = open_donor(donor, trust_remote_code=trust_remote_code) if donor else None
        plan = plan_push(
            student,
            repo_id,
            public=public,
            revision=revision,
            commit_message=commit_message,
            donor=opened,
            trust_remote_code=trust_remote_code,
            needs_card=not no_card,
        )
        if not json:
            _announce(plan)
        if dry_run or constants.HF_HUB_OFFLINE:
            folder = write_instead(plan, output or Path("pushed") / repo_id.rpartition("/")[2], overwrite=overwrite)
            done = {**plan.to_dict(), "pushed": False, "output": str(folder)}
            said = f"Nothing was sent ({'--dry-run' if dry_run else 'HF_HUB_OFFLINE is set'}). Wrote {folder}."
        else:
            result = upload(plan)
            done = {**result.to_dict(), "pushed": True}
            said = _in_words(result)
    print_json(done) if json else console().print(said)


def _in_words(result: PushResult) -> str:
    if not (result.uploaded or result.removed):
        return f"Nothing to push, {result.repo_id} has all of it: {result.url}"
    there = len(result.files) - len(result.uploaded)
    unchanged = f" Not sent, for they are there already: {there} of {len(result.files)} files." if there else ""
    removed = f" Removed from there: {', '.join(result.removed)}." if result.removed else ""
    return f"Pushed {result.url}.{unchanged}{removed}"


def _announce(plan: PushPlan) -> None:
    """What will be sent where, before it is."""
    seen = "public: everybody will see it" if plan.public else "private"
    console().print(f"{plan.folder} -> {plan.repo_id} on branch {plan.revision}, {seen}")
    width = max(len(file) for file in plan.files)
    for file in plan.files:
        console().print(f"  {file:<{width}}  {human_bytes((plan.folder / file).stat().st_size)}")
    console().print(f"  {len(plan.files)} files, {human_bytes(plan.size_bytes)} in all")
    console().print(f"commit: {plan.title}")
