"""What a recipe is: a frozen dataclass that checks its values when made, and round-trips exactly through YAML."""

import re
from contextlib import suppress
from dataclasses import MISSING, fields
from pathlib import Path
from typing import ClassVar, Self, get_args, get_origin

from .reading import read_yaml
from .refusal import Refusal


NO_TEXT = re.compile(r"[\x00\ud800-\udfff]")  # no path may have the first, no file the others
WORDS = {int: "a whole number", float: "a number", str: "text", bool: "true or false"}


class Recipe:
    """Base of frozen dataclasses whose fields are plain values, tuples of them, or other recipes."""

    __slots__ = ()
    replaces: ClassVar[dict[str, tuple[str, ...]]] = {}  # by key: those that say the same in another way

    def check_fields(self) -> None:
        """Lists become tuples, text becomes the number it says, and what fits no annotation is refused."""
        for field in fields(self):
            value = getattr(self, field.name)
            if get_origin(field.type) is tuple:
                object.__setattr__(self, field.name, _tuple_of(field.name, value, get_args(field.type)[0]))
            else:
                object.__setattr__(self, field.name, _plain(field.name, value, get_args(field.type) or (field.type,)))

    def to_dict(self) -> dict:
        """What YAML and JSON hold: without what is at its default."""
        made = {}
        for field in fields(self):
            value = getattr(self, field.name)
            if value != (field.default if field.default is not MISSING else None):
                made[field.name] = _as_plain(value)
        return made

    @classmethod
    def from_dict(cls, values: dict, where: str = "recipe") -> Self:
        """Raises Refusal for keys that no field has, and for values that `__post_init__` refuses."""
        check_keys(cls, values, where)
        return cls(**values)

    @classmethod
    def read(cls, path: Path) -> dict:
        """The keys of a YAML file; `from_dict` checks their values once a command's own options are merged in."""
        values = read_yaml(path)
        check_keys(cls, values, str(path))
        return values


def check_keys(cls: type, values, where: str) -> None:
    """Raises Refusal for what is no object, has a key that `cls` has not, or lacks one that has no default."""
    known = {field.name: field for field in fields(cls)}
    if not isinstance(values, dict):
        raise Refusal(f"{where}: holds {type(values).__name__}, expected keys such as {', '.join([*known][:3])}.")
    unknown = sorted(set(map(str, values)) - known.keys())
    if unknown:
        raise Refusal(f"{where}: unknown key '{unknown[0]}'. Known: {', '.join(known)}.")
    missing = [n for n, f in known.items() if f.default is MISSING and f.default_factory is MISSING and n not in values]
    if missing:
        raise Refusal(f"{where}: the key '{missing[0]}' is missing. Give it.")


def _tuple_of(name: str, value, kind: type) -> tuple:
    value = (value,) if isinstance(value, str | int | float) and not isinstance(value, bool) else value
    if not isinstance(value, list | tuple | None):
        raise Refusal(f"{name} = {value!r} is not a list. Write each on a line of its own, after '- '.")
    items = tuple(value or ())
    if kind is str and not all(isinstance(item, str) for item in items):
        raise Refusal(f"{name} = {list(items)!r} holds what is no text. Put each in quotes.")
    return tuple(_plain(name, item, (kind,)) for item in items) if kind in WORDS else items


def _plain(name: str, value, kinds: tuple[type, ...]):
    if float in kinds and isinstance(value, str):
        with suppress(ValueError):  # YAML reads 1e-4, without a dot, as text
            value = float(value)
    if isinstance(value, str) and NO_TEXT.search(value):
        raise Refusal(f"{name} = {value!r}: holds a character that no name or text has. Correct it, or leave it out.")
    fits = isinstance(value, kinds) or (float in kinds and isinstance(value, int))
    if not fits or (isinstance(value, bool) and bool not in kinds):
        wanted = " or ".join(WORDS[kind] for kind in kinds if kind in WORDS)
        raise Refusal(f"{name} = {value!r} is not {wanted or 'what belongs there'}. Correct it, or leave it out.")
    return value


def _as_plain(value):
    if isinstance(value, tuple):
        return [_as_plain(item) for item in value]
    return value.to_dict() if hasattr(value, "to_dict") else value
