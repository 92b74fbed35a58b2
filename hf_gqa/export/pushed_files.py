"""Which files of a student go to the Hub, and why all others are refused: an upload is public before it is regretted."""

import re
from pathlib import Path

from ..convert.bundle_code import runtime_files
from ..convert.donor_folder import CARRIED_FILES, MODULE_WEIGHTS, matches
from ..convert.manifest import MANIFEST_FILE, Manifest
from ..reading import read_json
from ..refusal import Refusal
from ..weights.checkpoint import INDEX_FILE, SINGLE_FILE, Checkpoint


CARD_FILE, EVALUATION_FOLDER = "README.md", "evaluation"
KNOWN_FILES = (
    "config.json", "generation_config.json", MANIFEST_FILE, "uptraining.json", "uptraining.svg", ".gitattributes", "*.md",
    *(f"{EVALUATION_FOLDER}/*.{suffix}" for suffix in ("json", "html", "csv", "md", "png", "svg")), *CARRIED_FILES,
)  # fmt: skip
TEXT_SUFFIXES = (
    "",
    ".json",
    ".md",
    ".py",
    ".txt",
    ".html",
    ".csv",
    ".svg",
    ".jinja",
    ".model",
    ".spm",
    ".tiktoken",
    ".gitattributes",
)
EXECUTED_WHEN_READ = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle", ".joblib", ".npy", ".npz", ".h5", ".msgpack")
TOKEN = re.compile(rb"\b(?:hf|api_org|hf_oauth)_[A-Za-z0-9]{30,}")


def files_to_push(folder: Path, manifest: Manifest, token: str | None = None) -> tuple[str, ...]:
    """Paths within the folder, sorted.

    Args:
        token: of the user, which no file may hold.

    Raises:
        Refusal: a file that is no part of a student, may run code when it is read, leads outside, or holds a token.
    """
    weights = _weight_files(folder)
    code = _code_files(folder) if manifest.export == "bundle" else set()
    found = []
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        _check_link(folder, path, name)
        if path.is_dir():
            continue
        if name not in weights and name not in code:
            _check_known(folder, name)
        _check_tokens(folder, path, token)
        found.append(name)
    return tuple(found)


def _weight_files(folder: Path) -> set[str]:
    shards = set(Checkpoint(folder).shards)
    return shards if shards == {SINGLE_FILE} else shards | {INDEX_FILE}


def _code_files(folder: Path) -> set[str]:
    """What a bundle executes; `verify` has compared it with this hf_gqa, or was told to run it all the same."""
    config = read_json(folder / "config.json")
    shipped = {path.name for path in folder.glob("*.py")}
    return shipped | {path.name for path in runtime_files(config.get("model_type"))}


def _check_link(folder: Path, path: Path, name: str) -> None:
    if path.is_symlink() and not path.resolve().is_relative_to(folder.resolve()):
        raise Refusal(
            f"{folder}: '{name}' is a link to {path.resolve()}, outside the student. Copy the file or remove it."
        )
    if not (path.is_file() or path.is_dir()):
        raise Refusal(f"{folder}: '{name}' is neither a file nor a folder. Remove it.")


def _check_known(folder: Path, name: str) -> None:
    suffix = Path(name).suffix.lower()
    if suffix in EXECUTED_WHEN_READ:
        raise Refusal(
            f"{folder}: '{name}' may run code when it is read ({suffix}). Only safetensors are pushed: remove it."
        )
    if suffix == ".py":
        raise Refusal(f"{folder}: '{name}' is code, which a native student needs none of. Remove it.")
    known = KNOWN_FILES if suffix != ".safetensors" else (MODULE_WEIGHTS,)
    if not any(matches(Path(name), pattern) for pattern in known):
        raise Refusal(f"{folder}: '{name}' is no part of a student. Move it elsewhere, then push again.")


def _check_tokens(folder: Path, path: Path, token: str | None) -> None:
    """The message does not say the token: it may end up in a log."""
    if path.suffix.lower() not in TEXT_SUFFIXES:
        return
    text = path.read_bytes()
    if TOKEN.search(text) or (token and token.encode() in text):
        raise Refusal(
            f"{folder}: '{path.relative_to(folder).as_posix()}' holds a token of the Hub. Remove it from the file, and "
            f"invalidate the token in the settings of its account."
        )
