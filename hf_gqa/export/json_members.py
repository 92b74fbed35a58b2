"""Change members of a JSON object in its text, and leave every other byte as it is."""

import json
import re
from collections.abc import Collection
from pathlib import Path


SPACE = re.compile(r"[ \t\r\n]*")
DECODER = json.JSONDecoder()


def read_text(path: Path) -> str:
    """With the line ends that it has."""
    return path.read_bytes().decode("utf-8")


def with_members(text: str, changes: dict) -> str:
    """The object with these members changed, or added: in their place if its keys are sorted, else at its end.

    Args:
        text: of a JSON object with at least one member.
    """
    for key, value in changes.items():
        text = _with_member(text, key, value)
    return text


def with_inner_members(text: str, key: str, changes: dict) -> str:
    """The same within the object that one member holds."""
    _, _, start, end = next(member for member in _members(text) if member[0] == key)
    return text[:start] + with_members(text[start:end], changes) + text[end:]


def without_members(text: str, keys: Collection[str]) -> str:
    """The object without these members, some of which it may have."""
    members = _members(text)
    for place in reversed(range(len(members))):
        if members[place][0] in keys:
            last = place + 1 == len(members)
            start = members[place - 1][3] if last and place else members[place][1]
            text = text[:start] + text[members[place][3] if last else members[place + 1][1] :]
            members = _members(text)
    return text


def _with_member(text: str, key: str, value) -> str:
    members = _members(text)
    break_line = text[text.index("{") + 1 : members[0][1]]  # and what lines begin with; nothing where all are on one
    unit = break_line.strip("\r\n")
    written = json.dumps(value, indent=unit or None, sort_keys=True)  # as transformers writes them
    written = written.replace("\n", break_line) if unit else written
    here = [member for member in members if member[0] == key]
    if here:
        _, _, start, end = here[-1]
        return text[:start] + written + text[end:]
    member, keys = f"{json.dumps(key)}: {written}", [each[0] for each in members]
    before = [each for each in members if each[0] < key] if keys == sorted(keys) else members
    if not before:
        start = members[0][1]
        return f"{text[:start]}{member},{break_line or ' '}{text[start:]}"
    end = before[-1][3]
    return f"{text[:end]},{break_line or ' '}{member}{text[end:]}"


def _members(text: str) -> list[tuple[str, int, int, int]]:
    """(key, where it starts, where its value starts, where that ends) of each member."""
    found, position = [], _skip(text, text.index("{") + 1)
    while text[position] != "}":
        start = position
        key, position = DECODER.raw_decode(text, start)
        value = _skip(text, _skip(text, position) + 1)
        _, end = DECODER.raw_decode(text, value)
        found.append((key, start, value, end))
        position = _skip(text, end)
        if text[position] == ",":
            position = _skip(text, position + 1)
    return found


def _skip(text: str, position: int) -> int:
    return SPACE.match(text, position).end()
