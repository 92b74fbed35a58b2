"""What others wrote is read by one reader, which refuses in one sentence what would hang, exhaust memory or crash."""

import json
import os
import re
import threading
from pathlib import Path

import pytest

from hf_gqa import Refusal
from hf_gqa.reading import MOST_DEPTH, read_json, read_yaml
from hf_gqa.refusal import MOST_CHARACTERS


BOMB = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{chr(b)}: &{chr(b)} [{', '.join([f'*{chr(b - 1)}'] * 9)}]\n" for b in range(ord("b"), ord("k"))
)
JSON = {
    "{": r"Expecting property name",
    "\xff": r"utf-8' codec can't decode",
    "[" * 100_000: r"nested too deep|nested deeper than",
    "[" * (MOST_DEPTH + 2) + "]" * (MOST_DEPTH + 2): rf"nested deeper than {MOST_DEPTH} times",
    '{"a": [1, ' + "9" * 20 + "]}": r"a whole number of 67 bits, and 63 are the most",
    "9" * 5000: r"Exceeds the limit|whole number",
}
YAML = {
    BOMB: r"more than 100,000 values",
    "a: &a [*a]": r"a value inside itself",
    "[" * 20_000: r"nested",
    "[" * (MOST_DEPTH + 2) + "]" * (MOST_DEPTH + 2): rf"nested deeper than {MOST_DEPTH} times",
    "n: 0x" + "f" * 5000: r"whole number of 20000 bits",
    "n: 10000000000000000000000": r"whole number of 74 bits",
    "a: 1\na: 2": r"the key 'a' stands there twice",
    "? [1, 2]\n: 3": r"unhashable|found unhashable",
    "a: !!python/object/apply:os.system [echo]": r"could not determine a constructor",
}


@pytest.mark.parametrize("text", JSON, ids=range(len(JSON)))
def test_json_that_is_refused(tmp_path, text):
    (tmp_path / "f.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(Refusal, match=rf"f\.json: not readable JSON \(.*({JSON[text]}).*\)\. Do this\.$"):
        read_json(tmp_path / "f.json", "Do this.")


@pytest.mark.parametrize("text", YAML, ids=range(len(YAML)))
def test_yaml_that_is_refused(tmp_path, text):
    (tmp_path / "f.yaml").write_text(text)
    with pytest.raises(Refusal, match=rf"f\.yaml: not a readable YAML file \(.*({YAML[text]}).*\)\. Do this\.$"):
        read_yaml(tmp_path / "f.yaml", "Do this.")


def test_what_is_fine_is_read(tmp_path):
    deep = {"a": [1, -(2**63) + 1, None, 1.5, "\u00e4"], "b": {"c": True}}
    (tmp_path / "f").write_text(json.dumps(deep))
    assert read_json(tmp_path / "f") == read_yaml(tmp_path / "f") == deep
    (tmp_path / "f").write_text("base: &base {x: 1}\nother:\n  <<: *base\n  y: 2\nlist: [*base, *base]\n")
    assert read_yaml(tmp_path / "f") == {"base": {"x": 1}, "other": {"x": 1, "y": 2}, "list": [{"x": 1}] * 2}
    (tmp_path / "f").write_text("")
    assert read_yaml(tmp_path / "f") is None


@pytest.mark.parametrize("read", [read_json, read_yaml])
def test_only_plain_files_of_some_size_are_read(tmp_path, read):
    """A FIFO would wait for a writer for ever, a device has no end."""
    os.mkfifo(tmp_path / "fifo")
    with open(tmp_path / "large", "wb") as file:
        file.truncate(2**40)
    for name, reason in (
        (tmp_path / "fifo", "it is no plain file"),
        ("/dev/zero", "it is no plain file"),
        (tmp_path, "it is no plain file"),
        (tmp_path / "large", r"it has 1,099,511,627,776 bytes, and [\d,]+ are read at most"),
        (tmp_path / "none", "No such file or directory"),
    ):
        found = []
        thread = threading.Thread(
            target=lambda name=name, found=found: found.append(refusal_of(read, name)), daemon=True
        )
        thread.start()
        thread.join(20)
        assert found, f"{name}: still reading"
        assert re.search(reason, found[0]), found


def refusal_of(read, path) -> str:
    with pytest.raises(Refusal) as refusal:
        read(Path(path))
    return str(refusal.value)


def test_what_is_shown_changes_no_terminal_and_has_an_end():
    said = str(Refusal("a\x1b[31mred\x07 \u202ereversed \ud800 \x9b1m tab\tline\nend"))
    assert said == "a\\x1b[31mred\\x07 \\u202ereversed \\ud800 \\x9b1m tab\tline\nend"
    said.encode("utf-8")
    long = str(Refusal("start " + "x" * 100_000 + " Do this."))
    assert len(long) < MOST_CHARACTERS + 10 and long.startswith("start x") and long.endswith("x Do this.")
