"""JSON back into frozen dataclasses, refusing whatever does not fit their annotations."""

import types
from dataclasses import MISSING, fields, is_dataclass
from typing import Any, Union, get_args, get_origin, get_type_hints

from ...refusal import Refusal


AGAIN = "It was written by another version or edited; make it again."


def value_of(kind, value, where: str) -> Any:
    """`value`, parsed from JSON, as a `kind`: a dataclass, a tuple, a dict, an optional, or a plain type.

    Raises:
        Refusal: naming the place, such as `report.json: donor.perplexity`.
    """
    origin, arguments = get_origin(kind), get_args(kind)
    if origin in (Union, types.UnionType):
        return None if value is None else value_of(next(a for a in arguments if a is not type(None)), value, where)
    if is_dataclass(kind):
        return _dataclass_of(kind, value, where)
    if origin is tuple:
        _check(isinstance(value, list | tuple), value, "a list", where)
        return tuple(value_of(arguments[0], item, f"{where}[{number}]") for number, item in enumerate(value))
    if origin is dict:
        _check(isinstance(value, dict), value, "an object", where)
        return {key: value_of(arguments[1], item, f"{where}.{key}") for key, item in value.items()}
    if kind is float:
        _check(isinstance(value, int | float) and not isinstance(value, bool), value, "a number", where)
        return float(value)
    _check(isinstance(value, kind) and (kind is bool or not isinstance(value, bool)), value, kind.__name__, where)
    return value


def _dataclass_of(kind: type, value, where: str):
    _check(isinstance(value, dict), value, "an object", where)
    hints, known = get_type_hints(kind), {field.name: field for field in fields(kind)}
    unknown = sorted(value.keys() - known.keys())
    needed = {name for name, field in known.items() if field.default is MISSING and field.default_factory is MISSING}
    missing = sorted(needed - value.keys())
    if unknown or missing:
        what = f"unknown key '{unknown[0]}'" if unknown else f"key '{missing[0]}' is missing"
        raise Refusal(f"{where}: {what}. Known: {', '.join(known)}. {AGAIN}")
    return kind(**{name: value_of(hints[name], item, f"{where}: {name}") for name, item in value.items()})


def _check(fits: bool, value, wanted: str, where: str) -> None:
    if not fits:
        raise Refusal(f"{where}: got {value!r:.80}, expected {wanted}. {AGAIN}")
