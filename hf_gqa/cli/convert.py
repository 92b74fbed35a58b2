"""hf-gqa convert: explain the plan, then write the student."""

from dataclasses import replace
from pathlib import Path

import torch
import typer
from rich.table import Table

from ..convert.calibration import Calibration, calibrate
from ..convert.donor import Donor, open_donor
from ..convert.plan import EXPORTS, ConversionPlan
from ..convert.target import choose_target
from ..export.calibration_text import DEFAULT_TOKENS, SAVED, calibration_text, dataset_source, memory_note
from ..export.explanation import Explanation, explain
from ..export.write_student import convert_checkpoint
from ..human_units import human_bytes, human_count
from ..methods import METHODS
from ..refusal import Refusal
from ..staging import check_output
from ..workflow.search_plan import FoundPlan
from .options import (
    CalibrationDataset,
    CalibrationFiles,
    CalibrationTokens,
    Json,
    Revision,
    SaveCalibration,
    TrustRemoteCode,
    WeightsOnly,
)
from .plan_options import (
    ConvertEncoder,
    PlanFile,
    SharedInit,
    SharedLayers,
    ShareEvery,
    Sharing,
    asked_plan,
    read_plan,
)
from .printing import all_heads_in_words, cache_in_words, console, errors_as_messages, print_json
from .search_options import CacheBudget, KvBudget, LayerHeads, WantedSearch, plan_fields, print_search, wanted_search


METHOD_HELP = f"Conversion methods, comma-separated: {', '.join(METHODS.names())}; or auto, which tries some on the calibration text."


def convert(
    context: typer.Context,
    donor: str = typer.Argument(..., help="Folder or Hub repository of the donor; it is only read."),
    output: Path = typer.Argument(..., help="Folder to write; it appears complete or not at all."),
    num_key_value_heads: int | None = typer.Option(
        None, help="KV heads of every layer of the student; 1 is multi-query. With --sharing, by default the donor's."
    ),
    method: str = typer.Option("mean_pool", help=METHOD_HELP),
    export: str = typer.Option("auto", help=f"How to export: {', '.join(EXPORTS)}."),
    sharing: Sharing = "own",
    shared_layers: SharedLayers = None,
    share_every: ShareEvery = None,
    shared_init: SharedInit = "own",
    plan_file: PlanFile = None,
    layer_heads: LayerHeads = None,
    kv_budget: KvBudget = None,
    cache_budget: CacheBudget = None,
    convert_encoder: ConvertEncoder = False,
    seed: int = typer.Option(0, help="Seed of methods that draw random numbers."),
    calibration: CalibrationFiles = None,
    calibration_dataset: CalibrationDataset = None,
    calibration_tokens: CalibrationTokens = None,
    save_calibration: SaveCalibration = None,
    revision: Revision = None,
    dry_run: bool = typer.Option(False, "--dry-run", help="Explain the plan and write nothing."),
    overwrite: bool = typer.Option(False, "--overwrite", help="Replace OUTPUT if it holds a model."),
    weights_only: WeightsOnly = False,
    trust_remote_code: TrustRemoteCode = False,
    json: Json = False,
) -> None:
    """Convert DONOR and write the student to OUTPUT.

    The student has fewer KV heads, or more with `expand`. What will be done is explained first.
    """
    with errors_as_messages(json):
        asked = plan_fields(context.params)
        wanted = wanted_search(asked, plan_file, kv_budget, cache_budget)
        plan = None if wanted else read_plan(plan_file, asked) if plan_file is not None else asked_plan(asked)
        check_output(output, overwrite, None)
        opened = open_donor(donor, revision=revision, weights_only=weights_only, trust_remote_code=trust_remote_code)
        check_output(output, overwrite, opened.folder)
        text = (calibration or [], calibration_dataset, calibration_tokens, seed, save_calibration)
        explanation, choice = _convert(opened, output, plan or wanted, text, dry_run, overwrite, json)
    _say_what_was_done(explanation, donor, output, dry_run, choice, json)


def _convert(
    donor: Donor,
    output: Path,
    plan: ConversionPlan | WantedSearch,
    text: tuple,
    dry_run: bool,
    overwrite: bool,
    json: bool,
) -> tuple[Explanation, dict | None]:
    """The explanation and, of a plan that was to be found, what was tried."""
    known = found = None
    if isinstance(plan, WantedSearch):
        known = _made(donor, _calibration(donor, *text))
        found = plan.search(donor, known)
        plan = found.plan
    explanation = explain(donor, plan, choose_target(donor, plan))
    explanation = replace(explanation, notes=(*explanation.notes, *_memory_notes(donor, plan, *text)))
    choice = found and found.to_dict()
    if not json:
        _print_plan(explanation, output, found)
    if not dry_run:
        known = _calibration(donor, *text) if known is None else known
        convert_checkpoint(donor, output, plan, calibration=known, choice=choice, overwrite=overwrite)
    return explanation, choice


def _say_what_was_done(
    explanation: Explanation, donor: str, output: Path, dry_run: bool, choice: dict | None, json: bool
) -> None:
    if json:
        said = {"output": str(output), "written": not dry_run} | ({} if choice is None else {"choice": choice})
        print_json(explanation.to_dict() | said)
    else:
        written = f"Wrote {output}. Check it: hf-gqa verify {output} --donor {donor}"
        console().print("Nothing was written (--dry-run)." if dry_run else written)


def _calibration(
    donor: Donor, files: list[str], dataset: str | None, tokens: int | None, seed: int, save: Path | None
) -> Calibration | torch.Tensor | None:
    """What is known of the donor; rows of text where that is all that is asked for, which take less memory."""
    if save is not None and save.suffix != SAVED:
        raise Refusal(f"--save-calibration {save}: a calibration is a {SAVED} file. Give it such a name.")
    if not files and dataset is None and tokens is None:
        if save is not None:
            raise Refusal("--save-calibration: there is none. Give --calibration or --calibration-tokens.")
        return None
    source = None if dataset is None else dataset_source(dataset)
    known = calibration_text(donor, files, DEFAULT_TOKENS if tokens is None else tokens, seed, source)
    if save is not None:
        known = _made(donor, known)
        known.write(save)
    return known


def _made(donor: Donor, known: Calibration | torch.Tensor | None) -> Calibration | None:
    return calibrate(donor, None, known) if isinstance(known, torch.Tensor) else known


def _memory_notes(
    donor: Donor, plan: ConversionPlan, files: list[str], dataset: str | None, tokens: int | None, *_
) -> list[str]:
    if not files and dataset is None and tokens is None:
        return []
    note = memory_note(donor, plan, files, bool(files) or dataset is not None)
    return [] if note is None else [note]


def _print_plan(explanation: Explanation, output: Path, found: FoundPlan | None) -> None:
    if found is not None:
        print_search(found)
    print_explanation(explanation, output)


def print_explanation(explanation: Explanation, output: Path) -> None:
    before, after = explanation.before, explanation.after
    table = Table("", "donor", "student", title=f"{explanation.donor} -> {output}", title_justify="left")
    for name, describe in (
        ("KV heads", all_heads_in_words),
        ("query heads", lambda side: str(side["num_attention_heads"])),
        ("cache per token", cache_in_words),
        ("parameters", lambda side: human_count(side["parameters"])),
        ("weights", lambda side: f"{human_bytes(side['weight_bytes'])} ({side['dtype']})"),
        ("tensor parallel", lambda side: ", ".join(map(str, side["tensor_parallel_sizes"]))),
        ("model type", lambda side: side["model_type"]),
    ):
        table.add_row(name, describe(before), describe(after))
    out = console()
    out.print(table)
    out.print(f"method: {', '.join(explanation.plan['method'])}; export: {explanation.export}, {explanation.reason}")
    out.print(
        f"files: {', '.join(explanation.files[:3])}{' ...' if len(explanation.files) > 3 else ''}, config.json, ..."
    )
    for note in explanation.notes:
        out.print(f"note: {note}")
