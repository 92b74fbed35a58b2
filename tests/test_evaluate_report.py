"""Reports: exact through JSON, and anything that is not one is refused by name."""

import json
import math
from dataclasses import replace

import pytest

from hf_gqa.evaluate.report import REPORT_FILE, Report
from hf_gqa.refusal import Refusal

from .sample_report import sample_report


def leaves(value, path=()):
    """(path, leaf) of everything in a JSON value that is no container."""
    if isinstance(value, dict | list):
        for key, item in value.items() if isinstance(value, dict) else enumerate(value):
            yield from leaves(item, (*path, key))
    else:
        yield path, value


def changed(value, path, leaf):
    """A copy with another leaf."""
    if not path:
        return leaf
    copied = dict(value) if isinstance(value, dict) else list(value)
    copied[path[0]] = changed(value[path[0]], path[1:], leaf)
    return copied


def test_round_trip_is_exact(tmp_path):
    report = sample_report(kl_nats_per_token=math.pi / 1e7)
    (tmp_path / REPORT_FILE).write_text(report.to_json())
    assert Report.read(tmp_path) == Report.read(tmp_path / REPORT_FILE) == report
    assert Report.from_dict(report.to_dict()) == report
    assert Report.read(tmp_path).to_json() == report.to_json()


def test_names_that_machines_read():
    values = json.loads(sample_report().to_json())
    for side in ("donor", "student"):
        for name in ("loss_nats_per_token", "cache_bytes_per_token_computed", "cache_bytes_per_token_measured"):
            assert values[side][name] > 0
    assert values["kl_nats_per_token"] >= 0 and 0 <= values["top1_agreement_fraction"] <= 1


def test_every_leaf_of_the_wrong_kind_is_refused():
    values = json.loads(sample_report().to_json())
    free = {"conversion", "recipe"}  # kept as they are
    checked = 0
    for path, leaf in leaves(values):
        if path[0] in free:
            continue
        wrong = {"x": 1} if leaf is None else [] if isinstance(leaf, str) else "1"
        with pytest.raises(Refusal, match=r"expected|format =|unknown key"):
            Report.from_dict(changed(values, path, wrong), "report.json")
        checked += 1
    assert checked > 150


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda values: values.pop("donor"), r"report\.json: key 'donor' is missing\. Known: format, donor, "),
        (lambda values: values.update(score=1), r"report\.json: unknown key 'score'\. Known: .* make it again\."),
        (
            lambda values: values["donor"].update(perplexity="low"),
            r"report\.json: donor: perplexity: got 'low', expected a number\. It was written by another version or edited",
        ),
        (lambda values: values.update(format=2), r"format = 2, this hf_gqa reads 1\. Evaluate the student again"),
        (lambda values: values.update(speed=None), r"report\.json: speed: got None, expected a list\."),
    ],
)
def test_what_is_no_report_is_refused(tmp_path, change, message):
    values = sample_report().to_dict()
    change(values)
    (tmp_path / REPORT_FILE).write_text(json.dumps(values))
    with pytest.raises(Refusal, match=message):
        Report.read(tmp_path)


def test_files_that_are_no_report_are_refused(tmp_path):
    with pytest.raises(Refusal, match=r"report\.json: no such report\. Write one with hf-gqa evaluate\."):
        Report.read(tmp_path)
    (tmp_path / REPORT_FILE).write_text("{")
    with pytest.raises(Refusal, match=r"report\.json: not readable JSON \(.*\)\. Evaluate the student again\."):
        Report.read(tmp_path)
    (tmp_path / REPORT_FILE).write_text("[]")
    with pytest.raises(Refusal, match="format = None"):
        Report.read(tmp_path)


def test_no_number_that_json_cannot_hold():
    with pytest.raises(ValueError, match="JSON compliant"):
        replace(sample_report(), kl_nats_per_token=math.inf).to_json()
