"""Bundles of hf_gqa 0.1.0 are renewed: their code becomes today's, everything else stays, and they decode right again."""

import hashlib
import json
import os
import shutil
import stat
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import transformers
from huggingface_hub.errors import StrictDataclassFieldValidationError
from packaging.version import Version
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import hf_gqa
from hf_gqa import convert_checkpoint, open_donor, refresh
from hf_gqa.convert import bundle_code
from hf_gqa.convert.bundle_code import runtime_files
from hf_gqa.convert.families import FAMILIES, load_family
from hf_gqa.convert.manifest import Manifest
from hf_gqa.export.refresh import _auto_map, plan_refresh
from hf_gqa.export.released_code import RELEASED_CODE
from hf_gqa.export.verify import fresh_process
from hf_gqa.runtime import native_call
from hf_gqa.uptrain.export_student import export_student

from .command_line import run_cli
from .conftest import verify_in_warm_processes
from .donor_folders import edit_json, files_of, write_donor


OLD = Path(__file__).parent / "old_bundles"
NAMES = ("decoder", "layer_sharing", "encoder_decoder")
CONFIG, MANIFEST = "config.json", "conversion_manifest.json"
RENEWED_IN_CONFIG, RENEWED_IN_MANIFEST = {"architectures", "auto_map", "hf_gqa"}, {"code_sha256", "refreshed"}
BREAKS_OLD_BUNDLES = Version("5.24.0")  # of transformers

# Arguments: fresh_process.py, and JSON with a list of [folder, class, file for logits]. What each decodes with a cache is
# compared with what it computes without.
DECODING = """
import importlib.util, inspect, json, sys
sys.modules["hf_gqa"] = None
import torch, transformers
from safetensors.torch import save_file

spec = importlib.util.spec_from_file_location("fresh_process", sys.argv[1])
fresh_process = importlib.util.module_from_spec(spec)
spec.loader.exec_module(fresh_process)


def largest_difference(model, inputs):
    name = "decoder_input_ids" if model.config.is_encoder_decoder else "input_ids"
    tokens = inputs.pop(name)
    inputs = inputs if model.config.is_encoder_decoder else {}  # without padding
    whole = model(**inputs, **{name: tokens}, use_cache=False).logits
    caches = fresh_process.empty_caches(model.config)
    cache = transformers.EncoderDecoderCache(*caches) if len(caches) == 2 else caches[0]
    keyword = next(n for n in ("cache", "past_key_values") if n in inspect.signature(model.forward).parameters)
    steps = [
        model(**inputs, **{name: step, keyword: cache}, use_cache=True).logits
        for step in (tokens[:, :20], *tokens[:, 20:].split(1, dim=1))
    ]
    return (torch.cat(steps, dim=1) - whole).abs().max().item()


found = {}
for folder, name, file in json.loads(sys.argv[2]):
    auto_class = getattr(transformers, "AutoModelFor" + name.rpartition("For")[2])
    try:
        model = auto_class.from_pretrained(folder, trust_remote_code=True, dtype=torch.float32).eval()
        inputs = fresh_process.probe_inputs(model.config)
        with torch.no_grad():
            save_file({"logits": model(**inputs, use_cache=False).logits.contiguous()}, file)
            found[folder] = largest_difference(model, inputs)
    except Exception as error:
        found[folder] = str(error) or "failed"
print(json.dumps(found))
"""


def copy_of(name: str, folder: Path) -> Path:
    return shutil.copytree(OLD / name, folder)


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def read(folder: Path, file: str) -> dict:
    return json.loads((folder / file).read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def refreshed(tmp_path_factory) -> dict[str, SimpleNamespace]:
    """Each old bundle, renewed: where it is, what the plan was, and the files before."""
    work, found = tmp_path_factory.mktemp("refreshed"), {}
    with pytest.MonkeyPatch.context() as patch:
        verify_in_warm_processes(patch)
        for name in NAMES:
            folder = copy_of(name, work / f"new-{name}")
            before = files_of(folder)
            found[name] = SimpleNamespace(folder=folder, before=before, plan=refresh(folder), old=OLD / name)
    return found


@pytest.fixture
def bundle(tmp_path) -> Path:
    return copy_of("decoder", tmp_path / "bundle")


every_bundle = pytest.mark.parametrize("name", NAMES)


@every_bundle
def test_weights_and_all_that_is_no_code_stay_byte_for_byte(name, refreshed):
    """And so do the times of writing."""
    case = refreshed[name]
    kept = {f: found for f, found in case.before.items() if not f.endswith(".py") and f not in (CONFIG, MANIFEST)}
    after = files_of(case.folder)
    assert {file: after[file] for file in kept} == kept and "model.safetensors" in kept
    assert {file for file in after if not file.endswith(".py")} == {*kept, CONFIG, MANIFEST}
    assert list(case.folder.parent.glob(".*")) == []


@every_bundle
def test_code_is_that_of_this_hf_gqa(name, refreshed):
    case = refreshed[name]
    code = {path.name: path.read_bytes() for path in runtime_files(case.plan.model_type)}
    assert {path.name: path.read_bytes() for path in case.folder.rglob("*.py")} == code
    old = {path.name: path.read_bytes() for path in case.old.glob("*.py")}
    changed = {each.file: each.change for each in case.plan.files}
    assert {file for file, what in changed.items() if what == "added"} == code.keys() - old.keys()
    assert {file for file, what in changed.items() if what == "removed"} == old.keys() - code.keys()
    assert {file for file in code.keys() & old.keys() if code[file] != old[file]} == {
        file for file, what in changed.items() if what == "changed"
    }


@every_bundle
def test_config_changes_in_our_own_keys_alone(name, refreshed):
    before, after = read(refreshed[name].old, CONFIG), read(refreshed[name].folder, CONFIG)
    assert {k: v for k, v in after.items() if k not in RENEWED_IN_CONFIG} == {
        k: v for k, v in before.items() if k not in RENEWED_IN_CONFIG
    }
    assert after["hf_gqa"] == json.loads(json.dumps(native_call.tested_with()))
    assert after["auto_map"] == before["auto_map"] and after["architectures"] == before["architectures"]
    text = (refreshed[name].folder / CONFIG).read_text(encoding="utf-8")
    assert text == json.dumps(after, indent=2, sort_keys=True) + "\n"  # as transformers writes it


@every_bundle
def test_manifest_records_both_versions(name, refreshed):
    before, after = read(refreshed[name].old, MANIFEST), read(refreshed[name].folder, MANIFEST)
    assert {key: value for key, value in after.items() if key not in RENEWED_IN_MANIFEST} == before
    written = {"hf_gqa": "0.1.0", "transformers": "5.23.0"}
    renewed = {"hf_gqa": native_call.VERSION, "transformers": transformers.__version__}
    assert after["refreshed"] == [{"from": written, "to": renewed}]
    assert after["code_sha256"] == {path.name: sha256(path) for path in refreshed[name].folder.glob("*.py")}
    manifest = Manifest.read(refreshed[name].folder)
    assert (manifest.refreshed, manifest.code_sha256) == (after["refreshed"], after["code_sha256"])
    text = (refreshed[name].folder / MANIFEST).read_text(encoding="utf-8")
    assert text == json.dumps(after, indent=2, sort_keys=True) + "\n"


@every_bundle
def test_a_second_time_there_is_nothing_to_do(name, refreshed):
    folder = refreshed[name].folder
    before = files_of(folder)
    for options in ((), ("--overwrite-modified",)):
        result = run_cli("refresh", folder, *options)
        assert result.exit_code == 0 and result.stdout.startswith(f"Nothing to refresh: {folder} has the code of this")
    found = json.loads(run_cli("refresh", folder, "--json").stdout)
    assert (found["needed"], found["written"], found["files"], found["config"]) == (False, False, [], {})
    assert not refresh(folder).is_needed and files_of(folder) == before


@pytest.mark.slow
def test_decodes_right_again(refreshed, tmp_path):
    """In a process without hf_gqa: with a cache as without one, and what hf_gqa 0.1.0 computed on transformers 5.23."""
    jobs = [
        [str(folder), read(folder, MANIFEST)["model_class"], str(tmp_path / f"{folder.name}.safetensors")]
        for name in NAMES
        for folder in (copy_of(name, tmp_path / f"old-{name}"), refreshed[name].folder)
    ]
    run = subprocess.run(
        [sys.executable, "-I", "-c", DECODING, fresh_process.__file__, json.dumps(jobs)],
        env=os.environ | {"HF_HUB_OFFLINE": "1", "HF_MODULES_CACHE": str(tmp_path / "modules")},
        stdin=subprocess.DEVNULL,
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr
    found = json.loads(run.stdout.strip().splitlines()[-1])
    for name in NAMES:
        before, after = found[str(tmp_path / f"old-{name}")], found[str(refreshed[name].folder)]
        if Version(transformers.__version__) >= BREAKS_OLD_BUNDLES:
            assert isinstance(before, str) or before > 1e-3, name
        assert isinstance(after, float) and after < 1e-5, (name, after)
        expected = load_file(OLD / "logits.safetensors")[name]
        mask = torch.ones(2, 24).bool() if name == "encoder_decoder" else fresh_process.probe(33)[1].bool()
        logits = load_file(tmp_path / f"new-{name}.safetensors")["logits"]
        torch.testing.assert_close(logits[mask], expected[mask], rtol=0, atol=1e-5)


def test_dry_run_shows_what_would_change_and_writes_nothing(bundle):
    before = files_of(bundle.parent)
    result = run_cli("refresh", bundle, "--dry-run")
    assert (
        result.exit_code == 0 and result.stderr == "" and result.stdout.endswith("Nothing was written (--dry-run).\n")
    )
    assert f"{bundle} (gqa_llama)\n  hf_gqa: 0.1.0 -> {native_call.VERSION}\n" in result.stdout
    assert '  config.json: hf_gqa: null -> {"version": ' in result.stdout
    found = json.loads(run_cli("refresh", bundle, "--dry-run", "--json").stdout)
    for each in found["files"]:
        for side in ("before", "after"):
            if each[f"sha256_{side}"] is not None:
                assert f"{each[f'sha256_{side}'][:8]} " in result.stdout
        assert f"  {each['change']:<7}  {each['file']} " in result.stdout
    assert found["needed"] is True and found["written"] is False and found["checks"] == []
    assert found["config"]["hf_gqa"] == {"before": None, "after": json.loads(json.dumps(native_call.tested_with()))}
    assert found["versions_before"] == {"hf_gqa": "0.1.0", "transformers": "5.23.0"}
    assert files_of(bundle.parent) == before and list(bundle.parent.glob(".*")) == []


@pytest.mark.usefixtures("warm_verification")
def test_command_says_what_it_did(bundle):
    result = run_cli("refresh", bundle)
    assert result.exit_code == 0 and result.stdout.endswith(f"Refreshed {bundle}; verify passed.\n"), result.output
    edit_json(bundle / CONFIG, hf_gqa={"version": "0.1.0", "transformers": []})
    found = json.loads(run_cli("refresh", bundle, "--json").stdout)
    assert found["written"] is True and len(found["checks"]) > 5
    assert {check["passed"] for check in found["checks"]} == {True, None}  # no donor was given
    result = run_cli("push", bundle, "someone/bundle", "--no-card", "--dry-run", "--output", bundle.parent / "pushed")
    assert result.exit_code == 0, result.output
    pushed = {path.name: sha256(path) for path in (bundle.parent / "pushed").iterdir()}
    assert pushed == {path.name: sha256(path) for path in bundle.iterdir()}


def release(monkeypatch, folder: Path, version: str) -> Path:
    """The runtime of another release, which tests change before they look at it."""
    runtime = shutil.copytree(bundle_code.RUNTIME_FOLDER, folder, ignore=shutil.ignore_patterns("__pycache__"))
    monkeypatch.setattr(bundle_code, "RUNTIME_FOLDER", runtime)
    monkeypatch.setattr(native_call, "VERSION", version)
    return runtime


@pytest.mark.usefixtures("warm_verification")
def test_from_release_to_release(monkeypatch, tmp_path, bundle):
    """The manifest knows the code of the one in between, which no table does; files come, change and go."""
    runtime = release(monkeypatch, tmp_path / "8", "8.0.0")
    family = runtime / "modeling_gqa_llama.py"
    original = family.read_bytes()
    family.write_bytes(
        original.replace(b"from .layer_plan import", b"from .counting import ONE\nfrom .layer_plan import")
    )
    (runtime / "counting.py").write_text('"""Counts."""\n\nONE = 1\n')
    (runtime / "layer_plan.py").write_bytes((runtime / "layer_plan.py").read_bytes() + b"\n# of release 8\n")
    first = {change.file: change.change for change in refresh(bundle).files}
    assert first["counting.py"] == "added" and first["layer_plan.py"] == first["modeling_gqa_llama.py"] == "changed"

    runtime = release(monkeypatch, tmp_path / "9", "9.0.0")
    (runtime / "modeling_gqa_llama.py").write_bytes(original)
    (runtime / "counting.py").unlink()
    plan = refresh(bundle)
    assert {change.file: change.change for change in plan.files} == {
        "counting.py": "removed",
        "modeling_gqa_llama.py": "changed",
    }
    assert plan.config.keys() == {"hf_gqa"} and plan.modified == ()
    steps = [(each["from"]["hf_gqa"], each["to"]["hf_gqa"]) for each in Manifest.read(bundle).refreshed]
    assert steps == [("0.1.0", "8.0.0"), ("8.0.0", "9.0.0")]
    assert not (bundle / "counting.py").exists() and not plan_refresh(bundle).is_needed


@pytest.mark.usefixtures("warm_verification")
def test_renamed_classes_are_renamed_everywhere(bundle):
    """What an Auto class loaded then is what it loads now; the code that is replaced is not looked at."""
    for file in (CONFIG, MANIFEST):
        text = (bundle / file).read_text(encoding="utf-8")
        (bundle / file).write_text(text.replace("GQALlama", "GroupedLlama"), encoding="utf-8")
    plan = refresh(bundle)
    assert plan.config.keys() == {"architectures", "auto_map", "hf_gqa"}
    assert read(bundle, CONFIG)["architectures"] == [read(bundle, MANIFEST)["model_class"]] == ["GQALlamaForCausalLM"]
    assert read(bundle, CONFIG)["auto_map"] == read(OLD / "decoder", CONFIG)["auto_map"]


@pytest.mark.usefixtures("warm_verification")
def test_what_travels_with_a_bundle_stays(tmp_path, bundle):
    """Folders, links within, permissions; and nothing of it is copied."""
    (bundle / "evaluation").mkdir()
    (bundle / "evaluation" / "report.json").write_text("{}")
    (bundle / "NOTES.md").symlink_to("evaluation/report.json")
    (bundle / "model.safetensors").chmod(0o440)
    (bundle / CONFIG).chmod(0o600)
    bundle.chmod(0o750)
    inode = (bundle / "model.safetensors").stat().st_ino
    refresh(bundle)
    modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in (bundle, *bundle.iterdir())}
    assert (modes["bundle"], modes["model.safetensors"], modes[CONFIG]) == (0o750, 0o440, 0o600)
    found = (bundle / "model.safetensors").stat()
    assert (found.st_ino, found.st_nlink) == (inode, 1)
    assert (bundle / "NOTES.md").readlink() == Path("evaluation/report.json")
    assert (bundle / "evaluation/report.json").read_text() == "{}"


@pytest.mark.usefixtures("warm_verification")
def test_where_there_are_no_second_names_files_are_copied(bundle, monkeypatch):
    def refuse(*arguments, **options):
        raise PermissionError("not to be had here")

    before = files_of(bundle)
    (bundle / "model.safetensors").chmod(0o440)
    monkeypatch.setattr(os, "link", refuse)
    refresh(bundle)
    after = files_of(bundle)
    assert after["model.safetensors"] == before["model.safetensors"]
    assert stat.S_IMODE((bundle / "model.safetensors").stat().st_mode) == 0o440


@pytest.mark.usefixtures("warm_verification")
def test_reached_by_a_link_it_is_renewed_where_it_is(tmp_path, bundle):
    (tmp_path / "link").symlink_to(bundle, target_is_directory=True)
    refresh(tmp_path / "link")
    assert (tmp_path / "link").is_symlink() and not plan_refresh(bundle).is_needed


@pytest.mark.filterwarnings("default")  # configurations of all families by their defaults
def test_every_family_has_the_auto_map_that_its_configuration_writes():
    compared = 0
    for family in map(load_family, FAMILIES.names()):
        with suppress(
            StrictDataclassFieldValidationError
        ):  # transformers 5.4 refuses its own defaults of three families
            assert _auto_map(family) == family.config_class().auto_map
            compared += 1
    assert compared >= len(FAMILIES.names()) - 3


def test_table_of_released_code_is_that_of_the_old_bundles():
    shipped = {path.name: sha256(path) for name in NAMES for path in (OLD / name).glob("*.py")}
    assert len(shipped) == 11 and shipped.items() <= RELEASED_CODE["0.1.0"].items()
    assert len(RELEASED_CODE["0.1.0"]) == 53


def test_bundles_say_what_their_code_was(tmp_path):
    write_donor(tmp_path / "donor")
    for export in ("native", "bundle"):
        donor = open_donor(tmp_path / "donor")
        manifest = convert_checkpoint(donor, tmp_path / export, num_key_value_heads=2, export=export)
        assert Manifest.read(tmp_path / export) == manifest
    assert manifest.code_sha256 == {path.name: sha256(path) for path in (tmp_path / "bundle").glob("*.py")}
    assert not {"code_sha256", "refreshed"} & read(tmp_path / "native", MANIFEST).keys()
    assert not plan_refresh(tmp_path / "bundle").is_needed


def test_trained_student_says_what_its_code_is(tmp_path):
    """It was converted by hf_gqa 0.1.0, and saved with the code of today."""
    model = AutoModelForCausalLM.from_pretrained(OLD / "decoder")
    export_student(model, tmp_path / "trained", source=OLD / "decoder", uptraining={"tokens_seen": 1})
    manifest = Manifest.read(tmp_path / "trained")
    assert manifest.code_sha256 == bundle_code.runtime_sha256("gqa_llama")
    assert manifest.versions["hf_gqa"] == "0.1.0" and manifest.refreshed is None
    plan = plan_refresh(tmp_path / "trained")
    assert not plan.is_needed and plan.versions_before["hf_gqa"] == native_call.VERSION


def test_is_public():
    assert hf_gqa.refresh is refresh
