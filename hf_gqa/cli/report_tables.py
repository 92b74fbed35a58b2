"""A report in the terminal."""

from ..evaluate.report import Report
from ..evaluate.verdict import verdict
from .printing import console


def print_report(report: Report) -> None:
    console().print(verdict(report))
