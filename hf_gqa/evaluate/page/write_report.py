"""The folder of a report: the values, and the page that shows them."""

from pathlib import Path

from ...staging import check_folder_of, staged_folder
from ..report import PAGE_FILE, REPORT_FILE, Report
from .page import write_page


def check_report_folder(output: Path, overwrite: bool) -> None:
    """Refuse an output that exists, or that is not a report's to replace."""
    check_folder_of(output, overwrite, (REPORT_FILE, PAGE_FILE), "report")


def write_report(report: Report, output: Path, *, overwrite: bool = False) -> None:
    """Write `report.json` and `report.html` into `output`, which appears complete or not at all."""
    check_report_folder(output, overwrite)
    with staged_folder(output, overwrite) as staging:
        (staging / REPORT_FILE).write_text(report.to_json(), encoding="utf-8")
        write_page(report, staging / PAGE_FILE)
