"""The one way to read what others wrote: JSON and YAML of bounded size, depth and numbers, from plain files only."""

import json
import stat
from pathlib import Path

import yaml

from .refusal import Refusal


MOST_JSON_BYTES = 256 * 2**20  # a tokenizer of a large vocabulary has some 35 MB
MOST_YAML_BYTES = 4 * 2**20
MOST_DEPTH = 200
MOST_YAML_VALUES = 100_000  # aliases counted each time: nine of nine of nine ... fill any memory
LARGEST_NUMBER = 2**63 - 1
MERGE = "tag:yaml.org,2002:merge"  # "<<", of which there may be several


def read_json(path: Path, cure: str = "Download it again."):
    """The value in a JSON file.

    Args:
        cure: the last sentence of a refusal.

    Raises:
        Refusal: no plain file, too large, not UTF-8, not JSON, nested too deep, or a number that no field can hold.
    """
    try:
        return _bounded(json.loads(read_text(path, MOST_JSON_BYTES)))
    except (ValueError, RecursionError) as error:
        raise Refusal(f"{path}: not readable JSON ({_reason(error)}). {cure}") from None


def read_yaml(path: Path, cure: str = "Correct it."):
    """Plain values of a YAML file; as `read_json`, and besides refused: a key that stands twice in one mapping."""
    try:
        loader = _UniqueKeys(read_text(path, MOST_YAML_BYTES))
        try:
            node = loader.get_single_node()
            _count(node, {})
            return None if node is None else _bounded(loader.construct_document(node))
        finally:
            loader.dispose()
    except (ValueError, RecursionError, yaml.YAMLError) as error:
        raise Refusal(f"{path}: not a readable YAML file ({_reason(error)}). {cure}") from None


def read_text(path: Path, most_bytes: int) -> str:
    """Raises ValueError for what is missing, no plain file of at most `most_bytes`, or not UTF-8; OSError if reading fails."""
    try:
        found = path.stat()
    except FileNotFoundError as error:
        raise ValueError(error.strerror) from None
    if not stat.S_ISREG(found.st_mode):
        raise ValueError("it is no plain file")
    if found.st_size > most_bytes:
        raise ValueError(f"it has {found.st_size:,} bytes, and {most_bytes:,} are read at most")
    return path.read_text(encoding="utf-8")


class _UniqueKeys(yaml.SafeLoader):
    """YAML forbids a key twice in one mapping; the loader would take the last."""

    def construct_mapping(self, node, deep=False):
        names = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
        twice = next((key for key, _ in reversed(node.value) if names.count(key.value) > 1 and key.tag != MERGE), None)
        if twice is not None:
            raise yaml.constructor.ConstructorError(
                None, None, f"the key '{twice.value}' stands there twice", twice.start_mark
            )
        return super().construct_mapping(node, deep)


def _count(node, counted: dict[int, int], depth: int = 0) -> int:
    """Values that a node stands for, aliases written out; ValueError for too many, too deep, or one inside itself."""
    if depth > MOST_DEPTH:
        raise ValueError(f"it is nested deeper than {MOST_DEPTH} times")
    if id(node) not in counted:
        counted[id(node)] = 0
        parts = node.value if isinstance(node, yaml.CollectionNode) else ()
        inner = [part for pair in parts for part in (pair if isinstance(pair, tuple) else (pair,))]
        counted[id(node)] = 1 + sum(_count(part, counted, depth + 1) for part in inner)
    if not 0 < counted[id(node)] <= MOST_YAML_VALUES:
        raise ValueError(f"written out it has more than {MOST_YAML_VALUES:,} values, or a value inside itself")
    return counted[id(node)]


def _bounded(value):
    """The value; ValueError if it is nested too deep, or holds a number that no field can hold."""
    left = [(value, 0)]
    while left:
        part, depth = left.pop()
        if depth > MOST_DEPTH:
            raise ValueError(f"it is nested deeper than {MOST_DEPTH} times")
        if isinstance(part, int) and abs(part) > LARGEST_NUMBER:
            raise ValueError(f"it holds a whole number of {part.bit_length()} bits, and 63 are the most")
        inner = part.values() if isinstance(part, dict) else part if isinstance(part, list) else ()
        left += [(each, depth + 1) for each in inner]
    return value


def _reason(error: Exception) -> str:
    return "it is nested too deep" if isinstance(error, RecursionError) else " ".join(str(error).split())
