"""What cannot be refreshed is refused with one message, and left as it was."""

import json
import os
import shutil
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM

from hf_gqa import Refusal, refresh
from hf_gqa.convert.bundle_code import runtime_files
from hf_gqa.export import refresh as refresh_module
from hf_gqa.export.push import plan_push
from hf_gqa.export.verify import Check
from hf_gqa.runtime import native_call

from .command_line import assert_one_message, run_cli
from .donor_folders import edit_json, files_of
from .sample_report import sample_report


OLD_BUNDLE = Path(__file__).parent / "old_bundles" / "decoder"
CONFIG, MANIFEST = "config.json", "conversion_manifest.json"


@pytest.fixture
def bundle(tmp_path) -> Path:
    return shutil.copytree(OLD_BUNDLE, tmp_path / "bundle")


def assert_left_alone(bundle: Path, *words: str, code: int = 2, options: tuple = ()) -> None:
    """Refused by the run and, but for what only writing finds out, by the dry run; as words and as JSON."""
    before = files_of(bundle.parent)
    for more in ((), ("--json",)):
        result = run_cli("refresh", bundle, *options, *more)
        assert_one_message(result, code, *words)
    assert json.loads(result.stdout) == {"error": result.stderr.removeprefix("hf-gqa: ").removesuffix("\n")}
    if code == 2:
        assert run_cli("refresh", bundle, *options, "--dry-run").exit_code in (2, 0)
    assert files_of(bundle.parent) == before and list(bundle.parent.glob(".*")) == []


def test_folder_that_is_not_there(tmp_path):
    words = "nothing: no such folder. Give the folder of a bundle."
    assert_one_message(run_cli("refresh", tmp_path / "nothing"), 2, words)
    assert_one_message(run_cli("refresh", tmp_path / "no" / "nothing", "--dry-run"), 2, words)
    (tmp_path / "file").write_text("x")
    assert_one_message(run_cli("refresh", tmp_path / "file"), 2, "file: no such folder.")


def test_folder_that_a_killed_run_moved_away(tmp_path, bundle):
    """Which happens only where two folders cannot be exchanged."""
    moved = tmp_path / ".bundle.partial-x" / "replaced"
    moved.parent.mkdir()
    bundle.rename(moved)
    assert_one_message(run_cli("refresh", bundle), 2, f"no such folder, but {moved} is where a killed run left it")
    assert moved.is_dir()


@pytest.mark.parametrize(
    ("config", "manifest", "words"),
    [
        (None, True, "config.json: missing, so the folder is no bundle."),
        ("{", True, "config.json: not readable JSON (Expecting property name"),
        ("[]", True, "config.json: holds list, expected an object."),
        ("{}", False, "no bundle of hf_gqa: it runs as the class that transformers has for None"),
        (
            '{"model_type": "llama"}',
            False,
            "no bundle of hf_gqa: it runs as the class that transformers has for 'llama'",
        ),
        (
            '{"model_type": "llama"}',
            True,
            "is a native student, which runs as the class that transformers has for 'llama'",
        ),
    ],
)
def test_folder_that_is_no_bundle(bundle, config, manifest, words):
    (bundle / CONFIG).unlink()
    if config is not None:
        (bundle / CONFIG).write_text(config)
    if not manifest:
        (bundle / MANIFEST).unlink()
    assert_left_alone(bundle, words)


def test_config_in_another_encoding(bundle):
    (bundle / CONFIG).write_bytes((bundle / CONFIG).read_text().encode("utf-16"))
    assert_left_alone(bundle, "config.json: not readable JSON (")


def test_model_type_that_is_not_known(bundle):
    edit_json(bundle / CONFIG, model_type="gqa_lama")
    words = ["model_type = 'gqa_lama' is none that hf_gqa", "Known: gqa_albert, ", "Install the hf_gqa that wrote it."]
    assert_left_alone(bundle, *words)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("{", "not readable JSON (Expecting property name"),
        ("[]", "holds list, expected an object"),
        ("[" * 100_000, "not readable JSON (it is nested too deep"),
        ('{"versions": {"hf_gqa": "0.1.0"}, "export": "bundle"}', "not a manifest ("),
        ("{}", "neither conversion_manifest.json nor config.json says which hf_gqa wrote it"),
    ],
)
def test_manifest_that_is_broken(bundle, text, words):
    (bundle / MANIFEST).write_text(text)
    assert_left_alone(bundle, MANIFEST, words)


@pytest.mark.parametrize(
    "changes",
    [
        {"versions": []},
        {"versions": {"hf_gqa": "newest"}},
        {"versions": {"hf_gqa": None}},
        {"refreshed": {"from": {}, "to": {}}},
        {"refreshed": [{"from": "0.1.0", "to": {"hf_gqa": "0.1.0"}}]},
        {"refreshed": [{"to": {"hf_gqa": "0.1.0"}}]},
        {"refreshed": ["0.1.0"]},
        {"code_sha256": ["layer_plan.py"]},
        {"code_sha256": {"layer_plan.py": ["0"]}},
        {"export": "native"},
        {"model_class": "GQALlamaForMusic"},
    ],
    ids=str,
)
def test_manifest_of_other_values(bundle, changes):
    edit_json(bundle / MANIFEST, **changes)
    assert_left_alone(bundle)


def test_bundle_that_was_saved_from_memory(bundle, tmp_path):
    """What the message advises makes the code of today of it."""
    (bundle / MANIFEST).unlink()
    words = ["conversion_manifest.json: missing, as in bundles that were saved from memory", "Import hf_gqa, load"]
    assert_left_alone(bundle, *words)
    AutoModelForCausalLM.from_pretrained(bundle).save_pretrained(tmp_path / "saved")
    code = {path.name: path.read_bytes() for path in runtime_files("gqa_llama")}
    assert {path.name: path.read_bytes() for path in (tmp_path / "saved").glob("*.py")} == code


@pytest.mark.parametrize(
    ("file", "changes"),
    [
        (MANIFEST, {"versions": {"hf_gqa": "9.1.0", "transformers": "6.0.0"}, "a_key_of_the_future": 1, "format": 2}),
        (MANIFEST, {"refreshed": [{"from": {"hf_gqa": "0.1.0"}, "to": {"hf_gqa": "9.1.0"}}]}),
        (CONFIG, {"hf_gqa": {"version": "9.1.0"}, "model_type": "gqa_of_the_future"}),
    ],
)
def test_bundle_of_a_newer_hf_gqa(bundle, file, changes):
    edit_json(bundle / file, **changes)
    words = [f"written by hf_gqa 9.1.0, and this is {native_call.VERSION}", "Install hf_gqa >= 9.1.0."]
    assert_left_alone(bundle, *words, options=("--overwrite-modified",))


def change_a_file(bundle: Path) -> None:
    (bundle / "layer_plan.py").write_text((bundle / "layer_plan.py").read_text() + "\nprint('mine')\n")


def add_a_file(bundle: Path) -> None:
    (bundle / "tokenization_own.py").write_text("raise SystemExit('run')")


def add_a_file_below(bundle: Path) -> None:
    (bundle / "kernels").mkdir()
    (bundle / "kernels" / "fast.py").write_text("raise SystemExit('run')")


def add_generation_code(bundle: Path) -> None:
    (bundle / "custom_generate" / "data").mkdir(parents=True)
    (bundle / "custom_generate" / "generate.py").write_text("raise SystemExit('run')")
    (bundle / "custom_generate" / "data" / "words.txt").write_text("x")


def name_foreign_code(bundle: Path) -> None:
    auto_map = json.loads((bundle / CONFIG).read_text())["auto_map"] | {"AutoModelForCausalLM": "own.OwnForCausalLM"}
    edit_json(bundle / CONFIG, auto_map=auto_map)


def name_code_elsewhere(bundle: Path) -> None:
    auto_map = json.loads((bundle / CONFIG).read_text())["auto_map"] | {"AutoTokenizer": ["a/b--tokenizer.T", None]}
    edit_json(bundle / CONFIG, auto_map=auto_map)


MODIFICATIONS = [
    (change_a_file, "layer_plan.py"),
    (add_a_file, "tokenization_own.py"),
    (add_a_file_below, "kernels/fast.py"),
    (add_generation_code, "custom_generate"),
    (name_foreign_code, "auto_map names own.OwnForCausalLM"),
    (name_code_elsewhere, "auto_map names ['a/b--tokenizer.T', None]"),
]


@pytest.mark.usefixtures("warm_verification")
@pytest.mark.parametrize(("modify", "named"), MODIFICATIONS, ids=lambda value: getattr(value, "__name__", ""))
def test_modified_code_is_refused_and_lost_when_asked(bundle, modify, named):
    modify(bundle)
    assert_left_alone(bundle, "has code that no hf_gqa shipped (", named, "which would be lost", "--overwrite-modified")
    result = run_cli("refresh", bundle, "--overwrite-modified")
    assert result.exit_code == 0 and f"lost, for no hf_gqa shipped it: {named}" in result.stdout, result.output
    for file in set(files_of(bundle.parent)) - {f"bundle/{path.name}" for path in OLD_BUNDLE.iterdir()}:
        assert file.removeprefix("bundle/") in {path.name for path in runtime_files("gqa_llama")}
    assert {path.name: path.read_bytes() for path in bundle.rglob("*.py")} == {
        path.name: path.read_bytes() for path in runtime_files("gqa_llama")
    }
    assert run_cli("verify", bundle).exit_code == 0
    assert run_cli("refresh", bundle).stdout.startswith("Nothing to refresh")


def test_modified_code_of_today_is_refused_too(bundle):
    for path in runtime_files("gqa_llama"):
        shutil.copy(path, bundle)
    change_a_file(bundle)
    assert_left_alone(bundle, "has code that no hf_gqa shipped (layer_plan.py)")


def test_plan_lists_what_is_removed(bundle):
    for modify in (add_a_file, add_generation_code):
        modify(bundle)
    found = json.loads(run_cli("refresh", bundle, "--dry-run", "--json", "--overwrite-modified").stdout)
    assert found["modified"] == ["custom_generate/generate.py", "tokenization_own.py", "custom_generate"]
    removed = {each["file"] for each in found["files"] if each["change"] == "removed"}
    assert {"tokenization_own.py", "custom_generate/generate.py", "custom_generate/data/words.txt"} <= removed


def test_links_that_lead_outside(bundle, tmp_path):
    """As every file is in the cache of the Hub, which must stay what it was."""
    (bundle / "model.safetensors").rename(tmp_path / "blob")
    (bundle / "model.safetensors").symlink_to(tmp_path / "blob")
    assert_left_alone(bundle, f"'model.safetensors' is a link to {tmp_path / 'blob'}, outside the bundle", "cp -rL")


def test_link_that_leads_to_itself(bundle):
    (bundle / "loop").symlink_to("loop")
    with pytest.raises(Refusal, match=r"'loop' is neither a file nor a folder\. Remove it\."):
        refresh(bundle)


@pytest.mark.parametrize("architectures", [[["GQALlamaForCausalLM"]], [{}], [1]], ids=str)
def test_architectures_that_are_no_names(bundle, architectures):
    edit_json(bundle / CONFIG, architectures=architectures)
    assert_left_alone(bundle, f"is a {architectures[0]}, which hf_gqa", "does not have")


def test_version_of_more_digits_than_a_number_may_have(bundle):
    edit_json(bundle / CONFIG, hf_gqa={"version": "9" * 5000})
    assert_left_alone(bundle, "says which hf_gqa wrote it")


def test_configuration_that_is_nested_too_deeply(bundle):
    text = (bundle / CONFIG).read_text()
    (bundle / CONFIG).write_text(text.replace("{", '{"deep": ' + "[" * 100_000 + "]" * 100_000 + ",", 1))
    assert_left_alone(bundle, "config.json: not readable JSON (it is nested too deep")


def test_what_is_no_file(bundle):
    os.mkfifo(bundle / "pipe")
    with pytest.raises(Refusal, match=r"'pipe' is neither a file nor a folder\. Remove it\."):
        refresh(bundle)


def test_folder_that_one_is_in(bundle, monkeypatch):
    (bundle / "evaluation").mkdir()
    for here in (bundle, bundle / "evaluation"):
        monkeypatch.chdir(here)
        assert_left_alone(bundle, "you are in this folder, and a renewed one takes its place. Change to another folder")
    monkeypatch.chdir(bundle)
    assert run_cli("refresh", ".", "--dry-run").exit_code == 0


@pytest.mark.parametrize("read_only", [".", "bundle", "bundle/evaluation"])
def test_folder_that_may_not_be_written_to(bundle, monkeypatch, read_only):
    """Root may write everywhere, so the system says that it may not."""
    (bundle / "evaluation").mkdir()
    access, place = os.access, (bundle.parent / read_only).resolve()
    monkeypatch.setattr(
        os, "access", lambda path, mode: access(path, mode) and not (mode & os.W_OK and Path(path) == place)
    )
    assert_left_alone(bundle, "may not be read and written to. Nothing was changed", str(place), code=3)


def test_failed_check_is_named_and_nothing_changes(bundle, monkeypatch):
    found = [Check(name="loads", passed=True, detail=""), Check(name="generates", passed=False, detail="1 of 4 tokens")]
    monkeypatch.setattr(refresh_module, "verify", lambda folder: found)
    words = "bundle: not refreshed, a check failed: generates (1 of 4 tokens). The folder is as it was."
    assert_left_alone(bundle, words, code=1)


@pytest.mark.usefixtures("warm_verification")
def test_weights_that_are_not_those_of_the_plan_fail_and_nothing_changes(bundle):
    """By the real checks."""
    layers = json.loads((bundle / CONFIG).read_text())["layer_plan"]
    edit_json(bundle / CONFIG, layer_plan=[*layers[1:], layers[0]])
    assert_left_alone(bundle, "not refreshed, a check failed: ", code=1)


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt(), ValueError("a defect")])
def test_an_exception_leaves_nothing_behind(bundle, monkeypatch, error):
    def failing(folder):
        raise error

    before = files_of(bundle.parent)
    monkeypatch.setattr(refresh_module, "verify", failing)
    with pytest.raises(type(error)):
        refresh(bundle)
    assert files_of(bundle.parent) == before and list(bundle.parent.glob(".*")) == []


@pytest.mark.parametrize("what", ["written", "added", "removed"])
def test_what_somebody_changes_meanwhile_is_not_lost(bundle, monkeypatch, what):
    def with_competitor(folder):
        if what == "removed":
            (bundle / "generation_config.json").unlink()
        else:
            (bundle / {"written": "generation_config.json", "added": "README.md"}[what]).write_text("{}")
        return []

    monkeypatch.setattr(refresh_module, "verify", with_competitor)
    with pytest.raises(
        Refusal, match=r"bundle: was changed meanwhile, so it was not refreshed\. Run hf-gqa refresh again"
    ):
        refresh(bundle)
    assert "hf_gqa" not in json.loads((bundle / CONFIG).read_text()) and list(bundle.parent.glob(".*")) == []
    assert (bundle / "README.md").exists() == (what == "added")


@pytest.mark.usefixtures("warm_verification")
def test_report_of_before_is_a_report_of_the_same_student(bundle, tmp_path):
    """Its numbers are of the weights, and so is the card."""
    report = sample_report(conversion=json.loads((bundle / MANIFEST).read_text()))
    (tmp_path / "report.json").write_text(report.to_json())
    (bundle / "LICENSE").write_text("Do as you please.\n")
    assert run_cli("card", bundle, "--report", tmp_path / "report.json").exit_code == 0
    refresh(bundle)
    assert "README.md" in plan_push(bundle, "someone/bundle").files
    edit_json(bundle / MANIFEST, uptraining={"tokens_seen": 1})
    with pytest.raises(Refusal, match="the report is of another student, or this one was trained since"):
        plan_push(bundle, "someone/bundle")


def test_plan_that_another_run_has_carried_out_already(bundle, monkeypatch):
    """Its manifest would tell of the same renewal twice."""
    monkeypatch.setattr(refresh_module, "verify", lambda folder: [])
    plan = refresh_module.plan_refresh(bundle)
    refresh(bundle)
    before = files_of(bundle)
    with pytest.raises(Refusal, match=r"was changed meanwhile, so it was not refreshed\. Run hf-gqa refresh again"):
        refresh_module.carry_out(plan)
    assert files_of(bundle) == before and len(json.loads((bundle / MANIFEST).read_text())["refreshed"]) == 1
