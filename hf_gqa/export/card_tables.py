"""The tables of a card: those of the report as Markdown."""

from ..evaluate.report import Report
from ..evaluate.report.donor_and_student import cost_on_card, quality_on_card
from ..evaluate.report.table import CARD, CODE, NAME, cells_of
from ..evaluate.report.tables import TABLES
from .markdown import code, plain, table


def tables(report: Report) -> dict[str, str]:
    """Name of the section -> its table; sections of which nothing was measured have none."""
    marks = {NAME: plain, CODE: code}
    found = {
        "quality": quality_on_card(report),
        "cache": cost_on_card(report),
        **{each.rows: cells_of(each, report, CARD, marks) for each in TABLES},
    }
    return {name: table(*rows) for name, rows in found.items() if rows.rows}
