"""A report in the terminal: its verdict, and the tables of its page."""

from rich.table import Table

from ..evaluate.report import Report
from ..evaluate.report.donor_and_student import quality_and_cost
from ..evaluate.report.table import Cells, cells_of
from ..evaluate.report.tables import TABLES
from ..evaluate.report.verdict import verdict
from .printing import console


def print_report(report: Report) -> None:
    """Sections without data are left out."""
    out = console()
    out.print()
    for title, rows in (("", quality_and_cost(report)), *((each.title, cells_of(each, report)) for each in TABLES)):
        if rows.rows:
            out.print(table_of(rows, title))
    for note in report.notes:
        out.print(f"note: {note}")
    out.print(verdict(report))


def table_of(rows: Cells, title: str) -> Table:
    """Numbers stand to the right, names to the left."""
    table = Table(title=title or None, title_justify="left")
    for number, name in enumerate(rows.header):
        table.add_column(name, justify="right" if number else "left")
    for row in rows.rows:
        table.add_row(*row)
    return table
