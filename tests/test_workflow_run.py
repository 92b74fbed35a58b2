"""hf-gqa run: from a recipe to a card, stopped and gone on with, and refused before anything is made."""

import json
from pathlib import Path

import pytest
import yaml
from huggingface_hub import ModelCard

from hf_gqa.convert.manifest import Manifest
from hf_gqa.evaluate.evaluation import Evaluation
from hf_gqa.evaluate.report import Report
from hf_gqa.export.card_lint import lint_card
from hf_gqa.refusal import Refusal
from hf_gqa.workflow import run_recipe
from hf_gqa.workflow.run_recipe import Run, RunRecipe, read_run_recipe

from .command_line import assert_one_message, run_cli


DONOR = "examples/donor"
EVALUATE = {"sampled_tokens": 320, "context_length": 32, "retrieval_samples": 0, "speed": False, "peak_memory": False}
EVALUATE |= {"continuation_tokens": 4, "resamples": 200}
UPTRAIN = {"sample_from_teacher": True, "budget_tokens": 512, "sequence_length": 32, "eval_tokens": 64}


def recipe_of(folder: Path, **changes) -> dict:
    values = {"donor": DONOR, "output_dir": str(folder / "out"), "convert": {"num_key_value_heads": 2}}
    return values | {"uptrain": dict(UPTRAIN), "evaluate": dict(EVALUATE)} | changes


def write(folder: Path, **changes) -> Path:
    path = folder / "recipe.yaml"
    values = {key: value for key, value in recipe_of(folder, **changes).items() if value is not None}
    path.write_text(yaml.safe_dump(values))
    return path


def names_in(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def test_from_donor_to_card_and_not_twice(tmp_path, monkeypatch):
    path, out = write(tmp_path), tmp_path / "out"
    done = run_cli("run", path)
    assert done.exit_code == 0, done.stderr
    assert names_in(out) == {"recipe.yaml", "converted", "student", "report"}
    report = Report.read(out / "report")
    assert report.recipe == read_run_recipe(path).to_dict()
    assert report.conversion == json.loads((out / "student" / "conversion_manifest.json").read_text())
    assert Manifest.read(out / "student").uptraining["tokens_seen"] == 512
    assert report.continuations[0].converted is not None
    card = (out / "student" / "README.md").read_text()
    assert lint_card(card, report, out / "student") == [] and ModelCard(card).data.base_model
    assert all(words in done.stdout for words in ("KV heads", "phase:", "Wrote", "report.html"))

    assert_one_message(
        run_cli("run", path), 2, "out: holds an earlier run. Use --resume to go on with it, or --overwrite"
    )
    monkeypatch.setattr(run_recipe, "UptrainRun", None)  # nothing is trained again
    before = {file: file.stat().st_mtime_ns for file in (out / "student").iterdir() if file.suffix == ".safetensors"}
    again = run_cli("run", path, "--resume", "--json")
    assert again.exit_code == 0, again.stderr
    assert Report.from_dict(json.loads(again.stdout)["report"]) == report
    assert {file: file.stat().st_mtime_ns for file in before} == before
    other = write(tmp_path, convert={"num_key_value_heads": 4})
    assert_one_message(run_cli("run", other, "--resume"), 2, "was made with another 'convert'", "--overwrite")


def test_only_what_a_change_concerns_is_done_again(tmp_path):
    def stages_of(changes, **how) -> list[str]:
        stages = []
        Run(read_run_recipe(write(tmp_path, **changes)), announce=lambda stage, facts: stages.append(stage), **how)()
        return stages

    assert stages_of({}) == ["convert", "uptrain", "evaluate", "card"]
    evaluated = {"evaluate": EVALUATE | {"seed": 5}}
    assert stages_of(evaluated, resume=True) == ["evaluate", "card"]
    assert Report.read(tmp_path / "out/report").recipe["evaluate"]["seed"] == 5
    trained = evaluated | {"uptrain": UPTRAIN | {"seed": 5}}
    with pytest.raises(
        Refusal, match=r"was made with another 'uptrain' .* add --overwrite to do uptraining and evaluation ag"
    ):
        stages_of(trained, resume=True)
    assert stages_of(trained, resume=True, overwrite=True) == ["uptrain", "evaluate", "card"]
    assert stages_of(trained, resume=True) == ["card"]
    assert stages_of(trained | {"convert": {"num_key_value_heads": 4}}, resume=True, overwrite=True)[0] == "convert"


def test_a_run_that_was_stopped_goes_on(tmp_path, monkeypatch):
    path, out = write(tmp_path), tmp_path / "out"

    def stop(self):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Evaluation, "run", stop)
        with pytest.raises(KeyboardInterrupt):
            Run(read_run_recipe(path))()
    assert names_in(out) == {"recipe.yaml", "converted", "student"}
    stages = []
    Run(read_run_recipe(path), resume=True, announce=lambda stage, facts: stages.append(stage))()
    assert stages == ["evaluate", "card"] and (out / "student" / "README.md").is_file()


def test_without_uptraining_the_student_is_the_converted_one(tmp_path):
    better = {"convert": {"num_key_value_heads": 2, "method": ["group", "fold", "refit"]}, "calibration_tokens": 1024}
    recipe, out = read_run_recipe(write(tmp_path, uptrain=None, **better)), tmp_path / "out"
    Run(recipe)()
    assert names_in(out) == {"recipe.yaml", "student", "report"}
    assert Manifest.read(out / "student").uptraining is None
    (out / "mine.txt").write_text("kept")
    Run(recipe, overwrite=True)()
    assert names_in(out) == {"recipe.yaml", "student", "report", "mine.txt"}


def test_dry_run_explains_and_makes_nothing(tmp_path):
    done = run_cli("run", write(tmp_path), "--dry-run")
    assert done.exit_code == 0 and "KV heads" in done.stdout and "Nothing was done" in done.stdout
    assert names_in(tmp_path) == {"recipe.yaml"}


def test_options_win_over_the_recipe(tmp_path):
    done = run_cli("run", write(tmp_path, donor="nowhere"), "--donor", DONOR, "--dry-run", "--json")
    assert done.exit_code == 0, done.stderr
    assert json.loads(done.stdout)["recipe"]["donor"] == DONOR


def test_the_donor_teaches_unless_it_is_said_otherwise(tmp_path):
    recipe = read_run_recipe(write(tmp_path))
    assert recipe.uptrain.teacher == DONOR
    plain = {"train_file": ["a.txt"], "budget_tokens": 5, "objective": "cross_entropy"}
    assert read_run_recipe(write(tmp_path, uptrain=plain)).uptrain.teacher is None
    stored = {"train_file": ["a.txt"], "budget_tokens": 5, "teacher_logits": "folder"}
    assert read_run_recipe(write(tmp_path, uptrain=stored)).uptrain.teacher is None


def test_round_trip_is_exact(tmp_path):
    recipe = read_run_recipe(write(tmp_path, convert={"num_key_value_heads": 2, "method": "first", "seed": 3}))
    assert RunRecipe.from_dict(yaml.safe_load(yaml.safe_dump(recipe.to_dict()))) == recipe
    assert recipe.to_dict()["convert"] == {"num_key_value_heads": 2, "method": ["first"], "seed": 3}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"convert": None}, "recipe.yaml: the key 'convert' is missing. Give it."),
        ({"teach": 1}, "recipe.yaml: unknown key 'teach'. Known: donor, output_dir, convert, "),
        ({"convert": {"num_key_value_heads": 3}}, "num_key_value_heads = 3 does not divide"),
        ({"convert": {"heads": 3}}, "plan: unknown key 'heads'."),
        ({"evaluate": {"sampled_tokens": 5, "bogus": 1}}, "evaluate: unknown key 'bogus'."),
        ({"uptrain": {"budget_tokens": 5, "bogus": 1}}, "uptrain: unknown key 'bogus'."),
        ({"evaluate": []}, "evaluate = [] is not what belongs there. Correct it, or leave it out."),
        ({"donor": 5}, "donor = 5 names nothing. Give a folder."),
        ({"donor": "/nowhere"}, "/nowhere: no such folder."),
        ({"donor": ""}, "donor = '' names nothing. Give a folder."),
        ({"output_dir": "a\0b"}, "output_dir = 'a\\x00b': holds a character that no name or text has."),
        ({"output_dir": "a\ud800b"}, "output_dir = 'a\\ud800b': holds a character that no name or text has."),
        ({"convert": {7: 1, "heads": 3}}, "plan: unknown key '7'."),
        ({"convert": {"layer_plan": [{7: 1, "heads": 3}]}}, "layer_plan: a row has the key num_key_value_heads"),
        ({"evaluate": {"text": ["/dev/zero"]}}, "/dev/zero: is no file and no folder. Check train_file."),
        ({"evaluate": {"text": ["/nowhere.txt"]}}, "/nowhere.txt: is no file and no folder."),
        (
            {"evaluate": EVALUATE | {"context_length": 100_000_000_000}},
            "context_length = 100,000,000,000: the models have",
        ),
        ({"evaluate": EVALUATE | {"device": "cuda:99"}}, "device = 'cuda:99' is not to be had"),
        ({"evaluate": EVALUATE | {"tasks": ["no_such_task"]}}, "no_such_task"),
        ({"evaluate": EVALUATE | {"memory": ["much"]}}, "much"),
        ({"uptrain": {"budget_tokens": 5, "train_file": ["/nowhere.txt"]}}, "/nowhere.txt: is no file and no folder."),
        (
            {"uptrain": UPTRAIN | {"eval_tokens": None, "eval_file": ["/nowhere.txt"]}},
            "/nowhere.txt: is no file and no folder.",
        ),
        (
            {"uptrain": UPTRAIN | {"sequence_length": 10**9}},
            "sequence_length = 1,000,000,000: the donor has positions for",
        ),
        ({"calibration": ["/nowhere.txt"]}, "calibration: /nowhere.txt: no such file. Check its path."),
    ],
)
def test_bad_recipes_make_nothing(tmp_path, changes, message):
    """Whatever stage it is that would fail: none begins."""
    assert_one_message(run_cli("run", write(tmp_path, **changes)), 2, message)
    assert names_in(tmp_path) == {"recipe.yaml"}


def test_folders_of_others_are_not_touched(tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.tex").write_text("years of work")
    for flags in ([], ["--overwrite"], ["--resume"]):
        assert_one_message(run_cli("run", write(tmp_path), *flags), 2, "out: exists and no run wrote it.")
    with pytest.raises(Refusal, match="overlaps the donor's folder"):
        Run(read_run_recipe(write(tmp_path, output_dir=f"{DONOR}/out")))
    (tmp_path / "missing").mkdir()
    with pytest.raises(Refusal, match=r"there is nothing to resume\. Run without --resume\."):
        Run(read_run_recipe(write(tmp_path, output_dir=str(tmp_path / "never"))), resume=True)
