"""No option is passed over in silence, options win over what a file says in another way, and a key stands once in a file."""

import json
from types import SimpleNamespace

import pytest
import yaml

from hf_gqa import Refusal
from hf_gqa.cli.recipe_options import Asked
from hf_gqa.evaluate.recipe import EvaluationRecipe
from hf_gqa.uptrain.recipe import UptrainRecipe

from .command_line import assert_one_message, run_cli
from .uptrain_command import (
    FRACTION,
    NO_TEXT,
    STEP_TOKENS,
    arguments_of,
    interrupted,
    own_cache,
    recipe,
    some_text,
    uptrained,
    write_folders,
)


__all__ = ["own_cache"]
SAMPLED = NO_TEXT | {"teacher": "x/y", "sample_from_teacher": True}
PASSED_OVER = (
    ({"dataset_config_name": "en"}, "dataset_config_name", "en", "--dataset-name"),
    ({"dataset_split": "test"}, "dataset_split", "test", "--dataset-name"),
    ({"sampled_tokens": 7}, "sampled_tokens", 7, "--sample-from-teacher"),
    (SAMPLED | {"text_column": "body"}, "text_column", "body", "--train-file or --dataset-name"),
    (SAMPLED | {"streaming": True}, "streaming", True, "--train-file or --dataset-name"),
    ({"eval_file": "c", "eval_tokens": 9}, "eval_tokens", 9, "text that is held out, and --eval-file is given"),
    ({"pretraining_tokens": 9}, "pretraining_tokens", 9, "--budget-fraction, and --budget-tokens is given"),
    ({"load_in_4bit": True}, "load_in_4bit", True, "--lora-rank"),
    ({"teacher_dtype": "float32"}, "teacher_dtype", "float32", "--teacher"),
    ({"teacher": "x/y", "teacher_logits": "l", "teacher_device_map": "cpu"}, "teacher_device_map", "cpu", "--teacher"),
)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    return write_folders(tmp_path_factory.mktemp("folders"))


@pytest.mark.parametrize(("asked", "name", "value", "whose"), PASSED_OVER, ids=[name for _, name, _, _ in PASSED_OVER])
def test_option_that_would_be_passed_over_is_refused(asked, name, value, whose):
    with pytest.raises(Refusal) as refused:
        recipe(**asked)
    assert str(refused.value) == f"{name} = {value!r} would be passed over: it belongs to {whose}. Leave it out."


ALTERNATIVES = {
    "budget": (FRACTION, {"budget_tokens": 700}, {"budget_tokens": 700}),
    "fraction": (
        {"budget_tokens": 9, "pretraining_tokens": 8000},
        *({"budget_fraction": 0.25}, {"budget_fraction": 0.25, "pretraining_tokens": 8000}),
    ),
    "file": ({"dataset_name": "d/e", "dataset_split": "test"}, {"train_file": ["b.txt"]}, {"train_file": ["b.txt"]}),
    "dataset": ({"train_file": ["a.txt"]}, {"dataset_name": "d/e"}, {"dataset_name": "d/e"}),
    "sampled": (
        {"train_file": ["a.txt"], "text_column": "body", "streaming": True},
        *({"sample_from_teacher": True}, {"sample_from_teacher": True}),
    ),
    "not sampled": ({"train_file": ["a.txt"]}, {"sample_from_teacher": False}, {"train_file": ["a.txt"]}),
    "objective": ({"phases": [{"objective": {"kl": 1.0}}]}, {"objective": "echo"}, {"objective": "echo"}),
    "held out": ({"eval_file": ["c.txt"]}, {"eval_tokens": 64}, {"eval_tokens": 64}),
    "to evaluate on": ({"eval_tokens": 64}, {"eval_file": ["c.txt"]}, {"eval_file": ["c.txt"]}),
}


@pytest.mark.parametrize("name", ALTERNATIVES)
def test_option_replaces_what_the_file_says_in_another_way(name, tmp_path):
    of_file, given, expected = ALTERNATIVES[name]
    rest = {"teacher": "x/y", "seed": 3}
    rest |= {} if {"budget_tokens", "budget_fraction"} & (of_file | given).keys() else {"budget_tokens": 500}
    of_text = {"train_file", "dataset_name", "sample_from_teacher"}
    rest |= {} if of_text & (of_file | given).keys() else {"train_file": ["a.txt"]}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump({key: v for key, v in (rest | of_file).items() if v}))
    assert Asked(UptrainRecipe, tmp_path / "recipe.yaml", given).recipe().to_dict() == rest | expected


def test_text_of_an_evaluation_is_replaced_too(tmp_path):
    (tmp_path / "recipe.yaml").write_text("text: [a.txt]\n")
    found = Asked(EvaluationRecipe, tmp_path / "recipe.yaml", {"sampled_tokens": 4096}).recipe()
    assert (found.text, found.sampled_tokens) == ((), 4096)


def test_fraction_given_and_tokens_given_are_still_two_budgets(folders, tmp_path):
    asked = arguments_of(folders, tmp_path / "out", budget_fraction=0.5, pretraining_tokens=2000)
    assert_one_message(run_cli(*asked), 2, "budget: say how long to train, by budget_tokens or by budget_fraction")


@pytest.mark.parametrize(
    ("text", "key"),
    [
        ("budget_tokens: 4096\nbudget_tokens: 40960000\n", "budget_tokens"),
        ("phases:\n- share: 1\n  objective: {kl: 1, kl: 2}\n", "kl"),
    ],
)
def test_key_that_stands_twice_is_refused(text, key, tmp_path):
    """The last would win in silence."""
    file = tmp_path / "recipe.yaml"
    file.write_text(text)
    with pytest.raises(
        Refusal, match=rf"not a readable YAML file \(the key '{key}' stands there twice .*line [23], column"
    ):
        UptrainRecipe.read(file)
    asked = ["convert", "donor", tmp_path / "out", "--plan", file]
    assert_one_message(run_cli(*asked), 2, f"{file}: not a readable YAML file (the key '{key}' stands there twice")


def test_merged_keys_are_no_second_ones(tmp_path):
    file = tmp_path / "plan.yaml"
    file.write_text("base: &base {a: 1}\nother: {<<: *base, a: 2}\n")
    with pytest.raises(Refusal, match="unknown key 'base'"):
        UptrainRecipe.read(file)


def test_text_to_evaluate_on_is_read_from_the_column_asked_for(folders, tmp_path):
    for name, seed in (("train.jsonl", 0), ("eval.jsonl", 1)):
        rows = ({"content": some_text(40, seed + 2 * number)} for number in range(30))
        (tmp_path / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "eval.txt").write_text(some_text(200, seed=1))
    options = {"train_file": tmp_path / "train.jsonl", "text_column": "content"}
    for number, file in enumerate(("eval.jsonl", "eval.txt")):  # whose one column is the reader's
        report = uptrained(folders, tmp_path / str(number), eval_file=tmp_path / file, **options)
        assert report["recipe"]["text_column"] == "content" and "eval_tokens" not in report["recipe"]


def test_file_of_empty_lines_holds_no_text(folders, tmp_path):
    (tmp_path / "empty.jsonl").write_text("\n" * 9)
    asked = arguments_of(folders, tmp_path / "out", train_file=tmp_path / "empty.jsonl")
    assert_one_message(run_cli(*asked), 2, f"{tmp_path / 'empty.jsonl'}: holds no text. Give other text.")


def test_teacher_of_its_own_type_is_a_model_of_its_own(folders, tmp_path):
    reports = {
        flag: uptrained(folders, tmp_path / flag, **({"teacher_" + flag: value} if value else {}))
        for flag, value in (("shared", None), ("device_map", "cpu"), ("dtype", "bfloat16"))
    }
    own = {flag: report["teacher_own_bytes"] for flag, report in reports.items()}
    assert all(reports[flag]["teacher_shared_bytes"] == 0 for flag in ("device_map", "dtype"))
    assert own["shared"] < own["dtype"] < own["device_map"]
    losses = {flag: report["after"]["eval_loss"] for flag, report in reports.items()}
    assert losses["device_map"] == pytest.approx(losses["shared"], abs=1e-5)
    assert losses["dtype"] == pytest.approx(losses["shared"], abs=0.05)


@pytest.mark.parametrize("seed", [-1, 2**32, 1.5, True])
def test_seed_that_no_generator_takes_is_refused(seed):
    with pytest.raises(Refusal, match=f"^seed = {seed}"):
        recipe(seed=seed)


@pytest.mark.parametrize(("text", "rate"), [("1e-4", 1e-4), ("0.0001", 1e-4), ("1.0e-4", 1e-4), ("3e-05", 3e-5)])
def test_learning_rate_may_be_written_as_people_do(tmp_path, text, rate):
    """YAML 1.1 takes 1e-4 for a string."""
    (tmp_path / "recipe.yaml").write_text(f"train_file: a.txt\nbudget_tokens: 5\nlearning_rate: {text}\n")
    assert UptrainRecipe.from_dict(UptrainRecipe.read(tmp_path / "recipe.yaml")).learning_rate == rate


def test_one_file_need_not_be_a_list():
    assert recipe(train_file="a.txt", eval_file="b.txt") == recipe(train_file=["a.txt"], eval_file=("b.txt",))


def test_budget_as_a_fraction():
    assert recipe().total_tokens == 1000 and recipe(**FRACTION).total_tokens == 50_000_000_000


def test_resumed_run_counts_its_own_tokens_per_second(folders, tmp_path, monkeypatch):
    interrupted(folders, tmp_path / "out", monkeypatch)
    report = uptrained(folders, tmp_path / "out", "--resume")
    own = report["tokens_seen"] - 3 * STEP_TOKENS
    assert report["tokens_per_second"] * report["seconds"] == pytest.approx(own)


def test_resuming_with_more_processes_is_refused(folders, tmp_path, monkeypatch):
    """Each would go on in other rows than it had come to."""
    interrupted(folders, tmp_path / "out", monkeypatch)
    monkeypatch.setattr("hf_gqa.uptrain.preparation.PartialState", lambda: SimpleNamespace(num_processes=2))
    result = run_cli(*arguments_of(folders, tmp_path / "out", "--resume"))
    assert_one_message(result, 2, "processes was 1 when it was saved and is 2 now")


def test_resuming_with_other_stored_logits_is_refused(folders, tmp_path, monkeypatch):
    logits, output = tmp_path / "logits", tmp_path / "runs/out"
    output.parent.mkdir()
    for top_k in (8, 4):
        asked = arguments_of(folders, logits / str(top_k), objective="kl")
        assert run_cli("teacher-logits", *asked[1:], "--top-k", top_k).exit_code == 0
    options = {"teacher": None, "objective": "kl"}
    interrupted(folders, output, monkeypatch, teacher_logits=logits / "8", **options)
    asked = arguments_of(folders, output, "--resume", teacher_logits=logits / "4", **options)
    assert_one_message(run_cli(*asked), 2, "teacher_logits.top_k was 8 when it was saved and is 4 now")
    (logits / "8").rename(logits / "moved")
    uptrained(folders, output, "--resume", teacher_logits=logits / "moved", **options)
