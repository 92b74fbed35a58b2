"""Hold a card against its report: no number without evidence, none left out, no licence or donor of its own."""

import difflib
import re
from collections import Counter
from pathlib import Path

from huggingface_hub import ModelCard

from ..evaluate.report import Report
from ..refusal import Refusal
from .licence import Licence, find_licence
from .model_card import DERIVED, card_of, check_same_student, donor_repository, report_sha256


DIGIT = re.compile(r"\d")
PLACEHOLDER = re.compile(
    r"\{\{.*?\}\}|\{%.*?%\}|\[[Mm]ore [Ii]nformation [Nn]eeded\]|<[A-Z_ ]{3,}>|\b(TODO|FIXME|TBD|REPO_ID)\b"
)
STATED_SHA256 = re.compile(r"SHA-256 is `([0-9a-f]+)`")
LICENCE_LINE = "- Licence:"
LICENCE_KEYS = ("license", "license_name", "license_link")


def lint_card(card_text: str, report: Report, student: Path | None = None) -> list[str]:
    """What is wrong with a card, each as `<line>: <what>`; empty if nothing is.

    Every line with a digit that the report makes must be there, unchanged; no other row of a table may hold a digit; the
    model-index must be the report's. Words may be added and changed freely.

    Args:
        student: folder whose licence and record the card must fit; None: they are not looked at.
    """
    try:
        card = ModelCard(card_text.replace("\r\n", "\n"))
        data = card.data.to_dict()
    except Exception as error:  # of YAML, or of the metadata's own checks
        return [
            f"1: the metadata cannot be read ({' '.join(str(error).split())[:200]})",
            *_placeholders(card_text, set()),
        ]
    licence = find_licence(student) if student is not None else _claimed_licence(data)
    base_model = data.get("base_model")
    expected = card_of(
        report, name=_name(data), base_model=str(base_model or donor_repository(report)), licence=licence
    )
    problems = _another_report(card_text, report) or _body(card_text, str(expected), student is not None)
    problems += _metadata(card_text, data, expected.data.to_dict(), report)
    problems += _placeholders(card_text, set(str(expected).splitlines()))
    problems += _another_student(report, student)
    return sorted(problems, key=lambda problem: int(problem.partition(":")[0]))


def _name(data: dict) -> str:
    index = data.get("model-index") or [{}]
    return str(index[0].get("name") or "student")


def _claimed_licence(data: dict) -> Licence:
    return Licence(**{key: data.get(key) for key in LICENCE_KEYS}, source="")


def _another_report(text: str, report: Report) -> list[str]:
    """With another report every number would be wrong; that is one problem, not a hundred."""
    found = STATED_SHA256.search(text)
    if found is None:
        return ["1: names no report, so nothing bears its numbers out"]
    if found[1] != report_sha256(report):
        line = text.count("\n", 0, found.start()) + 1
        return [f"{line}: is of the report with SHA-256 {found[1]}, this one has {report_sha256(report)}"]
    return []


def _body(text: str, expected_text: str, knows_licence: bool) -> list[str]:
    lines, expected = _body_lines(text), _body_lines(expected_text)
    present = Counter(line for _, line in lines)
    stated = [line for _, line in expected if line.startswith(LICENCE_LINE)]
    wanted = Counter(line for _, line in expected if DIGIT.search(line) and line not in stated)
    wanted.update(stated if knows_licence else [])
    known = {line for _, line in expected}
    strange = {line: number for number, line in lines if line not in known}
    problems = []
    for line in (wanted - present).elements():
        altered = next(iter(difflib.get_close_matches(line, strange, n=1, cutoff=0.7)), None)
        number = strange.pop(altered) if altered is not None else lines[-1][0] if lines else 1
        problems.append(f"{number}: {'altered' if altered else 'left out'}, the report says: {line[:120]}")
    rows = {line: number for line, number in strange.items() if line.lstrip().startswith("|") and DIGIT.search(line)}
    return problems + [f"{number}: not in the report: {line[:120]}" for line, number in rows.items()]


def _body_lines(text: str) -> list[tuple[int, str]]:
    """(number, line) of everything below the metadata."""
    lines = [(number, line.rstrip()) for number, line in enumerate(text.splitlines(), 1)]
    ends = [number for number, line in lines[1:] if line == "---"]
    return lines[ends[0] :] if lines and lines[0][1] == "---" and ends else lines


def _metadata(text: str, data: dict, expected: dict, report: Report) -> list[str]:
    problems = []
    if not data.get("base_model"):
        problems.append("1: base_model is missing; it is the donor")
    donor = (report.conversion or {}).get("donor") or {}
    if data.get("base_model") and donor.get("revision") and data["base_model"] != donor_repository(report):
        problems.append(
            f"{_line(text, 'base_model')}: base_model is {data['base_model']}, the donor is {donor['name']}"
        )
    if data.get("base_model_relation") != DERIVED:
        relation = data.get("base_model_relation")
        problems.append(f"{_line(text, 'base_model_relation')}: base_model_relation is {relation}, not {DERIVED}")
    for key in LICENCE_KEYS:
        if data.get(key) != expected.get(key):
            said, carried = data.get(key), expected.get(key)
            problems.append(f"{_line(text, key)}: {key} is {said}, the student carries {carried}")
    return problems + _model_index(text, data, expected)


def _model_index(text: str, data: dict, expected: dict) -> list[str]:
    found, wanted = _leaves(data.get("model-index")), _leaves(expected["model-index"])
    line = _line(text, "model-index")
    return [
        f"{line}: model-index, {path}: is {found.get(path)!r}, the report says {wanted.get(path)!r}"
        for path in [*wanted, *(path for path in found if path not in wanted)]
        if found.get(path) != wanted.get(path)
    ]


def _leaves(value, path: str = "") -> dict:
    """Every plain value of nested lists and objects, by its path."""
    if isinstance(value, dict | list):
        pairs = value.items() if isinstance(value, dict) else enumerate(value)
        nested = [_leaves(below, f"{path}.{key}".removeprefix(".")) for key, below in pairs]
        return {name: leaf for leaves in nested for name, leaf in leaves.items()}
    return {path: value}


def _line(text: str, key: str) -> int:
    found = re.search(rf"^{re.escape(key)}:", text, flags=re.MULTILINE)
    return text.count("\n", 0, found.start()) + 1 if found else 1


def _placeholders(text: str, made: set[str]) -> list[str]:
    """In what was not made from the report: a recipe may hold braces."""
    return [
        f"{number}: a placeholder is left: {found[0]}"
        for number, line in enumerate(text.splitlines(), 1)
        if line not in made and (found := PLACEHOLDER.search(line))
    ]


def _another_student(report: Report, student: Path | None) -> list[str]:
    if student is None:
        return []
    try:
        check_same_student(report, student)
    except Refusal as refusal:
        return [f"1: {refusal}"]
    return []
