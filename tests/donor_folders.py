"""Tiny donors on disk, and what a folder holds."""

import hashlib
import json
from pathlib import Path

from .tiny_donors import tiny_donor


def write_donor(folder: Path, model_type: str = "llama", num_key_value_heads: int = 4, **changes) -> Path:
    tiny_donor(model_type, num_key_value_heads, **changes).save_pretrained(folder)
    return folder


def write_sharded_donor(folder: Path, model_type: str = "llama", **changes) -> Path:
    tiny_donor(model_type, **changes).save_pretrained(folder, max_shard_size="20KB")
    assert len(list(folder.glob("model-*.safetensors"))) > 3
    return folder


def edit_json(path: Path, remove: tuple[str, ...] = (), **changes) -> None:
    values = json.loads(path.read_text(encoding="utf-8")) | changes
    path.write_text(json.dumps({key: value for key, value in values.items() if key not in remove}), encoding="utf-8")


def files_of(folder: Path) -> dict[str, tuple[str, int]]:
    """Every file below the folder: its hash and when it was last written."""
    return {
        str(path.relative_to(folder)): (hashlib.sha256(path.read_bytes()).hexdigest(), path.stat().st_mtime_ns)
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }
