"""The folder of a report: the values, and the page that shows them."""

from pathlib import Path

from ...refusal import Refusal
from ...staging import staged_folder
from ..report import PAGE_FILE, REPORT_FILE, Report
from .page import write_page


def check_report_folder(output: Path, overwrite: bool) -> None:
    """Refuse an output that exists, or that is not a report's to replace."""
    if not output.exists():
        return
    if not output.is_dir():
        raise Refusal(f"{output}: exists and is not a folder. Give another output.")
    if not overwrite:
        raise Refusal(f"{output}: exists. Give another output, or --overwrite to replace it.")
    foreign = sorted(path.name for path in output.iterdir() if path.name not in (REPORT_FILE, PAGE_FILE))
    if foreign:
        raise Refusal(f"{output}: holds '{foreign[0]}', which is no report's, so --overwrite would lose it. Move it.")


def write_report(report: Report, output: Path, *, overwrite: bool = False) -> None:
    """Write `report.json` and `report.html` into `output`, which appears complete or not at all."""
    check_report_folder(output, overwrite)
    with staged_folder(output, overwrite) as staging:
        (staging / REPORT_FILE).write_text(report.to_json(), encoding="utf-8")
        write_page(report, staging / PAGE_FILE)
