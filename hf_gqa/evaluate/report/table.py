"""What describes a table of a report, so that page, terminal and card render one description."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple, Self

from .forms import NOTHING, Difference, Form
from .values import ModelFacts, Report
from .verdict import confidence
from .words import words_of


PAGE, CARD = "page", "card"
NAME, CODE = "name", "code"


class Cells(NamedTuple):
    """Cells are plain text from outside and from us: whoever shows them escapes them, unless `marks` did."""

    header: tuple[str, ...]
    rows: list[tuple[str, ...]]


@dataclass(frozen=True, slots=True)
class InPlaces:
    """What has a name on the page, which the terminal shows too, and one on the card.

    Args:
        both: the name in both places, with `{words.context}` and the like for the report's `KindWords`.
        page, card: the name in one of them; without any it is not shown there.
    """

    both: str | None = field(default=None, kw_only=True)
    page: str | None = field(default=None, kw_only=True)
    card: str | None = field(default=None, kw_only=True)

    def name(self, place: str) -> str | None:
        return getattr(self, place) or self.both

    def only(self, place: str) -> Self:
        """Where the places differ in order, it stands twice, each time in one of them."""
        return replace(self, **{"both": None, PAGE: None, CARD: None, place: self.name(place)})


@dataclass(frozen=True, slots=True)
class Column(InPlaces):
    """One thing that is said of every row.

    Args:
        value: a field of the row, several of them, or a function of the row.
        form: how the value is written.
        outside: NAME or CODE where the text comes from outside, so that Markdown has to mark it.
    """

    value: str | tuple[str, ...] | Callable[[Any], Any]
    form: Form
    outside: str | None = field(default=None, kw_only=True)


@dataclass(frozen=True, slots=True, kw_only=True)
class Table:
    """One row for each value of a tuple of the report.

    Args:
        rows: the report's field.
        caption: on the page.
        title: in the terminal.
    """

    rows: str
    caption: str
    title: str
    columns: tuple[Column, ...]


@dataclass(frozen=True, slots=True)
class Fact(InPlaces):
    """A row that says one thing of the donor and of the student; left out where one of them has no such thing.

    Args:
        of: a field of `ModelFacts`, or a function of one.
        form: how it is written.
        against: from (report, donor's, student's) what the last column compares; None: it stays empty.
        compared: how that is written.
        where: of the report, whether the row is shown at all.
    """

    of: str | Callable[[ModelFacts], Any]
    form: Form
    against: Callable[[Report, Any, Any], Any] | None = None
    compared: Form | None = None
    where: Callable[[Report], bool] = field(default=lambda report: True, kw_only=True)

    def cells(self, report: Report, place: str) -> tuple[str, ...] | None:
        donor, student = (_value(self.of, model) for model in (report.donor, report.student))
        if donor is None or student is None or not self.where(report):
            return None
        write = getattr(self.form, place)
        if self.against is None:
            return write(donor), write(student), ""
        return write(donor), write(student), getattr(self.compared, place)(self.against(report, donor, student))


@dataclass(frozen=True, slots=True)
class Comparison(InPlaces):
    """A row of what only both together have, such as KL; the card shows its value in the student's column.

    Args:
        found: the value and its interval; None where the kind of model has none.
        form: how the card writes the value.
        compared: how the last column is written.
    """

    found: Callable[[Report], Difference | None]
    form: Form
    compared: Form

    def cells(self, report: Report, place: str) -> tuple[str, ...] | None:
        found = self.found(report)
        if found is None:
            return None
        both = ("", "") if place == PAGE else (NOTHING, self.form.card(found.value))
        return *both, getattr(self.compared, place)(found)


def said(name: str, report: Report) -> str:
    """A heading, label or caption for this report."""
    return name.format(words=words_of(report), confidence=confidence(report))


def caption_of(table: Table, report: Report) -> str:
    caption = said(table.caption, report)
    return caption[0].upper() + caption[1:]


def cells_of(
    table: Table, report: Report, place: str = PAGE, marks: Mapping[str, Callable[[str], str]] | None = None
) -> Cells:
    """A table of this report.

    Args:
        place: PAGE or CARD.
        marks: what to do with text from outside, by what it is (NAME, CODE); None: it is left as it is.
    """
    columns = [column for column in table.columns if column.name(place) is not None]
    header = tuple(said(column.name(place), report) for column in columns)

    def cell(column: Column, row: Any) -> str:
        text = getattr(column.form, place)(_value(column.value, row))
        return (marks or {}).get(column.outside, str)(text)

    return Cells(header, [tuple(cell(column, row) for column in columns) for row in getattr(report, table.rows)])


def cells_of_facts(
    header: tuple[str, ...], facts: tuple[Fact | Comparison, ...], report: Report, place: str = PAGE
) -> Cells:
    """A table that says each thing in a row; a header without a last column leaves out what compares."""
    rows = []
    for fact in facts:
        name = fact.name(place)
        cells = None if name is None else fact.cells(report, place)
        if cells is not None:
            rows.append((said(name, report), *cells)[: len(header)])
    return Cells(tuple(said(name, report) for name in header), rows)


def _value(of: str | tuple[str, ...] | Callable, holder: Any) -> Any:
    if isinstance(of, str):
        return getattr(holder, of)
    return tuple(getattr(holder, name) for name in of) if isinstance(of, tuple) else of(holder)
