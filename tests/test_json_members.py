"""Members of a JSON object are changed in its text; all other bytes stay."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hf_gqa.export.json_members import read_text, with_members


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=6,
)
OBJECTS = st.dictionaries(st.text(), VALUES, min_size=1, max_size=5)


@given(OBJECTS, OBJECTS, st.sampled_from([None, 1, 2, 4, "\t"]), st.booleans(), st.booleans())
def test_is_what_json_would_write(values, changes, indent, sort_keys, ascii_only):
    """As transformers writes it, to the byte; in any other way, the same values with old keys in their order."""
    how = {"indent": indent, "sort_keys": sort_keys, "ensure_ascii": ascii_only}
    found = with_members(json.dumps(values, **how) + "\n", changes)
    assert json.loads(found) == values | changes
    old = [key for key in json.loads(found) if key in values]
    assert old == (sorted(values) if sort_keys else list(values))
    if sort_keys and ascii_only and indent:
        assert found == json.dumps(values | changes, **how) + "\n"


@pytest.mark.parametrize(
    ("text", "changes", "expected"),
    [
        ('{"b" : 1.0E-6 ,\n"a":[ ]}', {"b": [2]}, '{"b" : [2] ,\n"a":[ ]}'),
        ('{"b": 1e-06, "a": 1}', {"c": 2, "a": {"x": 1}}, '{"b": 1e-06, "a": {"x": 1}, "c": 2}'),
        (
            '{\r\n    "b": "}\\",{"\r\n}\r\n',
            {"a": [1]},
            '{\r\n    "a": [\r\n        1\r\n    ],\r\n    "b": "}\\",{"\r\n}\r\n',
        ),
        ('{"a": 1, "a": 2}', {"a": 3}, '{"a": 1, "a": 3}'),
    ],
)
def test_all_else_stays(text, changes, expected):
    assert with_members(text, changes) == expected


def test_line_ends_are_read_as_they_are(tmp_path):
    (tmp_path / "config.json").write_bytes("é\r\n".encode())
    assert read_text(tmp_path / "config.json") == "é\r\n"
