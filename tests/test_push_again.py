"""What is pushed a second time: only what differs from the branch, and nothing at all if nothing does."""

import json
import shutil
from pathlib import Path

import pytest

from hf_gqa import refresh
from hf_gqa.convert.bundle_code import runtime_files
from hf_gqa.export import push as push_module
from hf_gqa.export.push import push

from .command_line import assert_one_message, run_cli
from .hub_stand_in import OWNER, logged_in_hub


REPO = f"{OWNER}/renewed"
OLD_BUNDLE = Path(__file__).parent / "old_bundles" / "decoder"


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """It holds the student; nobody looks at whether the code of that is today's."""
    monkeypatch.setattr(push_module, "verify", lambda *arguments, **options: [])
    with logged_in_hub(monkeypatch, tmp_path) as hub:
        push(OLD_BUNDLE, REPO, needs_card=False)
        yield hub


@pytest.fixture
def student(tmp_path) -> Path:
    return shutil.copytree(OLD_BUNDLE, tmp_path / "student")


def push_again(student: Path):
    return push(student, REPO, needs_card=False)


def files_in(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def sent_last(hub) -> list[str]:
    """Paths in the last commit that was sent."""
    lines = [json.loads(line) for line in [r for r in hub.requests if "/commit/" in r[1]][-1][3].splitlines()]
    return sorted(line["value"]["path"] for line in lines if line["key"] != "header")


def stored(hub) -> int:
    """How often the bytes of a large file were sent."""
    return len([request for request in hub.requests if "/storage/" in request[1]])


def test_the_same_twice_is_no_second_commit(hub, student):
    assert sent_last(hub) == sorted(files_in(student)) and stored(hub) == 1
    again = push_again(student)
    assert set(again.files) == files_in(student).keys() and again.uploaded == again.removed == ()
    assert again.commit == hub.repositories[REPO].branches["main"]
    assert again.url == f"{hub.endpoint}/{REPO}/commit/{again.commit}"
    assert len(hub.repositories[REPO].commits) == 2  # with the one that made the repository
    result = run_cli("push", student, REPO, "--no-card")
    assert result.exit_code == 0 and f"Nothing to push, {REPO} has all of it: {again.url}" in result.stdout
    assert json.loads(run_cli("push", student, REPO, "--no-card", "--json").stdout)["uploaded"] == []


def test_only_what_differs_is_sent(hub, student):
    config = student / "config.json"
    config.write_text(config.read_text().replace("silu", "gelu"))  # of the same size
    (student / "uptraining.json").write_text("{}")
    result = run_cli("push", student, REPO, "--no-card")
    count = len(files_in(student))
    assert sent_last(hub) == ["config.json", "uptraining.json"] and stored(hub) == 1
    assert f"Not sent, for they are there already: {count - 2} of {count} files." in result.stdout
    there = hub.repositories[REPO].at("main")[1]
    assert {name: there[name] for name in files_in(student)} == files_in(student)


def test_weights_that_differ_in_one_byte_are_sent(hub, student):
    weights = (student / "model.safetensors").read_bytes()
    (student / "model.safetensors").write_bytes(weights[:-1] + bytes([weights[-1] ^ 1]))
    assert push_again(student).uploaded == ("model.safetensors",)
    assert sent_last(hub) == ["model.safetensors"] and stored(hub) == 2


def test_another_branch_is_compared_with_itself(hub, student):
    (student / "uptraining.json").write_text("{}")
    for uploaded in (("uptraining.json",), ()):
        assert push(student, REPO, needs_card=False, revision="next/try").uploaded == uploaded
    assert push_again(student).uploaded == ("uptraining.json",)


def test_branch_that_moves_meanwhile_is_not_written_to(hub, student, monkeypatch):
    """What it holds was compared before."""
    (student / "uptraining.json").write_text("{}")
    is_there = push_module._is_there

    def with_competitor(path, there):
        hub.repositories[REPO].add("main", "another's", "", {"model.safetensors": b"another's"})
        return is_there(path, there)

    monkeypatch.setattr(push_module, "_is_there", with_competitor)
    result = run_cli("push", student, REPO, "--no-card")
    assert_one_message(result, 3, REPO, "HTTP 412", "Nothing was committed: push again later")
    assert hub.repositories[REPO].at("main")[1] == {"model.safetensors": b"another's"}


@pytest.mark.usefixtures("warm_verification")
def test_of_a_refreshed_bundle_the_code_is_sent_and_the_weights_are_not(hub, student):
    before = files_in(student)
    refresh(student)
    after = files_in(student)
    result = push_again(student)
    assert set(result.uploaded) == {name for name in after if before.get(name) != after[name]}
    assert {"config.json", "conversion_manifest.json"} <= set(result.uploaded) and stored(hub) == 1
    assert set(result.removed) == before.keys() - after.keys()
    assert sent_last(hub) == sorted(result.uploaded + result.removed)
    there = hub.repositories[REPO].at("main")[1]
    assert {name: data for name, data in there.items() if name != ".gitattributes"} == after
    assert {name for name in there if name.endswith(".py")} == {path.name for path in runtime_files("gqa_llama")}
    description = hub.repositories[REPO].commits[result.commit]["description"]
    assert "refreshed:" in description and push_again(student).uploaded == ()
