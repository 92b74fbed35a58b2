"""hf-gqa uptrain: explain the run, then train a student and write it."""

from pathlib import Path

import typer
from rich.table import Table

from ..human_units import human_bytes, human_count
from ..uptrain.run import PLOT_FILE, RESULT_FILE, UptrainResult, UptrainRun
from .options import Json
from .printing import console, errors_as_messages, print_json
from .uptrain_options import with_uptrain_options


LEARNED = {
    "kl": "the teacher's token distribution",
    "cross_entropy": "the text",
    "teacher_choice": "the teacher's likeliest token",
    "attention_output": "the teacher's attention outputs",
    "hidden_state": "the teacher's hidden states",
}
TRAINED = {"all": "everything", "attention": "attention", "key_value": "key and value projections"}


@with_uptrain_options
def uptrain(
    asked,
    student: str = typer.Argument(..., help="Folder or Hub repository of the student; it is only read."),
    output: Path = typer.Argument(..., help="Folder to write; it appears complete or not at all."),
    resume: bool = typer.Option(False, "--resume", help="Go on with an unfinished run."),
    overwrite: bool = typer.Option(False, "--overwrite", help="Replace OUTPUT, and discard an unfinished run."),
    dry_run: bool = typer.Option(False, "--dry-run", help="Explain the run and train nothing."),
    json: Json = False,
) -> None:
    """Train the converted STUDENT for a budget of tokens and write it to OUTPUT.

    With --teacher it learns what the donor does, which takes far fewer tokens than the text alone.
    """
    with errors_as_messages(json):
        run = UptrainRun(student, output, asked.recipe(), overwrite=overwrite, resume=resume, explain_only=dry_run)
        first = run.trainer.is_world_process_zero()
        explanation = run.explanation()
        if first and not json:
            print_run(explanation)
        result = None if dry_run else run.train()
    if not first:
        return
    if json:
        print_json(explanation | {"written": not dry_run, "result": result.to_dict() if result else None})
    elif dry_run:
        console().print("Nothing was written (--dry-run).")
    else:
        print_result(result)


def print_run(facts: dict) -> None:
    table = Table("", "", title=f"{facts['student']} -> {facts['output']}", title_justify="left", show_header=False)
    rows = {
        "tokens": f"{facts['budget_tokens']:,} in {facts['steps']:,} steps of {facts['tokens_per_step']:,}",
        "text": f"{passes_in_words(facts['corpus_passes'])}, {facts['held_out_tokens']:,} tokens held out",
        "trained": f"{human_count(facts['trained_parameters'])} of {human_count(facts['parameters'])} parameters",
        "memory": f"weights {human_bytes(facts['weight_bytes'])}, gradients and AdamW "
        f"{human_bytes(facts['gradient_and_optimizer_bytes'])}, and activations",
        "learning rate": f"{facts['learning_rate']:g}",
        "teacher": facts["teacher"] or "none: the text alone",
    }
    if facts["teacher_own_bytes"] is not None:
        rows["teacher memory"] = (
            f"{human_bytes(facts['teacher_own_bytes'])} of its own, {human_bytes(facts['teacher_shared_bytes'])} are "
            f"the student's"
        )
    if facts["teacher_disk_bytes"] is not None:
        rows["teacher memory"] = f"none, {human_bytes(facts['teacher_disk_bytes'])} on disk are read a batch at a time"
    for name, value in rows.items():
        table.add_row(name, value)
    out = console()
    out.print(table)
    adapters = f"adapters of rank {facts['lora_rank']}, key and value projections in full"
    trained = TRAINED | (dict.fromkeys(("all", "attention"), adapters) if facts["lora_rank"] else {})
    total = sum(phase["share"] for phase in facts["phases"])
    for phase in facts["phases"]:
        weights = {name: phase["objective"][name] for name in LEARNED if phase["objective"][name]}
        parts = [LEARNED[name] if value == 1 else f"{value:g} x {LEARNED[name]}" for name, value in weights.items()]
        forced = ", each layer on the teacher's input to it" if phase["objective"]["teacher_forced"] else ""
        out.print(
            f"phase: {phase['share'] / total:.0%} of the tokens; train {trained[phase['train']]}; "
            f"learn {' + '.join(parts)}{forced}"
        )


def passes_in_words(passes: float | None) -> str:
    return "a stream" if passes is None else f"{passes:,.2f} times over the corpus"


def print_result(result: UptrainResult) -> None:
    before, after = result.before, result.after
    table = Table("held out", "before", "after", "teacher")
    for key, name, form in (
        ("eval_loss", "loss, nats per token", ".3f"),
        ("eval_kl_nats_per_token", "KL to the teacher, nats", ".4f"),
        ("eval_top1_agreement_fraction", "same likeliest token", ".1%"),
        ("eval_gap_closed_fraction", "gap to the teacher closed", ".1%"),
    ):
        if key in after:
            of_teacher = format(after["eval_teacher_loss"], form) if name.startswith("loss") and len(after) > 1 else ""
            table.add_row(
                name, format(before[key], form) if key in before else "", format(after[key], form), of_teacher
            )
    out = console()
    out.print(table)
    out.print(f"{result.tokens_seen:,} tokens in {result.seconds:,.0f} s, {result.tokens_per_second:,.0f} per second.")
    out.print(f"Wrote {result.output}: the student, {RESULT_FILE} with the log, and {PLOT_FILE}.")
