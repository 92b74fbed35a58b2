"""The recipe of a run: YAML, checks, options, what is printed, where text comes from."""

import json
import shutil
from dataclasses import MISSING, fields

import pytest
import torch
import yaml
from safetensors.torch import load_file
from transformers import AutoTokenizer
from typer.main import get_command

from hf_gqa import Refusal
from hf_gqa.cli import app
from hf_gqa.uptrain.objectives import OBJECTIVES
from hf_gqa.uptrain.phases import Objective, Phase
from hf_gqa.uptrain.recipe import UptrainRecipe

from .command_line import assert_one_message, run_cli
from .donor_folders import files_of
from .tiny_donors import SOME_MODEL_TYPES
from .uptrain_command import (
    BUDGET,
    FRACTION,
    NO_TEXT,
    STEP_TOKENS,
    TEXT,
    Folders,
    arguments_of,
    own_cache,
    recipe,
    run_uptrain,
    some_text,
    uptrained,
    write_folders,
)


__all__ = ["own_cache"]
TEMPLATE = "{% for message in messages %}{{ message['role'] }}\n{{ message['content'] }}\n{% endfor %}"
PHASES = (
    Phase(share=0.25, objective=Objective(attention_output=1.0, teacher_forced=True), train="attention"),
    Phase(objective=Objective(kl=1.0, temperature=2.0), learning_rate=0.5, attention_learning_rate=2.0, warmup=0.0),
    Phase(objective=Objective(kl=0.5, cross_entropy=0.5), train="key_value", schedule="constant"),
)
OTHER_VALUES = {
    **{"teacher": "x/y", "teacher_dtype": "bfloat16", "teacher_device_map": "auto", "teacher_logits": "logits"},
    **{
        "train_file": ("a.txt", "b"),
        "dataset_name": "d/e",
        "dataset_config_name": "en",
        "dataset_split": "test",
        "text_column": "body",
        "streaming": True,
    },
    **{"sample_from_teacher": True, "sampled_tokens": 7, "eval_file": ("c.txt",), "eval_tokens": 9},
    **{"budget_tokens": 163_840, "budget_fraction": 0.05, "pretraining_tokens": 10**12, "objective": "kl"},
    **{"phases": PHASES, "train": "attention", "lora_rank": 4, "load_in_4bit": True, "learning_rate": 1e-4},
    **{
        "sequence_length": 64,
        "attend_across_documents": True,
        "per_device_train_batch_size": 3,
        "gradient_accumulation_steps": 2,
    },
    **{"gradient_checkpointing": True, "bf16": True, "dtype": "bfloat16", "torch_compile": True, "seed": 5},
    **{"logging_steps": 2, "eval_steps": 3, "save_steps": 4, "export": "best"},
}
NEEDED = {
    "dataset_name": NO_TEXT,
    "dataset_config_name": NO_TEXT | {"dataset_name": "d/e"},
    "dataset_split": NO_TEXT | {"dataset_name": "d/e"},
    "sample_from_teacher": NO_TEXT | {"teacher": "x/y"},
    "sampled_tokens": NO_TEXT | {"teacher": "x/y", "sample_from_teacher": True},
    "load_in_4bit": {"lora_rank": 4},
    "teacher_dtype": {"teacher": "x/y"},
    "teacher_device_map": {"teacher": "x/y"},
    "budget_fraction": FRACTION,
    "pretraining_tokens": FRACTION,
}


def test_every_field_has_another_value_here():
    assert {field.name for field in fields(UptrainRecipe)} == OTHER_VALUES.keys()
    assert all(field.default not in (MISSING, OTHER_VALUES[field.name]) for field in fields(UptrainRecipe))


@pytest.mark.parametrize("name", [None, *OTHER_VALUES])
def test_recipe_survives_yaml(tmp_path, name):
    one = recipe(**NEEDED.get(name, {}) | ({name: OTHER_VALUES[name]} if name else {}))
    file = tmp_path / "recipe.yaml"
    file.write_text(yaml.safe_dump(one.to_dict()))
    again = UptrainRecipe.from_dict(UptrainRecipe.read(file))
    assert again == one and again.to_dict() == one.to_dict()
    assert json.loads(json.dumps(one.to_dict())) == one.to_dict()
    defaults = {field.name: field.default for field in fields(UptrainRecipe)}
    assert all(defaults[key] != getattr(one, key) for key in one.to_dict())


def test_unknown_key_is_refused(tmp_path):
    with pytest.raises(Refusal, match=r"^recipe: unknown key 'budget'\. Known: teacher, teacher_dtype, "):
        UptrainRecipe.from_dict(TEXT | {"budget": 5})
    (tmp_path / "recipe.yaml").write_text("budget_tokens: 5\n1: 2\n")
    with pytest.raises(Refusal, match=r"recipe\.yaml: unknown key '1'\. Known: teacher, .*, export\.$"):
        UptrainRecipe.read(tmp_path / "recipe.yaml")


def whole(name: str, value) -> str:
    return f"{name} = {value!r} is not a positive whole number. Use 1 or more."


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        *(({name: value}, whole(name, value)) for name in ("sequence_length", "lora_rank") for value in (0, -1)),
        *(({name: 0}, whole(name, 0)) for name in ("per_device_train_batch_size", "gradient_accumulation_steps")),
        *(({f"{name}_steps": 0}, whole(f"{name}_steps", 0)) for name in ("logging", "save", "eval")),
        *(({name: 0}, whole(name, 0)) for name in ("eval_tokens", "sampled_tokens")),
        *(
            ({"learning_rate": value}, f"learning_rate = {value!r}: use a number between 0 and 1, such as 1e-4.")
            for value in (0, 1, -1e-4, 1e9, float("nan"))
        ),
        ({"train": "keys"}, "train = 'keys' is unknown. Use one of all, attention, key_value."),
        ({"dtype": "float16"}, "dtype = 'float16' is unknown. Use float32 or bfloat16."),
        ({"export": "all"}, "export = 'all' is unknown. Use last or best."),
        (
            {"objective": "kl", "phases": PHASES},
            "objective and phases: both say what is learned. Give one of them.",
        ),
        (
            {"objective": "distil"},
            f"objective 'distil' is unknown. Did you mean 'distill'? Known: {', '.join(OBJECTIVES.names())}.",
        ),
        ({"phases": [{"share": 1.0}]}, "phase: "),
        ({"phases": [{"objective": {"kl": 1.0}, "rate": 1}]}, "phase: unknown key 'rate'. Known: share, objective, "),
        ({"phases": [{"objective": {"kld": 1.0}}]}, "objective: unknown key 'kld'. Known: kl, cross_entropy, "),
        ({"phases": [{"objective": {"kl": -1.0}}]}, "objective: kl = -1.0 is not a number from 0. Use 0 or more."),
        (NO_TEXT, "text: got none. Give exactly one of --train-file, --dataset-name, --sample-from-teacher."),
        ({"dataset_name": "d/e"}, "text: got --train-file, --dataset-name. Give exactly one of "),
        ({"sample_from_teacher": True, "teacher": "t"}, "text: got --train-file, --sample-from-teacher. Give exactly"),
        (
            NO_TEXT | {"sample_from_teacher": True},
            "--sample-from-teacher: there is no teacher to sample from. Give --teacher.",
        ),
        (
            {"teacher_logits": "l", "streaming": True},
            "--teacher-logits: are stored row by row for a corpus on disk. Leave --streaming out.",
        ),
        *(({name: ""}, f"{name} = '' names nothing.") for name in ("teacher", "teacher_logits", "dataset_name")),
        ({"budget_tokens": 0}, "budget_tokens = 0 is no budget. Use a positive whole number of tokens."),
        ({"budget_tokens": -5}, "budget_tokens = -5 is no budget. Use a positive whole number of tokens."),
        ({"budget_tokens": None}, "budget: "),
        ({"budget_fraction": 0.05}, "budget: "),
        (
            {"budget_tokens": None, "budget_fraction": 0.05},
            "budget_fraction = 0.05: of how many tokens? Checkpoints do not say what they were trained on: give "
            "pretraining_tokens, or the budget as budget_tokens.",
        ),
        (
            FRACTION | {"budget_fraction": 0.0},
            "budget_fraction = 0.0 of pretraining_tokens = 1000000000000 is no budget.",
        ),
        (FRACTION | {"pretraining_tokens": 0}, "budget_fraction = 0.05 of pretraining_tokens = 0 is no budget."),
        (FRACTION | {"pretraining_tokens": 3}, "budget_tokens = 0 is no budget."),
    ],
)
def test_wrong_value_is_refused(wrong, message):
    with pytest.raises(Refusal) as refused:
        recipe(**wrong)
    assert str(refused.value).startswith(message), str(refused.value)


WRONG_TYPES = {
    **{"teacher": 5, "teacher_dtype": 5, "teacher_device_map": 5, "teacher_logits": 5},
    **{"train_file": 5, "dataset_name": ["d/e"], "dataset_config_name": 5},
    **{"dataset_split": 5, "text_column": 5, "streaming": "no", "sample_from_teacher": "no", "sampled_tokens": "many"},
    **{"eval_file": [5], "eval_tokens": 1.5, "budget_tokens": "1000", "budget_fraction": "some"},
    **{"pretraining_tokens": "1T", "objective": ["kl"], "phases": ["kl"], "train": ["all"], "lora_rank": 1.5},
    **{"load_in_4bit": "yes"},
    **{"learning_rate": "fast", "sequence_length": "64", "attend_across_documents": 1, "bf16": "maybe", "seed": "a"},
    **{"per_device_train_batch_size": [1], "gradient_accumulation_steps": None, "gradient_checkpointing": "yes"},
    **{"dtype": None, "torch_compile": 2, "logging_steps": "1", "eval_steps": {}, "save_steps": 0.5, "export": None},
}


@pytest.mark.parametrize("name", OTHER_VALUES)
def test_value_of_another_type_is_refused(name):
    with pytest.raises(Refusal, match="phase: got" if name == "phases" else f"^{name} = ") as refused:
        recipe(**NEEDED.get(name, {}) | {name: WRONG_TYPES[name]})
    assert repr(WRONG_TYPES[name][0] if name == "phases" else WRONG_TYPES[name]) in str(refused.value)


@pytest.mark.parametrize("phases", [5, [5], {"objective": {"kl": 1.0}}, [{"objective": "kl"}], [{"objective": None}]])
def test_phases_of_another_shape_are_refused(phases):
    with pytest.raises(Refusal, match="phase"):
        recipe(phases=phases)


def test_objective_follows_the_teacher():
    assert recipe().resolved_phases() == OBJECTIVES.get("cross_entropy")
    assert recipe(teacher="x/y").resolved_phases() == OBJECTIVES.get("distill")
    assert recipe(teacher_logits="logits").resolved_phases() == OBJECTIVES.get("kl")  # which needs no layers of it
    assert recipe(teacher="x/y", objective="echo").resolved_phases() == OBJECTIVES.get("echo")
    assert recipe(phases=PHASES).resolved_phases() == PHASES
    assert {phase.train for phase in recipe(phases=PHASES, train="attention").resolved_phases()} == {"attention"}


def options_of(command: str) -> dict:
    return {parameter.name: parameter for parameter in get_command(app).commands[command].params}


@pytest.mark.parametrize(
    ("command", "own"),
    [
        ("uptrain", {"student", "output", "resume", "overwrite", "dry_run", "json", "config"}),
        ("teacher-logits", {"student", "output", "top_k", "json", "config"}),
    ],
)
def test_fields_of_the_recipe_are_the_options(command, own):
    options = options_of(command)
    assert options.keys() - own == {field.name for field in fields(UptrainRecipe)} - {"phases"} and own < options.keys()
    for name in options.keys() - own:
        assert f"--{name.replace('_', '-')}" in options[name].opts and options[name].help and not options[name].required


def test_options_win_over_the_file(tmp_path):
    folders, output = write_folders(tmp_path), tmp_path / "out"
    values = {"train_file": [str(folders.text)], "budget_tokens": 500, "learning_rate": 0.001, "bf16": True, "seed": 3}
    values |= {"phases": [{"objective": {"cross_entropy": 1.0}, "train": "key_value"}], "sequence_length": 16}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(values))
    before = files_of(tmp_path)
    asked = ["uptrain", folders.student, output, "--config", tmp_path / "recipe.yaml", "--dry-run", "--json"]
    found = json.loads(run_cli(*asked).stdout)
    assert (found["budget_tokens"], found["learning_rate"]) == (500, 0.001)
    assert [phase["train"] for phase in found["phases"]] == ["key_value"] and found["tokens_per_step"] == 16
    found = json.loads(run_cli(*asked, "--budget_tokens", 700, "--learning-rate", 0.002, "--train", "all").stdout)
    assert (found["budget_tokens"], found["learning_rate"]) == (700, 0.002)
    assert [phase["train"] for phase in found["phases"]] == ["all"] and found["written"] is False
    assert_one_message(run_cli(*asked, "--train-file", tmp_path / "b.txt"), 2, f"{tmp_path / 'b.txt'}: is no file")
    assert files_of(tmp_path) == before


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    return write_folders(tmp_path_factory.mktemp("folders"))


def test_json_is_one_object_and_nothing_else(tmp_path, folders):
    result = run_uptrain(folders, tmp_path / "out", "--json")
    found = json.loads(result.stdout)
    assert (result.exit_code, result.stderr) == (0, "") and found["written"] is True
    assert found["result"]["tokens_seen"] == found["budget_tokens"] == BUDGET and found["steps"] == 8
    assert found["phases"][0]["train"] == "attention" and found["tokens_per_step"] == STEP_TOKENS


def test_words_for_people(tmp_path, folders):
    result = run_uptrain(folders, tmp_path / "out")
    for words in (
        f"{folders.student} -> {tmp_path / 'out'}\n",
        "1,000 in 8 steps of 128",
        "tokens held out",
        "6.14K of 21.9K parameters",
        "│ teacher        │ donor",
        "before ┃ after",
        "loss, nats per token",
        "1,000 tokens in ",
        f"Wrote {tmp_path / 'out'}: the student, uptraining.json with the log, and uptraining.svg.\n",
    ):
        assert words in result.stdout, result.stdout


def test_dry_run_explains_and_leaves_no_trace(tmp_path, folders):
    for flags, options in (([], {}), (["--sample-from-teacher"], {"train_file": None})):
        result = run_uptrain(folders, tmp_path / "a/out", "--dry-run", *flags, **options)
        assert result.exit_code == 0 and result.stdout.endswith("Nothing was written (--dry-run).\n")
        assert list(tmp_path.iterdir()) == []


def test_stream_is_seen_up_to_the_budget(tmp_path, folders):
    report = uptrained(folders, tmp_path / "out", "--streaming")
    assert report["tokens_seen"] == BUDGET and report["recipe"]["streaming"] is True
    assert report["after"]["eval_kl_nats_per_token"] < report["before"]["eval_kl_nats_per_token"]


def test_donor_may_write_the_text(tmp_path, folders):
    report = uptrained(folders, tmp_path / "out", "--sample-from-teacher", train_file=None, sampled_tokens=700)
    assert report["tokens_seen"] == BUDGET and report["recipe"]["sampled_tokens"] == 700
    assert report["after"]["eval_kl_nats_per_token"] < report["before"]["eval_kl_nats_per_token"]


def test_datasets_in_folders_and_conversations(tmp_path, folders):
    dataset = tmp_path / "dataset"
    dataset.mkdir()
    rows = [{"body": some_text(40, seed)} for seed in range(30)]
    (dataset / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    options = {"train_file": None, "dataset_name": dataset, "text_column": "body"}
    assert uptrained(folders, tmp_path / "of-dataset", **options)["tokens_seen"] == BUDGET
    chatty, chat = Folders(*(tmp_path / name for name in ("donor", "student", "chat.jsonl"))), []
    for name in ("donor", "student"):
        shutil.copytree(folders.root / name, tmp_path / name)
        tokenizer = AutoTokenizer.from_pretrained(tmp_path / name)
        tokenizer.chat_template = TEMPLATE
        tokenizer.save_pretrained(tmp_path / name)
    for seed in range(40):
        chat.append({"messages": [{"role": role, "content": some_text(9, seed)} for role in ("user", "assistant")]})
    chatty.text.write_text("".join(json.dumps(row) + "\n" for row in chat))
    assert uptrained(chatty, tmp_path / "of-chat")["tokens_seen"] == BUDGET
    assert (tmp_path / "of-chat/chat_template.jinja").read_text() == TEMPLATE


def test_stored_logits_replace_the_teacher(tmp_path, folders):
    logits = tmp_path / "logits"
    asked = arguments_of(folders, logits, objective="kl")
    written = run_cli("teacher-logits", *asked[1:], "--top-k", 99, "--json")
    assert written.exit_code == 0 and written.stderr == "", written.stderr or repr(written.exception)
    assert json.loads(written.stdout)["bytes_per_token"] == 99 * 4
    assert sorted(path.name for path in tmp_path.iterdir()) == ["logits"]
    report = uptrained(folders, tmp_path / "out", teacher=None, teacher_logits=logits, objective="kl")
    live = uptrained(folders, tmp_path / "live", objective="kl")
    kl = [[entry["loss_kl"] for entry in log if "loss_kl" in entry] for log in (report["log"], live["log"])]
    assert kl[0] == pytest.approx(kl[1], rel=2e-2) and kl[0][-1] < kl[0][0]
    assert report["after"]["eval_loss"] == pytest.approx(live["after"]["eval_loss"], abs=1e-2)
    again = run_cli("teacher-logits", *asked[1:], "--top-k", 99)
    assert again.exit_code == 0 and again.stdout.startswith(f"Wrote {logits}: ")


@pytest.mark.parametrize(
    ("model_type", "options"),
    [
        *((name, options) for name in SOME_MODEL_TYPES for options in ({}, {"objective": "kl", "lora_rank": 2})),
        *((name, {"objective": "kl"}) for name in ("gptj", "bloom", "gpt_neox")),
    ],
    ids=str,
)
def test_every_kind_of_family(tmp_path, model_type, options):
    folders = write_folders(tmp_path, torch.bfloat16, model_type=model_type)
    flags = ["--attend-across-documents"] if model_type == "bloom" else []
    report = uptrained(folders, tmp_path / "out", *flags, **options)
    assert report["after"]["eval_kl_nats_per_token"] < report["before"]["eval_kl_nats_per_token"]
    names = [set(load_file(folder / "model.safetensors")) for folder in (folders.student, tmp_path / "out")]
    assert names[0] == names[1]
