"""`hf-gqa convert` with a budget, with heads of each layer, with `--method auto`, and with a dataset to calibrate on."""

import json
from pathlib import Path

import pytest
import torch

from hf_gqa import open_donor, verify
from hf_gqa.convert.calibration import Calibration, calibrate
from hf_gqa.convert.manifest import Manifest
from hf_gqa.export.calibration_text import make_calibration

from .alike_donors import rows
from .command_line import assert_one_message, run_cli
from .donor_folders import write_donor
from .tiny_donors import tiny_donor


DONOR = Path(__file__).parent.parent / "examples" / "donor"


@pytest.fixture(scope="module")
def donor(tmp_path_factory) -> Path:
    return write_donor(tmp_path_factory.mktemp("donor") / "donor")


@pytest.fixture(scope="module")
def text(donor, tmp_path_factory) -> Path:
    file = tmp_path_factory.mktemp("text") / "calibration.safetensors"
    calibrate(open_donor(donor), tiny_donor("llama"), rows()).write(file)
    return file


@pytest.mark.usefixtures("warm_verification")
def test_a_budget_is_spent_layer_by_layer(donor, text, tmp_path):
    result = run_cli(
        "convert", donor, tmp_path / "out", "--kv-budget", "75%", "--method", "group,fold", "--calibration", text
    )
    assert result.exit_code == 0, result.output
    manifest = Manifest.read(tmp_path / "out")
    heads = [row["num_key_value_heads"] for row in manifest.layer_plan]
    assert sorted(heads) == [2, 4] and manifest.export == "bundle"
    allotment = manifest.choice["allotment"]
    assert allotment["num_key_value_heads"] == heads and allotment["spent_bytes"] == 384
    for said in (
        "KL to the donor (nats per token) where one layer alone",
        f"{allotment['damages'][0]['1']:.4f}",
        "384 B",
    ):
        assert said in result.stdout, result.stdout
    assert f"{heads[0]}, {heads[1]}" in result.stdout
    assert all(check.passed for check in verify(tmp_path / "out", open_donor(donor)))


def test_a_budget_in_bytes_is_the_same(donor, text, tmp_path):
    outputs = []
    for name, budget in (("one", ["--kv-budget", "0.75"]), ("other", ["--cache-budget", "384"])):
        result = run_cli("convert", donor, tmp_path / name, *budget, "--calibration", text, "--json")
        found = json.loads(result.stdout)
        assert found["after"]["cache_bytes_per_token"] == 384 == found["choice"]["allotment"]["spent_bytes"]
        assert found["choice"]["allotment"]["method"] == ["mean_pool"]
        outputs.append(found["choice"])
    assert outputs[0] == outputs[1]


def test_methods_are_tried_and_the_best_is_kept(donor, text, tmp_path):
    out = tmp_path / "out"
    result = run_cli("convert", donor, out, "--num-key-value-heads", 2, "--method", "auto", "--calibration", text)
    assert result.exit_code == 0, result.output
    manifest = Manifest.read(out)
    trials = manifest.choice["trials"]
    assert manifest.plan["method"] == trials[0]["method"] != ["mean_pool"]
    assert [trial["kl"] for trial in trials] == sorted(trial["kl"] for trial in trials)
    for trial in trials:
        assert ",".join(trial["method"]) in result.stdout and f"{trial['kl']:.4f}" in result.stdout
    assert f"method: {', '.join(trials[0]['method'])};" in result.stdout


def test_nothing_is_written_by_a_dry_run(donor, text, tmp_path):
    asked = ["--layer-heads", "4,1", "--method", "auto", "--calibration", text, "--dry-run"]
    result = run_cli("convert", donor, tmp_path / "out", *asked)
    assert result.exit_code == 0 and "Tried on part of the text" in result.stdout
    assert not (tmp_path / "out").exists()


def test_heads_of_each_layer(donor, tmp_path):
    result = run_cli("convert", donor, tmp_path / "out", "--layer-heads", "2, 1")
    assert result.exit_code == 0, result.output
    manifest = Manifest.read(tmp_path / "out")
    assert [row["num_key_value_heads"] for row in manifest.layer_plan] == [2, 1] and manifest.choice is None


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            ["--num-key-value-heads", 2, "--method", "auto"],
            "method = auto: tries methods on text, and there is none. Give --calibration or --calibration-tokens.",
        ),
        (
            ["--kv-budget", "50%"],
            "cache budget: tries layers on text, and there is none. Give --calibration or --calibration-tokens.",
        ),
        (
            ["--kv-budget", "half"],
            "--kv-budget half: is no share of the donor's cache. Give one such as 25% or 0.25.",
        ),
        (["--kv-budget", "120%"], "--kv-budget 120%: is no share of the donor's cache. Give one such as 25% or 0.25."),
        (
            ["--kv-budget", "50%", "--num-key-value-heads", 2],
            "convert: --kv-budget and --num-key-value-heads say each how many KV heads there shall be. Give one of them.",
        ),
        (
            ["--kv-budget", "50%", "--cache-budget", 9, "--layer-heads", "2,1"],
            "convert: --kv-budget and --cache-budget and --layer-heads say each how many KV heads there shall be. Give one "
            "of them.",
        ),
        (
            ["--method", "auto"],
            "method = auto: finds methods, not how many KV heads there shall be. Give --num-key-value-heads, --layer-heads, "
            "--kv-budget or --cache-budget with it.",
        ),
        (
            ["--layer-heads", "4,x"],
            "--layer-heads 4,x: is no list of KV heads. Give a number for each layer, such as 4,4,2,1.",
        ),
        (["--layer-heads", "4,2,1"], "layer_plan: 3 rows for num_hidden_layers = 2. Give one row each."),
        (
            ["--num-key-value-heads", 2, "--calibration-dataset", "a:b:c:d"],
            "calibration dataset 'a:b:c:d': is no dataset. Give NAME, NAME:CONFIGURATION or NAME:CONFIGURATION:SPLIT.",
        ),
        (
            ["--num-key-value-heads", 2, "--calibration-dataset", "a", "--calibration", "b.txt"],
            "calibration: files and a dataset are given. Give one of them.",
        ),
        (
            ["--num-key-value-heads", 2, "--method", "auto,refit"],
            "method = auto: is a search for methods, which needs text. Use hf-gqa convert --method auto, or search_plan in "
            "Python, and give the plan that it finds.",
        ),
    ],
)
def test_what_cannot_be_searched_is_refused(donor, tmp_path, options, message):
    result = run_cli("convert", donor, tmp_path / "out", *options)
    assert_one_message(result, 2, message)
    assert not (tmp_path / "out").exists()


def test_a_budget_that_cannot_be_met_is_refused(donor, text, tmp_path):
    result = run_cli("convert", donor, tmp_path / "out", "--kv-budget", "10%", "--calibration", text)
    assert_one_message(
        result, 2, "cache budget: 51 bytes per token (10.0% of donor 'donor').", "Use a budget from 128 to 512"
    )


@pytest.mark.slow
def test_a_dataset_calibrates_as_its_files_do(tmp_path):
    lines = [f"Once upon a time there was a cat with {n} mice to catch, and the mice ran away." for n in range(200)]
    folder = tmp_path / "dataset"
    folder.mkdir()
    (folder / "train.jsonl").write_text("\n".join(json.dumps({"text": line}) for line in lines))
    result = run_cli(
        "convert", DONOR, tmp_path / "out", "--num-key-value-heads", 4, "--method", "fold", "--calibration-dataset", folder,
        "--calibration-tokens", 1024, "--save-calibration", tmp_path / "kept.safetensors",
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    kept = Calibration.read(tmp_path / "kept.safetensors")
    whole = make_calibration(open_donor(DONOR), [folder / "train.jsonl"], 10**6)
    assert torch.equal(kept.tokens_NL, whole.tokens_NL[:2])
