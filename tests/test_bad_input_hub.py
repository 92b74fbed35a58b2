"""Donors named as repositories, with the network switched off: from the cache, or one clear message."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from huggingface_hub import constants
from safetensors.torch import load_file

from .command_line import assert_refused, run_cli
from .donor_folders import files_of, write_donor, write_sharded_donor


COMMIT, OLDER = "0123456789abcdef" * 2 + "01234567", "f" * 40


@pytest.fixture(autouse=True)
def cache(tmp_path_factory, monkeypatch) -> Path:
    """An empty cache of its own, offline."""
    folder = tmp_path_factory.mktemp("hub")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(folder))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    return folder


def cached_donor(cache: Path, seed: int = 0, commit: str = COMMIT, ref: str | None = "main", write=write_donor) -> Path:
    """A donor as `snapshot_download` leaves it: blobs, and a snapshot of links to them."""
    repository = cache / "models--someone--donor"
    snapshot = repository / "snapshots" / commit
    write(snapshot, seed=seed)
    (repository / "blobs").mkdir(exist_ok=True)
    for number, file in enumerate(sorted(snapshot.iterdir())):
        blob = repository / "blobs" / f"{commit[:8]}{number}"
        shutil.move(file, blob)
        file.symlink_to(blob)
    if ref is not None:
        (repository / "refs").mkdir(exist_ok=True)
        (repository / "refs" / ref).write_text(commit)
    return snapshot


def convert_cli(tmp_path: Path, *options) -> dict:
    result = run_cli("convert", "someone/donor", tmp_path / "student", "--num-key-value-heads", 2, *options)
    assert result.exit_code == 0, result.stderr
    return json.loads((tmp_path / "student/conversion_manifest.json").read_text())["donor"]


@pytest.mark.parametrize("name", ["someone/donor", "donor", "no such/donor!", "someone/" + "d" * 200])
def test_repository_that_is_not_cached_is_refused(tmp_path, name):
    words = [f"{name}: neither a folder here nor a repository that could be fetched (", "spelling", "HF_HUB_OFFLINE"]
    assert_refused(name, tmp_path, *words)


def test_revision_that_is_not_cached_is_refused(tmp_path, cache):
    cached_donor(cache)
    words = ["someone/donor: neither a folder here nor a repository that could be fetched ("]
    assert_refused("someone/donor", tmp_path, *words, options=("--revision", "v2"))


@pytest.mark.parametrize("write", [write_donor, write_sharded_donor])
def test_cached_repository_is_converted_and_its_revision_recorded(tmp_path, cache, write):
    snapshot = cached_donor(cache, write=write)
    before = files_of(cache)
    donor = convert_cli(tmp_path)
    assert donor["name"] == "someone/donor" and donor["revision"] == COMMIT and donor["weights_sha256"] is None
    assert files_of(cache) == before
    files = {path.name for path in snapshot.glob("*.safetensors")}
    assert files == {path.name for path in (tmp_path / "student").glob("*.safetensors")}
    assert not any(path.is_symlink() for path in (tmp_path / "student").iterdir())


def test_revision_chooses_the_snapshot(tmp_path, cache):
    cached_donor(cache)
    older = cached_donor(cache, seed=1, commit=OLDER, ref="v1")
    assert convert_cli(tmp_path, "--revision", "v1")["revision"] == OLDER
    assert convert_cli(tmp_path, "--revision", OLDER, "--overwrite")["revision"] == OLDER
    name = "model.layers.0.mlp.up_proj.weight"
    expected = load_file(older / "model.safetensors")[name]
    assert torch.equal(load_file(tmp_path / "student/model.safetensors")[name], expected)


def test_cached_repository_that_lacks_a_shard_is_refused(tmp_path, cache):
    snapshot = cached_donor(cache, write=write_sharded_donor)
    shard = sorted(snapshot.glob("model-*.safetensors"))[1]
    shard.unlink()
    assert_refused("someone/donor", tmp_path, f"shard '{shard.name}' is missing")


def test_folder_comes_before_a_repository_of_the_same_name(tmp_path, cache, monkeypatch):
    cached_donor(cache)
    write_donor(tmp_path / "someone/donor")
    monkeypatch.chdir(tmp_path)
    assert convert_cli(tmp_path)["revision"] is None
