"""hf-gqa teacher-logits: run the teacher once over a recipe's text and keep what it says."""

from pathlib import Path

import typer

from ..human_units import human_bytes
from ..uptrain.run import write_teacher_of_recipe
from .options import Json
from .printing import console, errors_as_messages, print_json
from .uptrain_options import with_uptrain_options


@with_uptrain_options
def teacher_logits(
    asked,
    student: str = typer.Argument(
        ..., help="Folder or Hub repository of the student that will be trained; its tokenizer is used."
    ),
    output: Path = typer.Argument(..., help="Folder to write; a stopped run goes on where it was."),
    top_k: int = typer.Option(64, help="Likeliest tokens kept at each position."),
    json: Json = False,
) -> None:
    """Run the teacher once over the text of a recipe and keep its likeliest tokens.

    For teachers that do not fit beside the student: give `hf-gqa uptrain` the same options and --teacher-logits OUTPUT.
    """
    with errors_as_messages(json):
        stored = write_teacher_of_recipe(student, output, asked.recipe(), top_k)
    facts = {"output": str(output), "bytes": stored.bytes_on_disk, "bytes_per_token": stored.bytes_per_token}
    if json:
        print_json(facts)
    else:
        console().print(
            f"Wrote {output}: {human_bytes(facts['bytes'])}, {human_bytes(facts['bytes_per_token'])} per token."
        )
