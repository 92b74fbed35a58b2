"""The commands: what they print, in words and as JSON, and that the numbers are those of the real student."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM
from typer.main import get_command

import hf_gqa
from hf_gqa.cli import app
from hf_gqa.cli.printing import cache_in_words, heads_and_layers_in_words
from hf_gqa.convert.cache_bytes import cache_bytes_per_token_measured
from hf_gqa.human_units import human_bytes, human_count

from .command_line import assert_one_message, run_cli
from .covering import each_value
from .donor_folders import files_of, write_donor
from .tiny_donors import MODEL_TYPES, NUM_LAYERS, of_each_storage, tiny_donor


@pytest.fixture
def donor(tmp_path) -> Path:
    return write_donor(tmp_path / "donor")


def json_of(*arguments) -> dict:
    """What a command prints with --json; nothing else may be on stdout or stderr."""
    result = run_cli(*arguments, "--json")
    assert result.exit_code == 0 and result.stderr == "", result.stderr
    return json.loads(result.stdout)


def test_inspect_in_words(donor):
    result = run_cli("inspect", donor)
    assert result.exit_code == 0 and result.stderr == ""
    for words in (
        "donor: LlamaForCausalLM (llama), position: RoPE\n",
        "query heads    4 x 8\n",
        "KV heads       4 in each of 2 layers\n",
        "cache/token    512 B\n",
        "float32)\n",
    ):
        assert words in result.stdout
    rows = [line for line in result.stdout.splitlines() if "│" in line and "native" in line]
    for row, words in zip(
        rows, (["4", "keep", "512 B"], ["2", "reduce", "256 B"], ["1", "reduce", "128 B"]), strict=True
    ):
        assert [cell.strip() for cell in row.strip("│").split("│")][:3] == words
        assert "llama has a number of KV heads of its own" in row


def test_inspect_as_json(tmp_path):
    found = json_of("inspect", write_donor(tmp_path / "donor", "gpt2"))
    assert (found["donor"], found["model_class"], found["position"]) == ("donor", "GPT2LMHeadModel", "learned")
    assert found["num_key_value_heads"] == [4] * NUM_LAYERS and found["num_attention_heads"] == 4
    targets = {target["num_key_value_heads"]: target for target in found["targets"]}
    assert {heads: t["model_class"] for heads, t in targets.items()} == {
        4: "GPT2LMHeadModel",
        2: "GQAGPT2ForCausalLM",
        1: "GPTBigCodeForCausalLM",
    }
    assert {heads: (t["kind"], t["export"]) for heads, t in targets.items()} == {
        4: ("keep", "native"),
        2: ("reduce", "bundle"),
        1: ("reduce", "native"),
    }
    assert {heads: t["cache_fraction"] for heads, t in targets.items()} == {4: 1.0, 2: 0.5, 1: 0.25}
    assert "as many KV heads as query heads" in targets[2]["reason"]
    assert {heads: t["tensor_parallel_sizes"] for heads, t in targets.items()} == {4: [1, 2, 4], 2: [1, 2], 1: [1]}


def test_inspect_offers_expansion_of_a_grouped_donor(tmp_path):
    targets = json_of("inspect", write_donor(tmp_path / "donor", num_key_value_heads=2))["targets"]
    assert {t["num_key_value_heads"]: t["kind"] for t in targets} == {4: "expand", 2: "keep", 1: "reduce"}


def test_dry_run_explains_and_writes_nothing(tmp_path, donor):
    before = files_of(tmp_path)
    output = tmp_path / "new" / "student"
    arguments = ["convert", donor, output, "--num-key-value-heads", 2, "--dry-run"]
    result = run_cli(*arguments)
    assert result.exit_code == 0 and result.stderr == ""
    rows = {line.split("│")[1].strip(): line for line in result.stdout.splitlines() if "│" in line}
    for name, before_words, after_words in (
        ("KV heads", "4 in each of 2 layers", "2 in each of 2 layers"),
        ("query heads", "4", "4"),
        ("cache per token", "512 B", "256 B"),
        ("parameters", "23.9K", "21.9K"),
        ("weights", "KiB (float32)", "KiB (float32)"),
        ("tensor parallel", "1, 2, 4", "1, 2"),
        ("model type", "llama", "llama"),
    ):
        cells = [cell.strip() for cell in rows[name].split("│")][2:4]
        assert before_words in cells[0] and after_words in cells[1], rows[name]
    assert f"{donor.name} -> {output}" in result.stdout
    assert "method: mean_pool; export: native, llama has a number of KV heads of its own" in result.stdout
    assert "files: model.safetensors, config.json" in result.stdout
    assert "note: The student will be far worse than its donor until it is uptrained" in result.stdout
    assert result.stdout.endswith("Nothing was written (--dry-run).\n")
    found = json_of(*arguments)
    assert found["written"] is False and found["output"] == str(output)
    assert files_of(tmp_path) == before and not output.parent.exists()


def test_dry_run_says_why_a_bundle(tmp_path):
    donor = write_donor(tmp_path / "donor", "gpt2")
    result = run_cli("convert", donor, tmp_path / "student", "--num-key-value-heads", 2, "--dry-run")
    assert "export: bundle, a native gpt2 has as many KV heads as query heads; gpt_bigcode" in result.stdout


def test_convert_in_words_and_as_json(tmp_path, donor):
    result = run_cli("convert", donor, tmp_path / "one", "--num-key-value-heads", 2)
    assert result.exit_code == 0 and result.stderr == ""
    assert result.stdout.endswith(
        f"Wrote {tmp_path / 'one'}. Check it: hf-gqa verify {tmp_path / 'one'} --donor {donor}\n"
    )
    found = json_of("convert", donor, tmp_path / "two", "--num-key-value-heads", 2, "--method", "first", "--seed", 7)
    assert found["written"] is True and found["plan"]["method"] == ["first"] and found["plan"]["seed"] == 7
    assert set(found) == {
        *("donor", "plan", "export", "reason", "model_class", "before", "after", "files", "notes", "output", "written")
    }
    manifest = json.loads((tmp_path / "two/conversion_manifest.json").read_text())
    assert manifest["plan"] == found["plan"]


@pytest.mark.parametrize("flag", ["--num-key-value-heads", "--num_key_value_heads"])
def test_hyphens_and_underscores_are_the_same(tmp_path, donor, flag):
    dry_run = "--dry_run" if "_" in flag else "--dry-run"
    for arguments in ([flag, 2], [f"{flag}=2"]):
        assert json_of("convert", donor, tmp_path / "student", *arguments, dry_run)["written"] is False


@pytest.mark.parametrize("name", sorted(get_command(app).commands))
def test_help_has_an_example_of_the_command(name):
    result = run_cli(name, "--help")
    assert result.exit_code == 0 and f"Example: hf-gqa {name} " in result.stdout
    example = " ".join(result.stdout.split("Example: ", 1)[1].split()).split()
    command = get_command(app).commands[name]
    command.make_context(name, example[2:], resilient_parsing=False).close()  # the example parses


def test_help_lists_commands_and_exit_codes():
    result = run_cli("--help")
    words = " ".join(result.stdout.split())
    assert all(name in words for name in ("inspect", "convert", "verify"))
    assert "0 done, 1 a check failed, 2 the input was refused, 3 reading or writing failed" in words


def test_version():
    result = run_cli("--version")
    assert (result.exit_code, result.stdout) == (0, f"{hf_gqa.__version__}\n")


@pytest.mark.parametrize(
    "arguments", [["convert", "donor"], ["convert", "donor", "student", "--num-key-value-heads", "two"], ["compress"]]
)
def test_usage_errors_end_with_2(arguments):
    result = run_cli(*arguments)
    assert result.exit_code == 2 and "Usage: " in result.stderr and result.stdout == ""


@pytest.mark.parametrize(
    ("command", "code"),
    [
        (["inspect", "{tmp}/missing"], 2),
        (["convert", "{donor}", "{tmp}/student", "--num-key-value-heads", "3"], 2),
        (["convert", "{donor}", "{donor}/model.safetensors/student", "--num-key-value-heads", "2"], 2),
        (["convert", "{donor}", "{tmp}/file/student", "--num-key-value-heads", "2"], 3),
        (["verify", "{tmp}/missing"], 2),
        (["verify", "{donor}"], 2),
    ],
)
def test_errors_are_one_message_and_json_when_asked(tmp_path, donor, command, code):
    (tmp_path / "file").write_text("x")
    arguments = [part.format(tmp=tmp_path, donor=donor) for part in command]
    result = run_cli(*arguments)
    assert_one_message(result, code)
    as_json = run_cli(*arguments, "--json")
    assert_one_message(as_json, code)
    assert as_json.stderr == result.stderr
    assert json.loads(as_json.stdout) == {"error": result.stderr.removeprefix("hf-gqa: ").removesuffix("\n")}


@pytest.mark.slow
def test_command_is_a_process_with_an_exit_code(tmp_path):
    run = subprocess.run(
        [sys.executable, "-c", "from hf_gqa.cli import main; main()", "inspect", str(tmp_path / "missing")],
        env=os.environ | {"PYTHONPATH": str(Path(hf_gqa.__file__).parents[1])},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 2 and run.stdout == ""
    assert run.stderr.startswith("hf-gqa: ") and run.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("size", "words"),
    [
        (0, "0 B"),
        (1023, "1023 B"),
        (1024, "1 KiB"),
        (1536, "1.5 KiB"),
        (10 * 2**20, "10 MiB"),
        (1.25 * 2**30, "1.25 GiB"),
        (3 * 2**40, "3 TiB"),
    ],
)
def test_human_bytes(size, words):
    assert human_bytes(size) == words


@pytest.mark.parametrize(
    ("number", "words"),
    [
        (0, "0"),
        (999, "999"),
        (1000, "1K"),
        (5_049_600, "5.05M"),
        (999_499, "999K"),
        (999_999, "1M"),
        (7_241_732_096, "7.24B"),
        (999_999_999, "1B"),
        (1_500_000_000_000, "1.5T"),
    ],
)
def test_human_count(number, words):
    assert human_count(number) == words


def test_heads_and_cache_in_words():
    assert heads_and_layers_in_words([2, 2, 2]) == "2 in each of 3 layers"
    assert heads_and_layers_in_words([2, 1]) == "2, 1"
    side = {"cache_bytes_per_token": 2048, "cache_bytes_per_token_beyond_window": 2048}
    assert cache_in_words(side) == "2 KiB"
    side["cache_bytes_per_token_beyond_window"] = 0
    assert cache_in_words(side) == "2 KiB (0 B beyond the sliding window)"


def grown_cache_bytes(model, num_tokens: int) -> float:
    """What one more token adds to a cache of `num_tokens`."""
    before, after = (cache_bytes_per_token_measured(model, n) * n for n in (num_tokens, num_tokens + 1))
    return after - before


def assert_side_is_real(side: dict, folder: Path) -> None:
    """One side of an explanation against the tensors on disk and the model that loads them."""
    stored = [tensor for file in folder.glob("*.safetensors") for tensor in load_file(file).values()]
    assert side["parameters"] == sum(tensor.numel() for tensor in stored)
    assert side["weight_bytes"] == sum(tensor.numel() * tensor.element_size() for tensor in stored)
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    assert side["parameters"] == model.num_parameters()
    assert side["model_type"] == model.config.model_type
    assert side["cache_bytes_per_token"] == cache_bytes_per_token_measured(model, num_tokens=4)
    assert side["cache_bytes_per_token"] == grown_cache_bytes(model, 4)
    assert side["cache_bytes_per_token_beyond_window"] == grown_cache_bytes(model, 20)


@pytest.fixture
def one_thread():
    """Products this small are faster on one thread, on a busy processor by far."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.usefixtures("one_thread")
@each_value(model_type=of_each_storage(MODEL_TYPES), num_key_value_heads=[4, 2], dtype=[torch.float32, torch.bfloat16])
def test_explained_numbers_are_the_real_students(tmp_path, model_type, num_key_value_heads, dtype):
    donor = tmp_path / "donor"
    tiny_donor(model_type, num_key_value_heads).to(dtype).save_pretrained(donor)
    inspected = json_of("inspect", donor)
    assert_side_is_real(inspected, donor)
    for target in inspected["targets"]:
        heads, method = target["num_key_value_heads"], "expand" if target["kind"] == "expand" else "mean_pool"
        for export in ("auto", "bundle"):
            student = tmp_path / f"{heads}-{export}"
            options = ["--num-key-value-heads", heads, "--method", method, "--export", export]
            explained = json_of("convert", donor, student, *options)
            assert explained["before"].items() <= inspected.items()
            assert explained["after"]["num_key_value_heads"] == [heads] * NUM_LAYERS
            assert_side_is_real(explained["after"], student)
            if export == "auto":
                assert explained["export"] == target["export"]
                same = ("cache_bytes_per_token", "parameters", "tensor_parallel_sizes")
                assert all(explained["after"][key] == target[key] for key in same)
