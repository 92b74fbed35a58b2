"""hf-gqa evaluate: measure a student against its donor, and write the report."""

from pathlib import Path

import typer
from rich.table import Table

from ..convert.donor import open_donor
from ..evaluate.evaluation import Evaluation
from ..evaluate.page.write_report import check_report_folder, write_report
from ..evaluate.recipe import DTYPES, EvaluationRecipe
from ..evaluate.report import PAGE_FILE, REPORT_FILE
from ..human_units import human_bytes
from .options import Json, Revision, TrustRemoteCode, WeightsOnly
from .printing import console, errors_as_messages, print_json
from .recipe_options import with_options_of
from .report_tables import print_report


HELP = {
    "text": "Text never trained on: .txt, .jsonl, .parquet, or folders of them; repeatable. For encoder-decoders, rows with "
    "a source and a target.",
    "dataset_name": "Text: a dataset on the Hub or in a folder.",
    "dataset_config_name": "Its configuration.",
    "dataset_split": "Its split; 'test' if not said.",
    "text_column": "Column to read; 'text', else 'messages', if not said.",
    "source_column": "Of an encoder-decoder's text: text, or a list of texts to be joined; 'source' if not said.",
    "target_column": "Of it: text, or a list of references; 'target' if not said.",
    "streaming": "Read the dataset as it comes.",
    "sampled_tokens": "No text at all: the donor writes so many tokens.",
    "max_tokens": "Score only so many tokens; all if not said.",
    "context_length": "Most tokens before a prediction, or of a source; what the models take, up to 2048, if not said.",
    "stride": "Tokens scored in each further window; the context length if not said.",
    "batch_size": "Windows at once.",
    "dtype": f"To compute in, and of the cache: {', '.join(DTYPES)} (auto: the donor's).",
    "device": "Such as cpu or cuda:1; the accelerator, if there is one, if not said.",
    "attn_implementation": "Such as sdpa or eager.",
    "seed": "Of prompts and resamples.",
    "resamples": "Of the bootstrap; 2000 if not said.",
    "confidence": "Of its intervals; 0.95 if not said.",
    "retrieval_samples": "Prompts for each recall task and length; 32 if not said, 0 for none.",
    "tasks": "lm_eval tasks; local_* are read from --tasks-folder; repeatable.",
    "tasks_folder": "Folder of the jsonl files of local tasks.",
    "limit": "Documents of each task; all if not said.",
    "num_fewshot": "Worked examples before each; the task's own number if not said.",
    "speed": "Time reading and decoding.",
    "speed_batch_sizes": "Sequences at once; 1 and 8 if not said; repeatable.",
    "speed_context_lengths": "Lengths of the prompts; repeatable.",
    "repetitions": "Medians are over so many pairs of runs.",
    "decode_tokens": "Tokens decoded in each run.",
    "peak_memory": "Measure it, in a process for each model.",
    "memory": "For which the context that fits is computed; 24GB if not said; repeatable.",
    "prompts": "To continue; some from the text if not said; repeatable.",
    "continuation_tokens": "How long the continuations are.",
    "rouge_pairs": "Sources of an encoder-decoder that targets are written for; all if not said, 0 for none.",
    "num_beams": "With which they are written; 1, greedy decoding, if not said.",
    "generation_tokens": "Most tokens of what is written; 128 if not said.",
}


@with_options_of(EvaluationRecipe, HELP)
def evaluate(
    asked,
    student: str = typer.Argument(..., help="Folder or Hub repository of the student; it is only read."),
    donor: str = typer.Option(..., help="Folder or Hub repository of its donor."),
    output_dir: Path = typer.Option(..., help=f"Folder to write: {REPORT_FILE} and {PAGE_FILE}."),
    converted: str = typer.Option(None, help="The student before uptraining, to show what it wrote."),
    overwrite: bool = typer.Option(False, "--overwrite", help="Replace OUTPUT_DIR if it holds a report."),
    dry_run: bool = typer.Option(False, "--dry-run", help="Explain the evaluation and measure nothing."),
    revision: Revision = None,
    weights_only: WeightsOnly = False,
    trust_remote_code: TrustRemoteCode = False,
    json: Json = False,
) -> None:
    """Measure STUDENT against its donor: quality with intervals, recall, tasks, cache, memory and speed.

    Both read the same text, which should be text that neither was trained on. Encoder-decoders are measured on pairs, with
    ROUGE; encoders on masked tokens and by their embeddings.
    """
    with errors_as_messages(json):
        recipe = asked.recipe()
        check_report_folder(output_dir, overwrite)
        opened = open_donor(donor, revision=revision, weights_only=weights_only, trust_remote_code=trust_remote_code)
        evaluation = Evaluation(student, opened, recipe, converted=converted, donor_name=donor)
        explanation = evaluation.explanation()
        if not json:
            print_evaluation(explanation)
        report = None
        if not dry_run:
            report = evaluation.run()
            write_report(report, output_dir, overwrite=overwrite)
    if json:
        print_json(report.to_dict() if report else explanation | {"written": False})
    elif report is None:
        console().print("Nothing was measured (--dry-run).")
    else:
        print_report(report)
        console().print(f"Wrote {output_dir / PAGE_FILE}, which shows all of it, and {output_dir / REPORT_FILE}.")


def print_evaluation(facts: dict) -> None:
    table = Table("", "", title=f"{facts['student']} against {facts['donor']}", title_justify="left", show_header=False)
    table.add_row("text", f"{facts['text_tokens']:,} tokens, {human_bytes(facts['text_bytes'])}")
    stride = "" if facts["stride_tokens"] == facts["context_tokens"] else f", {facts['stride_tokens']:,} scored in each"
    table.add_row("windows", f"{facts['context_tokens']:,} tokens{stride}, {facts['batch_size']} at once")
    table.add_row("models", f"{facts['dtype']} on {facts['device']}")
    if facts.get("pairs"):
        table.add_row("pairs", f"{facts['pairs']:,}; targets are written for {facts['rouge_pairs']:,}")
    if facts.get("masked_tokens"):
        table.add_row("masked", f"{facts['masked_tokens']:,} tokens")
    if facts["recall_prompts_per_length"]:
        table.add_row("recall", f"{facts['recall_prompts_per_length']} prompts for each task and length")
    if facts["tasks"]:
        table.add_row("tasks", ", ".join(facts["tasks"]))
    if facts["speed_points"]:
        table.add_row("speed", f"{facts['speed_points']} sizes of batch and context")
    console().print(table)
