"""The model card of a student, made from the report of its evaluation: metadata, verdict, tables, limits, recipe."""

import hashlib
import json
import re
from pathlib import Path

from huggingface_hub import EvalResult, ModelCard, ModelCardData
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

from ..convert.manifest import MANIFEST_FILE
from ..convert.model_kind import AUTO_CLASSES
from ..evaluate.report import PAGE_FILE, REPORT_FILE, Report
from ..evaluate.report.verdict import confidence, verdict
from ..evaluate.report.words import words_of
from ..reading import read_json
from ..refusal import Refusal
from ..staging import replace_file
from .card_tables import tables
from .card_words import command, facts, limits, machine, measured_text, recipe, settings
from .licence import Licence, find_licence, write_licence
from .markdown import code, plain
from .pushed_files import CARD_FILE, EVALUATION_FOLDER


TEMPLATE = Path(__file__).parent / "card_template.md"
MARKER = (
    "<!-- Made by hf-gqa card. Its numbers are those of the report named below; hf-gqa card --check compares them. -->"
)
DERIVED = "finetune"  # of the Hub's relations (finetune, adapter, merge, quantized) the one for changed weights
DATA_LOADERS = ("text", "json", "csv", "parquet", "arrow")
SIGNIFICANT_DIGITS = 6
RENEWED = ("code_sha256", "model_class", "refreshed")


def make_card(
    report: Report,
    student: Path,
    *,
    name: str | None = None,
    base_model: str | None = None,
    licence: Licence | None = None,
) -> ModelCard:
    """The card of the student in a folder.

    Args:
        name: what a reader loads it by, such as owner/name; None: the folder's name.
        base_model: the donor's repository; None: its name in the manifest.
        licence: None: as `find_licence`.

    Raises:
        Refusal: the report is of another student, or `base_model` is no name of a repository.
    """
    student = Path(student).expanduser()
    check_same_student(report, student)
    if base_model is not None and not _is_repository(base_model):
        raise Refusal(f"base_model {base_model!r}: not the name of a repository on the Hub. Give owner/name.")
    return card_of(
        report,
        name=name or student.resolve().name,
        base_model=base_model or donor_repository(report),
        licence=licence or find_licence(student),
    )


def card_of(report: Report, *, name: str, base_model: str, licence: Licence) -> ModelCard:
    """The card that a report makes, of a student that is not at hand."""
    return ModelCard.from_template(
        _metadata(report, name, base_model, licence),
        template_path=str(TEMPLATE),
        marker=MARKER,
        title=plain(name),
        verdict=plain(verdict(report)),
        facts=facts(report, licence),
        quoted_name=json.dumps(" ".join(name.split()), ensure_ascii=False),
        auto_class=AUTO_CLASSES[report.kind],
        drawn=words_of(report).drawn,
        bundle=(report.conversion or {}).get("export") == "bundle",
        text=measured_text(report),
        tables=tables(report),
        machine=machine(report),
        limits=limits(report),
        recipe=recipe(report),
        report_file=code(f"{EVALUATION_FOLDER}/{REPORT_FILE}"),
        report_sha256=report_sha256(report),
        command=command(report),
        settings=settings(report),
    )


def write_card(card: ModelCard, report: Report, student: Path, licence: Licence, page: Path | None = None) -> None:
    """README.md into the student's folder, and beside it what its numbers come from; the card appears last.

    Args:
        page: report.html, to go along.
    """
    evidence = student / EVALUATION_FOLDER
    evidence.mkdir(exist_ok=True)
    replace_file(evidence / REPORT_FILE, report.to_json())
    if page is not None:
        replace_file(evidence / PAGE_FILE, page.read_text(encoding="utf-8"))
    else:
        (evidence / PAGE_FILE).unlink(missing_ok=True)  # of an earlier report
    write_licence(licence, evidence)
    replace_file(student / CARD_FILE, str(card))


def is_ours(card_text: str) -> bool:
    """Whether `hf-gqa card` made it; it may have been edited since."""
    return MARKER.partition(".")[0] in card_text


def report_sha256(report: Report) -> str:
    """Of `report.json` as it travels with the card."""
    return hashlib.sha256(report.to_json().encode()).hexdigest()


def check_same_student(report: Report, student: Path) -> None:
    """Raises Refusal unless the report's record of the conversion is the one in the folder."""
    path = student / MANIFEST_FILE
    if not student.is_dir():
        raise Refusal(f"{student}: no such folder. Give a folder that hf-gqa convert wrote.")
    recorded = read_json(path, "Convert the donor again.") if path.is_file() else None
    if _without_renewed(recorded) != _without_renewed(report.conversion):
        raise Refusal(
            f"{student}: the report is of another student, or this one was trained since ({MANIFEST_FILE} differs). "
            f"Evaluate it again."
        )


def _without_renewed(recorded):
    """Of a manifest, what `hf-gqa refresh` leaves alone; what was measured before is true after it."""
    return {k: v for k, v in recorded.items() if k not in RENEWED} if isinstance(recorded, dict) else recorded


def donor_repository(report: Report) -> str:
    """The donor's name as a repository; a folder's name with what no repository may have replaced."""
    donor = (report.conversion or {}).get("donor") or {}
    name = str(donor.get("name") or report.donor.name)
    if _is_repository(name):
        return name
    last = re.sub(r"[^\w.-]+|--+|\.\.+", "-", name.rstrip("/").rpartition("/")[2], flags=re.ASCII).strip("-.")
    return last[:96].rstrip("-.") or "donor"


def _is_repository(name: str) -> bool:
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return True


def _metadata(report: Report, name: str, base_model: str, licence: Licence) -> ModelCardData:
    heads = report.student.num_key_value_heads
    kind = "mqa" if set(heads) == {1} else "gqa"
    return ModelCardData(
        base_model=base_model,
        base_model_relation=DERIVED,
        license=licence.license,
        license_name=licence.license_name,
        license_link=licence.license_link,
        library_name="transformers",
        pipeline_tag=words_of(report).pipeline,
        datasets=_datasets(report),
        tags=[kind, "hf-gqa", "kv-cache", "grouped-query-attention"],
        model_name=" ".join(name.split()),
        eval_results=_results(report),
    )


def _datasets(report: Report) -> list[str] | None:
    """The Hub's data set that the student was trained on, if its recipe names one; a folder is none."""
    trained = ((report.conversion or {}).get("uptraining") or {}).get("recipe")
    named = trained.get("dataset_name") if isinstance(trained, dict) else None
    if not isinstance(named, str) or named in DATA_LOADERS or not _is_repository(named) or Path(named).exists():
        return None
    return [named]


def _results(report: Report) -> list[EvalResult]:
    """The student's numbers for the model-index: on the text, then of the tasks."""
    text = {
        "task_type": words_of(report).task,
        "dataset_type": "text",
        "dataset_name": " ".join(", ".join(report.text.sources).split()),
        "dataset_args": {"fingerprint": report.text.fingerprint, "tokens": report.text.tokens},
    }
    student, share, words = report.student, confidence(report), words_of(report)
    differences = report.differences
    measured = (
        ("perplexity", capitalised(words.perplexity), student.perplexity, None),
        ("loss", capitalised(words.loss), student.loss_nats_per_token, None),
        ("bits_per_byte", "Bits per byte", student.bits_per_byte, None),
        ("kl_divergence", "KL from the donor, nats per token", report.kl_nats_per_token, differences.kl_nats_per_token),
        (
            "top1_agreement",
            f"{capitalised(words.same_token)} as the donor, fraction",
            report.top1_agreement_fraction,
            differences.top1_agreement_fraction,
        ),
    )
    found = []
    for metric, name, value, interval in (*measured, *_other_results(report)):
        if value is None:
            continue
        within = f" ({share} interval {_rounded(interval.low)} to {_rounded(interval.high)})" if interval else ""
        found.append(EvalResult(**text, metric_type=metric, metric_name=name + within, metric_value=_rounded(value)))
    return found + [_task_result(row) for row in report.tasks]


def capitalised(words: str) -> str:
    return words[0].upper() + words[1:]


def _other_results(report: Report) -> list[tuple]:
    """Of what is written, and of embeddings; the intervals of ROUGE are of differences, which no index holds."""
    rows = [(row.metric, f"{row.metric}, mean F1 of {row.pairs:,}", row.student_fraction, None) for row in report.rouge]
    if report.embeddings is not None:
        found = report.embeddings
        rows.append(("cosine", "Cosine of the embeddings to the donor's", found.mean_cosine, found.cosine))
    return rows


def _task_result(row) -> EvalResult:
    error = "" if row.student_stderr is None else f", stderr {_rounded(row.student_stderr)}"
    return EvalResult(
        task_type="text-generation",
        dataset_type=" ".join(row.task.split()),
        dataset_name=" ".join(row.task.split()),
        metric_type=" ".join(row.metric.split()),
        metric_name=f"{' '.join(row.metric.split())} (lm_eval, {row.num_fewshot} shots, n = {row.samples}{error})",
        metric_value=_rounded(row.student),
    )


def _rounded(value: float) -> float:
    return float(f"{value:.{SIGNIFICANT_DIGITS}g}")
