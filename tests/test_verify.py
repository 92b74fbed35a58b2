"""`verify` passes what was converted, fails what was changed afterwards, and runs no code that it has not compared."""

import json
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from hf_gqa import Refusal, convert_checkpoint, open_donor, verify
from hf_gqa.convert import fresh_process
from hf_gqa.convert.manifest import Manifest

from .command_line import assert_one_message, run_cli
from .donor_folders import edit_json, files_of, write_donor
from .tiny_donors import tiny_donor


KEY = "model.layers.1.self_attn.k_proj.weight"
LOADS, KEYS = "loads without hf_gqa", "no missing or unexpected tensors"
HEADS, FINITE = "KV heads per layer, seen in the cache, equal the plan", "output is finite"
GENERATES, DONOR, ORACLE = "generates", "donor is the one in the manifest", "equals the donor's merged heads"
DECODES_GROUPED, *DECODES = (
    f"decoding from the cache equals one forward, attention {name}" for name in ("grouped_sdpa", "sdpa", "eager")
)
CODE = "code is this hf_gqa's, byte for byte"


@pytest.fixture(scope="module")
def originals(tmp_path_factory) -> Path:
    """Donors and students by name; tests copy what they change."""
    folder = tmp_path_factory.mktemp("originals")
    write_donor(folder / "llama")
    write_donor(folder / "gpt2", "gpt2")
    convert_checkpoint(folder / "llama", folder / "native", num_key_value_heads=2)
    convert_checkpoint(folder / "llama", folder / "bundle", num_key_value_heads=2, method="first", export="bundle")
    convert_checkpoint(folder / "gpt2", folder / "gpt_bigcode", num_key_value_heads=1)
    return folder


@pytest.fixture
def student(originals, tmp_path) -> Path:
    return shutil.copytree(originals / "native", tmp_path / "student")


@pytest.fixture
def bundle(originals, tmp_path) -> Path:
    return shutil.copytree(originals / "bundle", tmp_path / "student")


@pytest.fixture
def in_this_process(monkeypatch):
    """Load the student here instead of in a process of its own, which takes seconds; other tests do that."""

    def run(command, **kwargs):
        try:
            found = fresh_process.main(**json.loads(command[-1]))
        except Exception as error:
            return subprocess.CompletedProcess(command, 1, "", f"Traceback:\n{type(error).__name__}: {error}")
        return subprocess.CompletedProcess(command, 0, json.dumps(found), "")

    monkeypatch.setattr(subprocess, "run", run)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # faster for a model this small
    yield
    torch.set_num_threads(threads)


def check(folder: Path, *options) -> tuple[int, dict[str, bool | None], str]:
    """The exit code, each check's outcome, and all their details."""
    before = files_of(folder)
    result = run_cli("verify", folder, *options, "--json")
    assert isinstance(result.exception, SystemExit | None), repr(result.exception)
    assert files_of(folder) == before
    found = json.loads(result.stdout)
    outcomes = {check["name"]: check["passed"] for check in found["checks"]}
    assert found["passed"] == (result.exit_code == 0) == (False not in outcomes.values())
    return result.exit_code, outcomes, "; ".join(check["detail"] for check in found["checks"])


def failed(outcomes: dict[str, bool | None]) -> set[str]:
    return {name for name, passed in outcomes.items() if passed is False}


def edit_tensors(folder: Path, change) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize(
    ("name", "donor", "checks"),
    [
        ("native", "llama", {LOADS, KEYS, HEADS, FINITE, GENERATES, DONOR, ORACLE, *DECODES}),
        ("bundle", "llama", {CODE, LOADS, KEYS, HEADS, FINITE, GENERATES, DONOR, ORACLE, DECODES_GROUPED, *DECODES}),
        ("gpt_bigcode", "gpt2", {LOADS, KEYS, HEADS, FINITE, GENERATES, DONOR, ORACLE, *DECODES}),
    ],
)
def test_student_passes_in_a_process_of_its_own(originals, name, donor, checks):
    code, outcomes, details = check(originals / name, "--donor", originals / donor)
    assert code == 0 and outcomes == dict.fromkeys(checks, True), details


@pytest.mark.usefixtures("in_this_process")
def test_words_and_exit_code(student):
    result = run_cli("verify", student)
    assert result.exit_code == 0
    assert f"ok     {LOADS}: LlamaForCausalLM, expected LlamaForCausalLM\n" in result.stdout
    assert f"not run {ORACLE}: no donor was given\n" in result.stdout
    edit_json(student / "conversion_manifest.json", layer_plan=[{"num_key_value_heads": 1}] * 2)
    result = run_cli("verify", student)
    assert result.exit_code == 1 and f"FAILED {HEADS}: [2, 2], planned [1, 1]" in result.stdout


@pytest.mark.usefixtures("in_this_process")
@pytest.mark.parametrize("name", ["native", "bundle"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_altered_key_fails(originals, tmp_path, name, dtype):
    folder = shutil.copytree(originals / name, tmp_path / "student")
    options = ("--donor", originals / "llama", "--dtype", dtype)
    assert check(folder, *options)[0] == 0
    edit_tensors(folder, lambda tensors: tensors.update({KEY: tensors[KEY].flip(0)}))
    code, outcomes, details = check(folder, *options)
    assert code == 1 and failed(outcomes) == {ORACLE}
    assert "largest difference" in details and f"({dtype})" in details


@pytest.mark.usefixtures("in_this_process")
def test_one_altered_value_fails_in_float32(originals, student):
    def change(tensors):
        tensors[KEY][0, 0] += 0.01

    edit_tensors(student, change)
    code, outcomes, _ = check(student, "--donor", originals / "llama")
    assert code == 1 and failed(outcomes) == {ORACLE}


@pytest.mark.usefixtures("in_this_process")
@pytest.mark.parametrize("name", ["native", "bundle"])
def test_altered_number_of_heads_in_config_fails(originals, tmp_path, name):
    folder = shutil.copytree(originals / name, tmp_path / "student")
    edit_json(folder / "config.json", num_key_value_heads=1)
    code, outcomes, details = check(folder)
    assert code == 1 and LOADS in failed(outcomes) and details


@pytest.mark.usefixtures("in_this_process")
def test_altered_rows_in_manifest_fail(student):
    edit_json(student / "conversion_manifest.json", layer_plan=[{"num_key_value_heads": 2}, {"num_key_value_heads": 1}])
    code, outcomes, details = check(student)
    assert code == 1 and failed(outcomes) == {HEADS} and "[2, 2], planned [2, 1]" in details


@pytest.mark.usefixtures("in_this_process")
def test_missing_and_unexpected_tensors_fail(student):
    edit_tensors(student, lambda tensors: tensors.update(surplus=tensors.pop(KEY)))
    code, outcomes, details = check(student)
    assert code == 1 and KEYS in failed(outcomes)
    assert f"missing_keys: {KEY}" in details and "unexpected_keys: surplus" in details


@pytest.mark.usefixtures("in_this_process")
def test_output_that_is_not_finite_fails(student):
    edit_tensors(student, lambda tensors: tensors["model.norm.weight"].fill_(float("nan")))
    code, outcomes, _ = check(student)
    assert code == 1 and FINITE in failed(outcomes)


@pytest.mark.usefixtures("in_this_process")
@pytest.mark.parametrize(
    ("model_type", "changes"),
    [
        ("llama", {"seed": 1}),
        ("llama", {"vocab_size": 77}),
        ("llama", {"num_hidden_layers": 3}),
        ("llama", {"num_hidden_layers": 1}),
        ("llama", {"num_key_value_heads": 2}),
        ("mistral", {"seed": 1}),
        ("gpt2", {}),
    ],
    ids=str,
)
def test_another_donor_fails(tmp_path, student, model_type, changes):
    other = write_donor(tmp_path / "other", model_type, **changes)
    code, outcomes, details = check(student, "--donor", other)
    assert code == 1 and DONOR in failed(outcomes) and "another SHA-256" in details


LAYERS = {"layer_plan": ({"num_key_value_heads": 2}, {"num_key_value_heads": 1})}
ROWS = torch.arange(3, 99).reshape(4, 24)


@pytest.mark.usefixtures("in_this_process")
@pytest.mark.parametrize("heads", [{"num_key_value_heads": 2}, LAYERS], ids=["uniform", "per_layer"])
@pytest.mark.parametrize(
    ("method", "text"), [("random_init", None), ("group,low_rank", None), ("group,fold,refit", ROWS)]
)
@pytest.mark.parametrize("model_type", ["llama", "gpt2"])
@pytest.mark.filterwarnings("ignore:calibration. 96 tokens")
def test_methods_other_than_means_have_an_oracle_too(originals, tmp_path, model_type, method, text, heads):
    """Merged again where no text was looked at: then a changed head is found out; other tensors always are."""
    donor, folder = originals / model_type, tmp_path / "student"
    convert_checkpoint(donor, folder, method=method, calibration=text, **heads)
    code, outcomes, details = check(folder, "--donor", donor)
    assert code == 0 and outcomes[ORACLE] is True, details
    assert ("heads merged again" if text is None else "the student's own heads") in details
    tensors = load_file(folder / "model.safetensors")
    key = next(name for name in tensors if "k_proj.weight" in name)
    save_file(tensors | {key: tensors[key] * 1.5}, folder / "model.safetensors", metadata={"format": "pt"})
    _, outcomes, _ = check(folder, "--donor", donor)
    assert outcomes[ORACLE] is (text is not None)
    mlp = next(name for name in tensors if "mlp" in name)
    save_file(tensors | {mlp: tensors[mlp] * 1.5}, folder / "model.safetensors", metadata={"format": "pt"})
    _, outcomes, _ = check(folder, "--donor", donor)
    assert outcomes[ORACLE] is False


@pytest.mark.usefixtures("in_this_process")
@pytest.mark.filterwarnings("ignore:calibration. 96 tokens")
def test_native_relative_has_an_oracle(originals, tmp_path):
    folder = tmp_path / "student"
    convert_checkpoint(originals / "gpt2", folder, num_key_value_heads=1, method="fold", calibration=ROWS)
    code, outcomes, _ = check(folder, "--donor", originals / "gpt2")
    assert code == 0 and outcomes[ORACLE] is True and outcomes[DONOR] is True


@pytest.mark.usefixtures("in_this_process")
@pytest.mark.parametrize(("model_type", "heads"), [("llama", 2), ("gpt2", 1), ("gpt2", 2)])
def test_base_model_without_a_head_passes(tmp_path, model_type, heads):
    tiny_donor(model_type).base_model.save_pretrained(tmp_path / "donor")
    convert_checkpoint(tmp_path / "donor", tmp_path / "student", num_key_value_heads=heads)
    code, outcomes, details = check(tmp_path / "student", "--donor", tmp_path / "donor")
    assert code == 0 and outcomes[ORACLE] is True and GENERATES not in outcomes, details


def change_code(bundle: Path, marker: Path) -> None:
    """A harmless line in the middle of the shipped code that tells whether it was executed."""
    file = bundle / "planned_attention.py"
    file.write_text(file.read_text().replace("\nclass ", f"\nopen({str(marker)!r}, 'a')\n\n\nclass ", 1))


def test_changed_code_fails_and_is_not_executed(originals, tmp_path, bundle):
    change_code(bundle, tmp_path / "marker")
    code, outcomes, details = check(bundle, "--donor", originals / "llama")
    assert code == 1 and outcomes == {CODE: False} and not (tmp_path / "marker").exists()
    assert "differs: planned_attention.py. Not run; read it, then use --trust-remote-code" in details


def test_changed_code_is_executed_when_trusted(originals, tmp_path, bundle):
    change_code(bundle, tmp_path / "marker")
    code, outcomes, details = check(bundle, "--donor", originals / "llama", "--trust-remote-code")
    assert code == 0 and outcomes[CODE] is True and outcomes[ORACLE] is True and (tmp_path / "marker").exists()
    assert "differs: planned_attention.py; run all the same, as asked" in details


@pytest.mark.parametrize("change", ["one byte", "missing file", "further file"])
def test_any_difference_of_the_code_fails(bundle, change):
    file = bundle / "layer_plan.py"
    if change == "one byte":
        file.write_bytes(file.read_bytes() + b"\n")
    elif change == "missing file":
        file.unlink()
    else:
        file = bundle / "more.py"
        file.write_text("")
    code, outcomes, details = check(bundle)
    assert code == 1 and outcomes == {CODE: False} and f"differs: {file.name}" in details


@pytest.mark.parametrize(
    "reference", ["sub/evil.GQALlamaForCausalLM", "someone/else--modeling_gqa_llama.GQALlamaForCausalLM"]
)
@pytest.mark.parametrize("auto_class", ["AutoConfig", "AutoModelForCausalLM"])
def test_auto_map_that_points_past_the_compared_files_fails_and_is_not_followed(
    tmp_path, bundle, auto_class, reference
):
    (bundle / "sub").mkdir()
    (bundle / "sub/evil.py").write_text(f"open({str(tmp_path / 'marker')!r}, 'w')\n")
    raw = json.loads((bundle / "config.json").read_text())
    edit_json(bundle / "config.json", auto_map=raw["auto_map"] | {auto_class: reference})
    code, outcomes, _ = check(bundle)
    assert not (tmp_path / "marker").exists()
    assert code == 1 and outcomes == {CODE: False}


def test_code_that_needs_hf_gqa_fails(tmp_path, bundle):
    file = bundle / "layer_plan.py"
    file.write_text(f"import hf_gqa\n{file.read_text()}")
    code, outcomes, details = check(bundle, "--trust-remote-code")
    assert code == 1 and outcomes[LOADS] is False and "hf_gqa" in details


@pytest.mark.parametrize("text", [None, "{", "[]", "{}"])
def test_bundle_with_a_broken_configuration_fails_or_is_refused(bundle, text):
    (bundle / "config.json").unlink()
    if text is not None:
        (bundle / "config.json").write_text(text)
    result = run_cli("verify", bundle)
    assert isinstance(result.exception, SystemExit) and result.exit_code in (1, 2), repr(result.exception)
    assert "config.json" in result.stdout + result.stderr or "differs" in result.stdout


@pytest.mark.parametrize("auto_map", ["sub/evil.Model", ["evil.Model"], {"AutoTokenizer": ["evil.Tokenizer", None]}])
def test_auto_map_that_is_no_table_of_our_classes_fails(bundle, auto_map):
    edit_json(bundle / "config.json", auto_map=auto_map)
    code, outcomes, details = check(bundle)
    assert code == 1 and outcomes == {CODE: False} and "auto_map" in details


def test_folder_without_manifest_is_refused(originals, tmp_path):
    message = "conversion_manifest.json: missing, so the folder does not say how it was made. Convert the donor again."
    assert_one_message(run_cli("verify", originals / "llama"), 2, message)
    assert_one_message(run_cli("verify", tmp_path / "nothing"), 2, "nothing: no such folder")
    with pytest.raises(Refusal, match=r"dtype = 'int8' is unknown\. Use one of float32, bfloat16, float16"):
        verify(originals / "native", dtype="int8")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("{", "not readable JSON ("),
        ("[]", "not a manifest ("),
        ("{}", "Expected the keys format, plan, layer_plan"),
        ('{"hello": 1}', "not a manifest ("),
    ],
)
def test_manifest_that_is_none_is_refused(student, text, words):
    (student / "conversion_manifest.json").write_text(text)
    assert_one_message(run_cli("verify", student), 2, "conversion_manifest.json: ", words)


@pytest.mark.usefixtures("in_this_process")
@pytest.mark.parametrize(
    "changes",
    [
        {"layer_plan": None},
        {"layer_plan": [{}]},
        {"layer_plan": [2, 2]},
        {"donor": {}},
        {"plan": []},
        {"plan": {"num_key_value_heads": 2, "heads": 2}},
        {"model_class": 5},
        {"export": "other"},
    ],
    ids=str,
)
def test_manifest_of_other_values_is_refused(originals, student, changes):
    edit_json(student / "conversion_manifest.json", **changes)
    result = run_cli("verify", student, "--donor", originals / "llama")
    assert_one_message(result, 2)


def test_manifest_of_another_format_is_refused(student):
    edit_json(student / "conversion_manifest.json", format=99)
    words = ["format = 99, this hf_gqa reads 1", "Install the hf_gqa of its maker"]
    assert_one_message(run_cli("verify", student), 2, *words)


def test_manifest_survives_json(originals, tmp_path):
    donor = open_donor(originals / "llama")
    written = convert_checkpoint(donor, tmp_path / "student", num_key_value_heads=2, seed=5)
    assert Manifest.read(tmp_path / "student") == written
    text = (tmp_path / "student/conversion_manifest.json").read_text()
    written.write(tmp_path)
    assert (tmp_path / "conversion_manifest.json").read_text() == text
    assert written.layer_plan == [{"num_key_value_heads": 2}] * 2 and written.donor["name"] == "llama"
    assert written.versions["torch"] == torch.__version__
