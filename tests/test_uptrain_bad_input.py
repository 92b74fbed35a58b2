"""What `hf-gqa uptrain` and `hf-gqa teacher-logits` refuse: one message, exit code 2, nothing written, nothing touched."""

import json
import os
import shutil
from pathlib import Path

import pytest
import yaml
from safetensors.torch import save_file
from transformers import AutoModel

from hf_gqa import convert_checkpoint
from hf_gqa.uptrain.objectives import OBJECTIVES

from .command_line import assert_one_message, run_cli
from .donor_folders import files_of
from .tiny_donors import tiny_donor
from .tiny_tokenizer import letters
from .uptrain_command import (
    Folders,
    arguments_of,
    interrupted,
    own_cache,
    run_uptrain,
    some_text,
    tensors_of,
    uptrained,
    write_folders,
)


__all__ = ["own_cache"]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Which every test of this file leaves byte for byte as they are."""
    folders = write_folders(tmp_path_factory.mktemp("folders"))
    (folders.root / "eval.txt").write_text(some_text(200, seed=1))
    before = files_of(folders.root)
    yield folders
    assert files_of(folders.root) == before


@pytest.fixture(scope="module")
def plain(tmp_path_factory, folders):
    """(output, what it says): the run that others are compared with."""
    output = tmp_path_factory.mktemp("plain") / "out"
    return output, uptrained(folders, output, eval_file=folders.root / "eval.txt")


def entries_of(folder: Path) -> set[str]:
    """Folders too, for an empty one is a trace."""
    return {str(path.relative_to(folder)) for path in folder.rglob("*")}


def assert_refused(
    folders: Folders, tmp_path: Path, *words: str, flags: tuple = (), output="new/out", **options
) -> None:
    """`uptrain` refuses with these words, and leaves the disk as it was."""
    before = [(files_of(root), entries_of(root)) for root in (tmp_path, folders.root)]
    result = run_uptrain(folders, tmp_path / output, *flags, **options)
    assert_one_message(result, 2, *words)
    assert [(files_of(root), entries_of(root)) for root in (tmp_path, folders.root)] == before


WIDTH_64 = "sequence_length = 65: the student has positions for 64 tokens. Use 64 or fewer."


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (
            {"train-file": None},
            "text: got none. Give exactly one of --train-file, --dataset-name, --sample-from-teacher.",
        ),
        ({"dataset-name": "d"}, "text: got --train-file, --dataset-name. Give exactly one of"),
        ({"budget-tokens": 0}, "budget_tokens = 0 is no budget. Use a positive whole number of tokens."),
        ({"budget-tokens": -5}, "budget_tokens = -5 is no budget. Use a positive whole number of tokens."),
        ({"budget-tokens": None}, "budget: "),
        ({"budget-fraction": 0.05}, "budget: "),
        ({"budget-tokens": None, "budget-fraction": 0.05}, "budget_fraction = 0.05: of how many tokens?"),
        ({"budget-tokens": 31}, "budget_tokens = 31"),
        ({"budget-tokens": 1, "sequence-length": None}, "budget_tokens = 1"),
        ({"sequence-length": 65}, WIDTH_64),
        ({"sequence-length": 1}, "sequence_length = 1: a row needs at least 2 tokens. Use 2 or more."),
        ({"teacher": None, "objective": "kl"}, "phase 1: its objective compares with a teacher, and there is none."),
        ({"teacher": None, "objective": "echo"}, "phase 1: its objective compares with a teacher, and there is none."),
        ({"objective": "kll"}, f"'kll' is unknown. Did you mean 'kl'? Known: {', '.join(OBJECTIVES.names())}."),
        ({"train": "keys"}, "train = 'keys' is unknown. Use one of all, attention, key_value."),
        ({"dtype": "float16"}, "dtype = 'float16' is unknown. Use float32 or bfloat16."),
        ({"export": "worst"}, "export = 'worst' is unknown. Use last or best."),
        ({"lora-rank": 0}, "lora_rank = 0 is not a positive whole number. Use 1 or more."),
        ({"learning-rate": 1e9}, "learning_rate = 1000000000.0: use a number between 0 and 1, such as 1e-4."),
        ({"seed": -1}, "seed = -1"),
        ({"seed": 2**32}, "seed = 4294967296"),
        ({"teacher": ""}, "teacher = '' names nothing."),
        ({"teacher": "/nowhere/donor"}, "/nowhere/donor: no such folder."),
        ({"teacher-logits": "/nowhere/logits", "objective": "kl"}, "/nowhere/logits: holds no teacher_logits.json."),
        ({"train-file": "/nowhere.txt"}, "/nowhere.txt: is no file and no folder. Check train_file."),
        ({"eval-file": "/nowhere.txt"}, "/nowhere.txt: is no file and no folder. Check eval_file."),
        ({"text-column": "body"}, "has no column 'body' (columns: text)."),
        ({"config": "/nowhere.yaml"}, "/nowhere.yaml: not a readable YAML file"),
        (
            {"train-file": None, "dataset-name": "nobody/nothing"},
            "nobody/nothing: is no folder here and not in the cache of datasets, and the Hub is offline",
        ),
    ],
)
def test_options_are_refused(tmp_path, folders, options, words, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    assert_refused(folders, tmp_path, words, **options)


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("empty.txt", b"", "empty.txt: is empty. Leave it out."),
        ("blank.txt", b" \n \n", "blank.txt: holds no text"),
        (
            "latin.txt",
            b"caf\xe9 au lait",
            "latin.txt: is not UTF-8 (byte 0xe9 at offset 3). Convert it, if it is LATIN1:",
        ),
        ("short.txt", b"the cat", "text: has 9 tokens, one row needs sequence_length = 32."),
        ("row.txt", b"abcdefghij" * 4, "text: fills 1 row of sequence_length, so none is left to evaluate on."),
        ("rows.jsonl", b'{"body": "the cat"}\n', "rows.jsonl: has no column 'text' or 'messages' (columns: body)."),
        ("numbers.jsonl", b'{"text": 5}\n', "numbers.jsonl: column 'text': holds int where text or a list of messages"),
        ("chat.jsonl", b'{"messages": [{"role": "user", "content": "a"}]}\n', "the tokenizer has no chat template"),
        ("broken.jsonl", b'{"text": \n', "broken.jsonl: cannot be read ("),
        ("table.csv", b"text\nthe cat\n", "table.csv: has the suffix '.csv', known are .txt, .jsonl, .json, .parquet."),
    ],
)
def test_text_is_refused(tmp_path, folders, name, content, words):
    (tmp_path / name).write_bytes(content)
    assert_refused(folders, tmp_path, words, train_file=tmp_path / name)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"- teacher\n", "holds list, expected keys such as teacher, teacher_dtype, teacher_device_map."),
        (b"", "holds NoneType, expected keys"),
        (b"just words", "holds str, expected keys"),
        (
            b"a: !!python/object/apply:os.mkdir ['{tmp}/made']\n",
            "not a readable YAML file (could not determine a constr",
        ),
        (
            b"!!python/object/new:os.mkdir ['{tmp}/made']\n",
            "not a readable YAML file (could not determine a constructor",
        ),
        (b"train_file: caf\xe9\n", "not a readable YAML file ('utf-8' codec can't decode byte 0xe9"),
        (b"teacher: [\n", "not a readable YAML file (while parsing a flow node"),
        (b"when: 2020-13-45\n", "not a readable YAML file (month must be in 1..12). Correct it."),
        (b"[" * 20_000, "not a readable YAML file ("),
        (b"budget: 5\n", "unknown key 'budget'. Known: teacher, teacher_dtype, "),
        (b"learning_rate: fast\n", "learning_rate = 'fast' is not a number."),
        (b"streaming: 'no'\n", "streaming = 'no' is not true or false."),
        (b"phases: [kl]\n", "phase: got 'kl', expected an object with keys of share, objective, train,"),
        (
            b"phases: [{objective: kl}]\n",
            "phase: objective = 'kl' is not weights, such as {'kl': 1.0}. Write them out.",
        ),
    ],
)
def test_recipe_file_is_refused(tmp_path, folders, content, words):
    (tmp_path / "recipe.yaml").write_bytes(content.replace(b"{tmp}", bytes(tmp_path)))
    options = {"learning_rate": None} if b"learning_rate" in content else {}
    assert_refused(folders, tmp_path, words, config=tmp_path / "recipe.yaml", **options)
    assert not (tmp_path / "made").exists()


def of_teacher(folders: Folders, teacher: Path) -> Folders:
    return Folders(teacher, folders.student, folders.text)


def test_teacher_that_speaks_otherwise_is_refused(tmp_path, folders):
    larger, other, silent = (tmp_path / name for name in ("larger", "other", "silent"))
    tiny_donor("llama", vocab_size=101).save_pretrained(larger)
    letters().save_pretrained(larger)
    shutil.copytree(folders.donor, other)
    letters(same=True, eos=False).save_pretrained(other)
    tokenizer = json.loads((other / "tokenizer.json").read_text())
    tokenizer["model"]["vocab"] |= {"a": 5, "b": 4}
    (other / "tokenizer.json").write_text(json.dumps(tokenizer))
    shutil.copytree(folders.donor, silent, ignore=shutil.ignore_patterns("tokenizer*"))
    for teacher, words in (
        (
            larger,
            "teacher larger: its vocabulary has 101 tokens, the student's 99; their predictions cannot be compared.",
        ),
        (
            other,
            "teacher other: its tokenizer is not the student's (they differ on 'a'), so it would be asked about other",
        ),
        (silent, "silent: no tokenizer that loads ("),
    ):
        assert_refused(of_teacher(folders, teacher), tmp_path, words)


def test_teacher_of_another_architecture_is_taken_where_only_its_logits_count(tmp_path, folders):
    gpt2 = tmp_path / "gpt2"
    tiny_donor("gpt2").save_pretrained(gpt2)
    letters().save_pretrained(gpt2)
    report = uptrained(of_teacher(folders, gpt2), tmp_path / "out", objective="kl", train="all")
    assert report["after"]["eval_kl_nats_per_token"] < report["before"]["eval_kl_nats_per_token"]


def test_student_is_refused(tmp_path, folders):
    silent, base, torn, empty = (tmp_path / name for name in ("silent", "base", "torn", "empty"))
    shutil.copytree(folders.student, silent, ignore=shutil.ignore_patterns("tokenizer*"))
    AutoModel.from_pretrained(folders.donor).save_pretrained(tmp_path / "base-donor")
    convert_checkpoint(tmp_path / "base-donor", base, num_key_value_heads=2)
    letters().save_pretrained(base)
    shutil.copytree(folders.student, torn)
    os.truncate(torn / "model.safetensors", 5000)
    empty.mkdir()
    for student, words in (
        (silent, "silent: no tokenizer that loads ("),
        (
            base,
            "base: is a LlamaModel, which predicts no tokens. Convert a donor with a causal language modelling",
        ),
        (torn, "model.safetensors"),
        (empty, "empty: the folder is empty."),
        (folders.text, "text.txt: is a file. Give the folder that holds config.json and the weights."),
        (tmp_path / "missing", "missing: no such folder."),
    ):
        assert_refused(Folders(folders.donor, student, folders.text), tmp_path, words, "hf-gqa: ")


@pytest.mark.parametrize("flags", [[], ["--overwrite"], ["--overwrite", "--dry-run"]])
@pytest.mark.parametrize("place", ["student", "student/sub", "donor", "donor/sub", "."])
def test_output_that_touches_what_is_only_read_is_refused(tmp_path, place, flags):
    folders = write_folders(tmp_path)
    whose = "donor" if place.startswith("donor") else "student"
    words = ["overlaps the ", f"folder {tmp_path / whose}. Write the student somewhere else."]
    assert_refused(folders, tmp_path, *words, output=place, flags=flags)
    if whose == "donor":
        result = run_cli("teacher-logits", *arguments_of(folders, tmp_path / place)[1:], "--top-k", 4)
        assert_one_message(result, 2, str(tmp_path / place))
        assert entries_of(folders.donor) == {path.name for path in folders.donor.iterdir()}


def test_output_that_is_no_model_is_refused(tmp_path, folders):
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis/chapter.txt").write_text("years of work")
    (tmp_path / "file").write_text("x")
    assert_refused(folders, tmp_path, "thesis: exists. Give another output, or --overwrite", output="thesis")
    words = "thesis: holds no config.json, so it is no model that --overwrite could replace. Remove it first."
    assert_refused(folders, tmp_path, words, output="thesis", flags=["--overwrite"])
    assert_refused(folders, tmp_path, "file: exists and is not a folder. Give another output.", output="file")


def test_folder_of_the_users_beside_the_output_is_left_alone(tmp_path, folders):
    (tmp_path / "out.unfinished").mkdir()
    (tmp_path / "out.unfinished/notes.txt").write_text("years of work")
    run_uptrain(folders, tmp_path / "out")  # may refuse, or write beside it
    assert (tmp_path / "out.unfinished/notes.txt").read_text() == "years of work"


def test_refusal_as_json(tmp_path, folders):
    result = run_uptrain(folders, tmp_path / "out", "--json", budget_tokens=0)
    assert_one_message(result, 2)
    assert json.loads(result.stdout) == {"error": result.stderr.removeprefix("hf-gqa: ").removesuffix("\n")}


def test_teacher_logits_are_refused(tmp_path, folders):
    logits, asked = tmp_path / "logits", arguments_of(folders, tmp_path / "logits", objective="kl")[1:]
    needs = "teacher-logits: needs a recipe with a teacher, and text that is not streamed."
    for words, arguments in (
        ("top_k = 0 is not in 1 to 99, the vocabulary.", [*asked, "--top-k", 0]),
        ("top_k = 100 is not in 1 to 99, the vocabulary.", [*asked, "--top-k", 100]),
        (needs, [*asked, "--streaming"]),
        (needs, arguments_of(folders, logits, teacher=None)[1:]),
    ):
        assert_one_message(run_cli("teacher-logits", *arguments), 2, words)
        assert not list(tmp_path.iterdir())
    assert run_cli("teacher-logits", *asked, "--top-k", 8).exit_code == 0
    for words, options in (
        ("logits: was written with num_rows = ", {"sequence_length": 16}),
        ("logits: was written with num_rows = ", {"train_file": folders.root / "eval.txt"}),
        ("phase 1: stored teacher logits hold no layer outputs. Use an objective of kl", {"objective": "distill"}),
        ("phase 1: stored teacher logits hold no layer outputs. Use an objective of kl", {"objective": "echo"}),
        (
            "--teacher-logits: are stored row by row for a corpus on disk. Leave --streaming out.",
            {"flags": ["--streaming"]},
        ),
    ):
        assert_refused(folders, tmp_path, words, **{"teacher_logits": logits, "objective": "kl"} | options)
    assert_one_message(run_cli("teacher-logits", *asked, "--top-k", 9), 2, "was begun with top_k = 8, now 9.")


def test_run_that_diverges_says_when_and_keeps_its_checkpoints(tmp_path, folders):
    phases = [{"objective": {"kl": 1.0}, "warmup": 0.0}] * 2 + [{"objective": {"kl": 1.0}, "learning_rate": 1e38}]
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump({"phases": phases, "bf16": True}))
    work = tmp_path / "out.unfinished"
    result = run_uptrain(folders, tmp_path / "out", config=tmp_path / "recipe.yaml")
    assert_one_message(
        result, 2, "step 8 (batch 8 of this pass over the data, ", "the gradient is not finite.", str(work)
    )
    assert not (tmp_path / "out").exists() and "checkpoint-3" in entries_of(work)
    asked = {"config": tmp_path / "recipe.yaml"}
    assert_one_message(run_uptrain(folders, tmp_path / "out", "--resume", **asked), 2, "the gradient is not finite.")
    (tmp_path / "recipe.yaml").write_text("objective: kl\n")
    uptrained(folders, tmp_path / "out", "--overwrite", **asked)


def test_overwrite_replaces(tmp_path, folders, plain):
    output = tmp_path / "out"
    shutil.copytree(plain[0], output)
    (output / "notes.txt").write_text("old")
    before = files_of(output)
    result = run_uptrain(folders, output, teacher=None)
    assert_one_message(result, 2, f"{output}: exists. Give another output, or --overwrite to replace it.")
    assert files_of(output) == before and list(tmp_path.iterdir()) == [output]
    uptrained(folders, output, "--overwrite", teacher=None)
    assert not (output / "notes.txt").exists()


def without_times(report: dict) -> dict:
    """What two runs of the same recipe have in common."""
    times = ("output", "seconds", "tokens_per_second", "log")
    log = [{key: entry[key] for key in ("eval_loss", "loss", "tokens_seen") if key in entry} for entry in report["log"]]
    return {key: value for key, value in report.items() if key not in times} | {"losses": list(filter(None, log))}


def test_unfinished_run_is_discarded_when_asked(tmp_path, folders, plain, monkeypatch):
    options = {"eval_file": folders.root / "eval.txt"}
    interrupted(folders, tmp_path / "out", monkeypatch, learning_rate=1e-3, **options)
    uptrained(folders, tmp_path / "out", "--overwrite", **options)
    assert (tmp_path / "out/model.safetensors").read_bytes() == (plain[0] / "model.safetensors").read_bytes()


def test_resuming_with_something_else_is_refused(tmp_path, folders, monkeypatch):
    output, others = tmp_path / "runs/out", write_folders(tmp_path / "others")
    output.parent.mkdir()
    eval_file = folders.root / "eval.txt"
    interrupted(folders, output, monkeypatch, eval_file=eval_file)
    before = files_of(output.parent)
    others.text.write_text(some_text(1200, seed=2))
    tensors = tensors_of(others.student)
    tensors["model.norm.weight"] += 1
    save_file(tensors, others.student / "model.safetensors", {"format": "pt"})
    convert_checkpoint(others.donor, tmp_path / "one", num_key_value_heads=1)
    for options, words in (
        ({"learning_rate": 4e-3}, ["recipe.learning_rate was 0.005 when it was saved and is 0.004 now"]),
        ({"seed": 1}, ["recipe.seed was absent when it was saved and is 1 now"]),
        ({"budget_tokens": 1100}, ["recipe.budget_tokens was 1000 when it was saved and is 1100 now"]),
        ({"objective": "kl"}, ["recipe.objective was absent", "recipe.phases was [", "attention_output"]),
        ({"train_file": others.text}, ["text was "]),
        ({"eval_file": others.text}, ["text was "]),
        ({"teacher": None}, ["teacher"]),
        ({"student": others.student}, ["student.model.safetensors was "]),
        ({"student": tmp_path / "one"}, ["plan.num_key_value_heads was 2 when it was saved and is 1 now"]),
    ):
        given = Folders(folders.donor, options.pop("student", folders.student), folders.text)
        result = run_uptrain(given, output, "--resume", **{"eval_file": eval_file} | options)
        assert_one_message(result, 2, f"{output}.unfinished/checkpoint-3: resuming with another plan or data: ", *words)
        assert files_of(output.parent) == before
    uptrained(folders, output, "--resume", eval_file=eval_file, logging_steps=2)


def test_interrupted_run_is_neither_lost_nor_overwritten_unasked(tmp_path, folders, plain, monkeypatch):
    output, options = tmp_path / "out", {"eval_file": folders.root / "eval.txt"}
    work = tmp_path / "out.unfinished"
    missing = run_uptrain(folders, output, "--resume", **options)
    assert_one_message(missing, 2, f"{work}: holds no checkpoint to resume. Run without --resume.")
    assert list(tmp_path.iterdir()) == []
    interrupted(folders, output, monkeypatch, **options)
    before = files_of(tmp_path)
    unasked = run_uptrain(folders, output, **options)
    assert_one_message(unasked, 2, f"{work}: is an unfinished run. Use --resume to go on with it, or --overwrite to")
    refused = run_uptrain(folders, output, "--overwrite", train_file=tmp_path / "missing.txt", **options)
    assert_one_message(refused, 2, "missing.txt: is no file and no folder.")
    for flag in ("--overwrite", "--resume"):
        explained = run_uptrain(folders, output, flag, "--dry-run", **options)
        assert explained.exit_code == 0 and explained.stderr == ""
    assert files_of(tmp_path) == before
    report = uptrained(folders, output, "--resume", **options)
    assert (output / "model.safetensors").read_bytes() == (plain[0] / "model.safetensors").read_bytes()
    assert without_times(report) == without_times(plain[1])
