"""Pushing with the real huggingface_hub client to a stand-in of the Hub on this machine."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from huggingface_hub import constants
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from hf_gqa import Refusal, convert_checkpoint
from hf_gqa.convert.manifest import Manifest
from hf_gqa.export import push as push_module
from hf_gqa.export.push import CheckFailed, PushPlan, plan_push, push, upload, write_instead
from hf_gqa.export.pushed_files import files_to_push
from hf_gqa.export.verify import Check

from .command_line import assert_one_message, run_cli
from .donor_folders import files_of, write_donor
from .hub_stand_in import OWNER, TOKEN, Repository, hub_stand_in, logged_in_hub
from .sample_report import sample_report


REPO = f"{OWNER}/two-heads"


@pytest.fixture
def hub(monkeypatch, tmp_path):
    with logged_in_hub(monkeypatch, tmp_path) as hub:
        yield hub


@pytest.fixture
def verified(monkeypatch):
    """Verification takes a process of its own; most tests are of what comes after."""
    monkeypatch.setattr(push_module, "verify", lambda *arguments, **options: [])


@pytest.fixture(scope="module")
def converted(tmp_path_factory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("students")
    for export in ("native", "bundle"):
        write_donor(folder / "donor")
        (folder / "donor/LICENSE").write_text("Do as you please.\n")
        convert_checkpoint(folder / "donor", folder / export, num_key_value_heads=2, export=export)
        report = sample_report(conversion=json.loads((folder / export / "conversion_manifest.json").read_text()))
        (folder / "report.json").write_text(report.to_json())
        assert run_cli("card", folder / export, "--report", folder / "report.json").exit_code == 0
    return {export: folder / export for export in ("native", "bundle")}


@pytest.fixture
def student(tmp_path, converted) -> Path:
    return shutil.copytree(converted["native"], tmp_path / "student")


def files_in(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def run_client(hub, tmp_path: Path, *arguments) -> subprocess.CompletedProcess:
    """A fresh process whose Hub is the stand-in."""
    environment = os.environ | {
        "HF_ENDPOINT": hub.endpoint,
        "HF_HOME": str(tmp_path / "hf-home"),
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_OFFLINE": "0",
        "HF_TOKEN": TOKEN,
        "TRANSFORMERS_OFFLINE": "0",
    }
    return subprocess.run([sys.executable, *map(str, arguments)], env=environment, capture_output=True, text=True)


LOAD = """
import sys

import torch
from huggingface_hub import hf_hub_download, snapshot_download
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

repo, output, code = sys.argv[1:]
print(snapshot_download(repo))
print(hf_hub_download(repo, "evaluation/report.json"))
model = AutoModelForCausalLM.from_pretrained(repo, trust_remote_code=code == "code").eval()
save_file({"logits": model(torch.arange(12).unsqueeze(0)).logits}, output)
"""


def assert_there_as_here(hub, student: Path, tmp_path: Path) -> None:
    """Loaded in a fresh process: the same bytes, the same logits; and the token was seen in one header alone."""
    code = "code" if Manifest.read(student).export == "bundle" else ""
    loaded = run_client(hub, tmp_path, "-c", LOAD, REPO, tmp_path / "logits", code)
    assert loaded.returncode == 0, loaded.stderr
    files = files_in(student)
    commit, there = hub.repositories[REPO].at("main")
    assert {name: there[name] for name in files} == files and there.keys() - files.keys() == {".gitattributes"}
    snapshot, report = map(Path, loaded.stdout.splitlines()[-2:])
    assert {name: (snapshot / name).read_bytes() for name in files} == files and snapshot.name == commit
    assert report.read_bytes() == files["evaluation/report.json"]
    model = AutoModelForCausalLM.from_pretrained(student).eval()
    with torch.no_grad():
        assert torch.equal(load_file(tmp_path / "logits")["logits"], model(torch.arange(12).unsqueeze(0)).logits)
    assert hub.repositories[REPO].private
    assert_token_only_in_header(hub)


def test_round_trip(hub, verified, student, tmp_path):
    assert push(student, REPO).commit == hub.repositories[REPO].branches["main"]
    assert_there_as_here(hub, student, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("export", ["native", "bundle"])
def test_round_trip_of_the_command(tmp_path, converted, export):
    """Verified and pushed by the command in a process of its own."""
    with hub_stand_in() as hub:
        pushed = run_client(hub, tmp_path, "-m", "hf_gqa.cli", "push", converted[export], REPO)
        assert pushed.returncode == 0, pushed.stderr
        assert_there_as_here(hub, converted[export], tmp_path)
        commit = hub.repositories[REPO].branches["main"]
        for words in (
            f"{REPO} on branch main, private",
            "model.safetensors",
            "files, ",
            " KiB in all",
            f"commit/{commit}",
        ):
            assert words in pushed.stdout
        hub.failing["/commit/"] = 500
        (converted[export] / "uptraining.json").write_text("{}")
        failed = run_client(hub, tmp_path, "-m", "hf_gqa.cli", "push", converted[export], REPO)
        (converted[export] / "uptraining.json").unlink()
    assert failed.returncode == 3 and "the Hub failed (HTTP 500" in failed.stderr and "Traceback" not in failed.stderr
    assert TOKEN not in pushed.stdout + pushed.stderr + failed.stdout + failed.stderr


def assert_token_only_in_header(hub) -> None:
    for _, target, headers, body in hub.requests:
        elsewhere = {name: value for name, value in headers.items() if name != "authorization"}
        assert TOKEN not in target and TOKEN.encode() not in body and TOKEN not in str(elsewhere)
        assert "authorization" not in headers or "/storage/" not in target
    assert any(headers.get("authorization") == f"Bearer {TOKEN}" for _, _, headers, _ in hub.requests)


def test_commit_holds_the_recipe(hub, verified, student):
    announced = []
    result = push(student, REPO, announce=announced.append)
    commit = hub.repositories[REPO].commits[result.commit]
    assert commit["summary"] == "donor with 2 KV heads instead of 4" == announced[0].title
    manifest = Manifest.read(student)
    assert yaml.safe_load(commit["description"])["plan"] == manifest.plan
    assert yaml.safe_load(commit["description"])["donor"]["weights_sha256"] == manifest.donor["weights_sha256"]
    assert result.files == tuple(sorted(files_in(student))) and result.removed == () and not result.public
    assert len(hub.repositories[REPO].commits) == 2  # one beside the initial one: nobody can load half a student


def test_public_only_when_asked(hub, verified, student):
    assert push(student, REPO, public=True).public and not hub.repositories[REPO].private
    with pytest.raises(
        Refusal, match=r"exists and is public, but shall be private. Nothing was uploaded.*use --public"
    ):
        push(student, REPO)
    hub.repositories[REPO].private = True
    with pytest.raises(Refusal, match=r"exists and is private, but shall be public.*leave --public out"):
        push(student, REPO, public=True)
    assert len(hub.repositories[REPO].commits) == 2


def test_branch_and_message(hub, verified, student):
    push(student, "two-heads", revision="next/try", commit_message="Two heads, again")
    repository = hub.repositories[REPO]
    assert list(repository.at("main")[1]) == [".gitattributes"]
    commit, files = repository.at("next/try")
    assert repository.commits[commit]["summary"] == "Two heads, again" and "model.safetensors" in files
    (student / "uptraining.json").write_text("{}")
    assert "uptraining.json" in push(student, REPO, revision="next/try").files


def test_weights_and_code_of_an_earlier_push_are_removed(hub, verified, student):
    earlier = {
        "model-00001-of-00002.safetensors": b"1",
        "model.safetensors.index.json": b"{}",
        "modeling_x.py": b"",
        "a.png": b"",
    }
    hub.repositories[REPO] = Repository(private=True)
    hub.repositories[REPO].add("main", "earlier", "", earlier)
    assert set(push(student, REPO).removed) == earlier.keys() - {"a.png"}
    assert hub.repositories[REPO].at("main")[1].keys() == files_in(student).keys() | {"a.png"}


@pytest.mark.parametrize(
    ("part", "status", "kind", "words"),
    [
        ("/repos/create", 401, Refusal, "the Hub does not accept the token (HTTP 401"),
        ("/repos/create", 403, Refusal, "no permission to write there (HTTP 403"),
        ("/repos/create", 500, OSError, "the Hub failed (HTTP 500"),
        ("/validate-yaml", 400, Refusal, "README.md"),
        ("/commit/", 401, Refusal, "does not accept the token"),
        ("/commit/", 403, Refusal, "no permission to write there"),
        ("/commit/", 500, OSError, "the Hub failed"),
        ("/commit/", 422, Refusal, "the Hub refuses it (HTTP 422"),
        ("/models/", 404, Refusal, "not found on the Hub, or hidden"),
    ],
)
def test_failures_are_one_line_without_the_token(hub, verified, student, part, status, kind, words):
    """Even if the server repeats the token in its error."""
    hub.failing[part] = status
    result = run_cli("push", student, REPO)
    assert_one_message(result, 2 if kind is Refusal else 3, REPO, words)
    assert TOKEN not in result.output + result.stderr
    as_json = run_cli("push", student, REPO, "--json")
    assert words in json.loads(as_json.stdout)["error"] and TOKEN not in as_json.output + as_json.stderr


def test_no_network(hub, verified, student, monkeypatch):
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    assert_one_message(
        run_cli("push", student, REPO), 3, "the Hub at http://127.0.0.1:9 cannot be reached", "--dry-run"
    )


def test_other_owner(hub, verified, student):
    assert_one_message(run_cli("push", student, "nobody/two-heads"), 2, "no permission to write there")


def test_not_logged_in(hub, verified, student, monkeypatch):
    monkeypatch.delenv("HF_TOKEN")
    assert_one_message(run_cli("push", student, REPO), 2, "not logged in. Run hf auth login")
    assert hub.requests == []


def test_failed_check_is_named_and_nothing_is_sent(hub, student, monkeypatch):
    failed = [Check(name="generates", passed=False, detail="1 of 4 tokens")]
    monkeypatch.setattr(push_module, "verify", lambda *arguments, **options: failed)
    assert_one_message(run_cli("push", student, REPO), 1, "not pushed, a check failed: generates (1 of 4 tokens)")
    assert hub.requests == []


def test_card_is_checked(verified, student):
    card = student / "README.md"
    card.write_text(card.read_text().replace("| 24.05 |", "| 23.05 |"))
    with pytest.raises(CheckFailed, match=r"README.md:\d+: altered, the report says: \| perplexity"):
        plan_push(student, REPO)
    (student / "evaluation/report.json").unlink()
    with pytest.raises(Refusal, match=r"its report .* is missing"):
        plan_push(student, REPO)
    card.write_text("---\nlicense: mit\n---\n# My own words")
    assert "README.md" in plan_push(student, REPO).files
    card.unlink()
    with pytest.raises(Refusal, match=r"missing, so nobody would know .* hf-gqa card .* --no-card"):
        plan_push(student, REPO)
    assert "README.md" not in plan_push(student, REPO, needs_card=False).files


def test_offline_writes_the_folder(verified, student, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    before = files_of(student)
    result = run_cli("push", student, REPO)
    assert result.exit_code == 0 and "Nothing was sent (HF_HUB_OFFLINE is set)" in result.stdout, result.output
    assert files_in(tmp_path / "pushed/two-heads") == files_in(student) and files_of(student) == before
    assert_one_message(run_cli("push", student, REPO), 2, "pushed/two-heads: exists")
    found = json.loads(run_cli("push", student, REPO, "--overwrite", "--json").stdout)
    assert (found["pushed"], found["output"], found["public"]) == (False, "pushed/two-heads", False)
    with pytest.raises(Refusal, match="HF_HUB_OFFLINE is set, so nothing can be pushed"):
        push(student, REPO)


def test_dry_run_sends_nothing(hub, verified, student, tmp_path):
    assert run_cli("push", student, REPO, "--dry-run", "--output", tmp_path / "out").exit_code == 0
    assert files_in(tmp_path / "out") == files_in(student) and hub.requests == []
    with pytest.raises(Refusal, match="overlaps the student's folder"):
        write_instead(plan_push(student, REPO), student / "out")


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("pytorch_model.bin", "may run code when it is read (.bin)"),
        ("optimizer.pt", "may run code when it is read (.pt)"),
        ("tokenizer.pkl", "may run code when it is read (.pkl)"),
        ("checkpoint-10/model.safetensors", "no part of a student"),
        ("other.safetensors", "no part of a student"),
        ("modeling_x.py", "which a native student needs none of"),
        ("sub/config.json", "no part of a student"),
        (".env", "no part of a student"),
        ("notes.txt", "no part of a student"),
        ("evaluation/deeper/report.json", "no part of a student"),
    ],
)
def test_file_that_does_not_belong_is_refused(student, name, words):
    (student / name).parent.mkdir(exist_ok=True, parents=True)
    (student / name).write_bytes(b"x")
    with pytest.raises(Refusal) as refusal:
        files_to_push(student, Manifest.read(student))
    assert words in str(refusal.value) and f"'{name}'" in str(refusal.value)


@pytest.mark.parametrize(
    "name", ["config.json", "NOTES.md", "evaluation/report.html", "tokenizer_config.json", "LICENSE"]
)
def test_token_in_a_file_is_refused_and_not_said(student, name):
    (student / name).parent.mkdir(exist_ok=True)
    (student / name).write_text(json.dumps({"note": f"token={TOKEN}"}))
    with pytest.raises(Refusal, match="holds a token of the Hub") as refusal:
        files_to_push(student, Manifest.read(student))
    assert TOKEN not in str(refusal.value)


def test_own_token_of_any_shape_is_found(student):
    (student / "NOTES.md").write_text("secret-of-another-shape")
    assert "NOTES.md" in files_to_push(student, Manifest.read(student))
    with pytest.raises(Refusal, match="holds a token"):
        files_to_push(student, Manifest.read(student), token="secret-of-another-shape")


def test_links_lead_nowhere_else(student, tmp_path):
    (tmp_path / "elsewhere.md").write_text("x")
    (student / "NOTES.md").symlink_to(student / "README.md")
    assert "NOTES.md" in files_to_push(student, Manifest.read(student))
    (student / "MORE.md").symlink_to(tmp_path / "elsewhere.md")
    with pytest.raises(Refusal, match=r"'MORE.md' is a link to .*outside the student"):
        files_to_push(student, Manifest.read(student))


@pytest.mark.parametrize(
    ("repo_id", "options", "words"),
    [
        ("a/b/c", (), "repo_id 'a/b/c': "),
        ("some one/x", (), "Give owner/name."),
        ("x--y", (), "repo_id 'x--y': "),
        (REPO, ("--revision", "a b"), "revision 'a b': not the name of a branch"),
        (REPO, ("--revision", "f" * 40), "is a commit, which nothing can be added to"),
        (REPO, ("--commit-message", " "), "not one line of text"),
    ],
)
def test_bad_names_are_refused(verified, student, repo_id, options, words):
    assert_one_message(run_cli("push", student, repo_id, *options), 2, words)


def test_upload_takes_only_what_was_planned(hub, verified, student):
    plan = plan_push(student, REPO)
    (student / "late.bin").write_bytes(b"x")
    assert isinstance(plan, PushPlan) and "late.bin" not in upload(plan).files
    assert "late.bin" not in hub.repositories[REPO].at("main")[1]
