"""A report in the terminal: its verdict, and the tables of its page."""

from rich.table import Table

from ..evaluate.report import Report
from ..evaluate.report.tables import (
    Rows,
    by_context_table,
    by_source_length_table,
    capacity_table,
    encoding_speed_table,
    main_table,
    retrieval_table,
    rouge_table,
    speed_table,
    tasks_table,
)
from ..evaluate.report.verdict import verdict
from .printing import console


SECTIONS = {
    "": main_table,
    "by tokens of context": by_context_table,
    "by tokens of the source": by_source_length_table,
    "ROUGE of what they write": rouge_table,
    "recall": retrieval_table,
    "tasks, ± standard error": tasks_table,
    "speed": speed_table,
    "speed of reading": encoding_speed_table,
    "tokens that fit beside the weights": capacity_table,
}


def print_report(report: Report) -> None:
    """Sections without data are left out."""
    out = console()
    out.print()
    for title, rows_of in SECTIONS.items():
        rows = rows_of(report)
        if rows.rows:
            out.print(table_of(rows, title))
    for note in report.notes:
        out.print(f"note: {note}")
    out.print(verdict(report))


def table_of(rows: Rows, title: str) -> Table:
    """Numbers stand to the right, names to the left."""
    table = Table(title=title or None, title_justify="left")
    for number, name in enumerate(rows.header):
        table.add_column(name, justify="right" if number else "left")
    for row in rows.rows:
        table.add_row(*row)
    return table
