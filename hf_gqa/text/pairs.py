"""Sources with what is to be written for them, as encoder-decoders are evaluated on: two columns of the same rows."""

from collections.abc import Iterator
from dataclasses import dataclass

from ..refusal import Refusal
from .source import READING_ERRORS, TextSource, open_rows, unreadable


@dataclass(frozen=True, slots=True, kw_only=True)
class TextPair:
    """A source, and the references that are each a good target for it."""

    source: str
    references: tuple[str, ...]


def open_pairs(source: TextSource, source_column: str, target_column: str) -> Iterator[TextPair]:
    """Every row of the text, in order.

    A source that is a list of strings is joined with spaces; a target that is one holds several references.

    Raises:
        Refusal: as `open_documents`; a column that is missing, or a row that has no source or no target.
    """
    for where, rows in open_rows(source):
        columns = rows.column_names or list(next(iter(rows), {}))
        for option, column in (("source_column", source_column), ("target_column", target_column)):
            if column not in columns:
                raise Refusal(
                    f"{where}: has no column '{column}' (columns: {', '.join(columns)}), and an encoder-decoder is "
                    f"evaluated on pairs of source and target. Give {option}."
                )
        try:
            for number, row in enumerate(rows.select_columns([source_column, target_column]), start=1):
                at = f"{where}: row {number}"
                yield TextPair(
                    source=" ".join(_strings(row[source_column], f"{at}, column '{source_column}'")),
                    references=_strings(row[target_column], f"{at}, column '{target_column}'"),
                )
        except Refusal:
            raise
        except READING_ERRORS as error:
            raise unreadable(where, source, error) from None


def _strings(value, where: str) -> tuple[str, ...]:
    """Without what is blank."""
    found = [value] if isinstance(value, str) else value
    if not isinstance(found, list | tuple) or not all(isinstance(item, str) for item in found):
        raise Refusal(f"{where}: holds {value!r:.80}, which is neither text nor a list of it. Correct the row.")
    texts = tuple(item.strip() for item in found if item.strip())
    if not texts:
        raise Refusal(f"{where}: is empty. Fill it, or leave the row out.")
    return texts
