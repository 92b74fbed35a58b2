"""hf-gqa sweep: a table of many plans whose numbers are those of their reports, and that goes on where it stopped."""

import csv
import json
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hf_gqa.evaluate.report import Report
from hf_gqa.refusal import Refusal
from hf_gqa.workflow import sweep as sweep_module
from hf_gqa.workflow.sweep_plot import plot_sweep
from hf_gqa.workflow.sweep_table import SweepTable, with_front

from .command_line import assert_one_message, run_cli
from .sweep_rows import row
from .tiny_text_models import tiny_bert, tiny_sentence_bert, tiny_t5, tokenizer_of_kind


DONOR = "examples/donor"
EVALUATE = ["--sampled-tokens", 320, "--context-length", 32, "--retrieval-samples", 0, "--no-speed", "--no-peak-memory"]
EVALUATE += ["--resamples", 200, "--continuation-tokens", 2]


def names_in(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


@pytest.fixture(scope="module")
def swept(tmp_path_factory) -> Path:
    output = tmp_path_factory.mktemp("sweep") / "out"
    done = run_cli("sweep", DONOR, output, "--num-key-value-heads", "8,2", "--methods", "mean_pool,first", *EVALUATE)
    assert done.exit_code == 0, done.stderr
    assert "mean_pool-own-2" in done.stdout and "plan 4 of 4" in done.stdout
    return output


def test_numbers_are_those_of_the_reports(swept):
    table = SweepTable.read(swept)
    assert [found.plan for found in table.rows] == ["mean_pool-own-8", "first-own-8", "mean_pool-own-2", "first-own-2"]
    for found in table.rows:
        report = Report.read(swept / "plans" / found.plan / "report")
        assert found.loss_nats_per_token == report.student.loss_nats_per_token
        assert found.loss_difference == report.differences.loss_nats_per_token
        assert found.cache_fraction == found.num_key_value_heads / 8 and found.decode_speedup is None
        assert table.donor_loss_nats_per_token == report.donor.loss_nats_per_token
    assert table.rows[0].kl_nats_per_token == 0 < table.rows[2].kl_nats_per_token
    assert table.text_tokens == 320 and table.donor_cache_bytes_per_token == 6144


def test_csv_holds_the_same(swept):
    lines = list(csv.DictReader((swept / "sweep.csv").read_text().splitlines()))
    for line, found in zip(lines, SweepTable.read(swept).rows, strict=True):
        assert line["plan"] == found.plan and float(line["loss_nats_per_token"]) == found.loss_nats_per_token
        assert float(line["loss_difference_low"]) == found.loss_difference.low


def test_only_reports_stay_and_the_plot_names_all(swept):
    assert names_in(swept) == {"plans", "sweep.json", "sweep.csv", "sweep.svg"}
    assert names_in(swept / "plans" / "first-own-2") == {"report"}
    svg = (swept / "sweep.svg").read_text()
    assert all(word in svg for word in ("mean_pool", "first", "donor", "front", "bytes per token"))
    assert svg == plot_sweep(SweepTable.read(swept))


def test_more_plans_are_added_and_none_is_run_twice(swept, monkeypatch):
    before = SweepTable.read(swept)
    converted = []
    real = sweep_module.convert_checkpoint
    monkeypatch.setattr(
        sweep_module, "convert_checkpoint", lambda *a, **k: (converted.append(a[1].parent.name), real(*a, **k))
    )
    asked = ["sweep", DONOR, swept, "--num-key-value-heads", "8,2,1", "--methods", "mean_pool,first", *EVALUATE]
    done = run_cli(*asked, "--json")
    assert done.exit_code == 0, done.stderr
    assert converted == ["mean_pool-own-1", "first-own-1"]
    table = SweepTable.read(swept)
    assert json.loads(done.stdout)["rows"][5]["plan"] == "first-own-1" and len(table.rows) == 6
    assert {found.plan for found in before.rows} < {found.plan for found in table.rows}


@pytest.mark.slow
def test_uptraining_and_speed_and_students_kept(tmp_path):
    (tmp_path / "uptrain.yaml").write_text(
        "sample_from_teacher: true\nbudget_tokens: 2048\nsequence_length: 32\neval_tokens: 64\n"
    )
    asked = ["sweep", DONOR, tmp_path / "out", "--num-key-value-heads", "2", "--methods", "group+fold"]
    asked += ["--calibration-tokens", 1024, "--uptrain", tmp_path / "uptrain.yaml"]
    few = [word for word in EVALUATE if word != "--no-speed"]
    few += ["--speed-context-lengths", 16, "--repetitions", 3, "--decode-tokens", 2]
    done = run_cli(*asked, *few, "--keep-students")
    assert done.exit_code == 0, done.stderr
    (found,) = SweepTable.read(tmp_path / "out").rows
    assert found.uptrain_tokens == 2048 and found.decode_speedup > 0 and found.allowed_decode_speedup > 1
    assert names_in(tmp_path / "out" / "plans" / "group+fold-own-2") == {"converted", "student", "report"}
    assert "tokens per second" in (tmp_path / "out" / "sweep.svg").read_text()


def folder_of(tmp_path: Path, donor, kind: str) -> Path:
    donor.save_pretrained(tmp_path / "donor")
    tokenizer_of_kind(kind).save_pretrained(tmp_path / "donor")
    return tmp_path / "donor"


def test_encoder_decoder_by_the_cache_of_both_its_sides(tmp_path):
    text = tmp_path / "pairs.jsonl"
    text.write_text("".join(json.dumps({"source": "so it goes", "target": "it goes"}) + "\n" for _ in range(12)))
    flags = ["--text", text, "--rouge-pairs", 0, "--no-speed", "--no-peak-memory", "--resamples", 100]
    donor = folder_of(tmp_path, tiny_t5(), "seq2seq")
    done = run_cli("sweep", donor, tmp_path / "out", "--num-key-value-heads", "2,1", *flags)
    assert done.exit_code == 0, done.stderr
    table = SweepTable.read(tmp_path / "out")
    assert (
        table.donor_cache_bytes_per_token == 2 * 2 * 4 * 8 * 4 * 2
    )  # K and V, layers, heads, head_dim, float32, sides
    assert [found.cache_fraction for found in table.rows] == [0.5, 0.25]
    assert all(found.loss_nats_per_token != table.donor_loss_nats_per_token for found in table.rows)
    (tmp_path / "uptrain.yaml").write_text(f"train_file: [{text}]\nbudget_tokens: 64\n")
    asked = ["--num-key-value-heads", "2", *flags, "--uptrain", tmp_path / "uptrain.yaml"]
    refused = run_cli("sweep", donor, tmp_path / "no", *asked)
    assert_one_message(refused, 2, "causal language models alone are uptrained. Leave --uptrain out.")


def test_encoder_by_its_parameters(tmp_path):
    (tmp_path / "text.txt").write_text("so it goes on and on\n" * 12)
    flags = ["--text", tmp_path / "text.txt", "--no-speed", "--no-peak-memory", "--resamples", 100]
    donor = folder_of(tmp_path, tiny_bert(), "masked_lm")
    done = run_cli("sweep", donor, tmp_path / "out", "--num-key-value-heads", "4,2", *flags)
    assert done.exit_code == 0, done.stderr
    assert "parameters" in done.stdout and "no other plan has both fewer parameters and a lower loss" in done.stdout
    table = SweepTable.read(tmp_path / "out")
    assert table.donor_cache_bytes_per_token is None and table.rows[0].size == table.donor_parameters
    assert table.rows[0].kl_nats_per_token == 0 < table.rows[1].kl_nats_per_token
    assert table.rows[1].size < table.donor_parameters
    assert "parameters (less is better)" in (tmp_path / "out" / "sweep.svg").read_text()


def test_encoder_that_predicts_nothing_is_refused(tmp_path):
    donor = folder_of(tmp_path, tiny_sentence_bert(), "encoder")
    done = run_cli("sweep", donor, tmp_path / "out", "--num-key-value-heads", "2", *EVALUATE)
    assert_one_message(done, 2, "is a BertModel, which predicts no tokens, and the table compares by loss.")


@given(points=st.lists(st.tuples(st.integers(1, 4), st.integers(0, 4)), min_size=1, max_size=8))
def test_front_is_what_no_other_beats(points):
    rows = [replace(row(1, loss), cache_bytes_per_token=cache) for cache, loss in points]
    for one, marked in zip(points, with_front(rows), strict=True):
        better = any(o != one and o[0] <= one[0] and o[1] <= one[1] for o in points)
        assert marked.on_front == (not better)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--num-key-value-heads", "3"], "num_key_value_heads = 3 does not divide"),
        (["--num-key-value-heads", "a"], "num_key_value_heads = 'a': not whole numbers. Give such as 8,4,2,1."),
        (["--num-key-value-heads", "2", "--methods", "meen_pool"], "Did you mean 'mean_pool'?"),
        (["--num-key-value-heads", "2", "--sharing", "none"], "sharing pattern 'none' is unknown."),
        (["--num-key-value-heads", "2", "--uptrain", "/nowhere.yaml"], "/nowhere.yaml: not a readable YAML file"),
    ],
)
def test_bad_plans_make_nothing(tmp_path, flags, message):
    assert_one_message(run_cli("sweep", DONOR, tmp_path / "out", *flags, *EVALUATE), 2, message)
    assert not (tmp_path / "out").exists()


def test_other_folders_and_other_sweeps_are_kept(swept, tmp_path):
    (tmp_path / "thesis.tex").write_text("years of work")
    asked = ["--num-key-value-heads", "2", *EVALUATE]
    for flags in ([], ["--overwrite"]):
        assert_one_message(run_cli("sweep", DONOR, tmp_path, *asked, *flags), 2, "exists and no sweep wrote it.")
    message = "holds a sweep with another donor, text or uptraining. Give another output, or --overwrite."
    assert_one_message(run_cli("sweep", DONOR, swept, *asked, "--seed", 5), 2, message)


@pytest.mark.parametrize("content", ["{", "[]", '{"format": 7}'])
def test_what_is_no_sweep_is_refused(tmp_path, content):
    (tmp_path / "sweep.json").write_text(content)
    with pytest.raises(Refusal, match=r"(not readable JSON|is no sweep of format 2).* Make (a sweep|one) with"):
        SweepTable.read(tmp_path)
