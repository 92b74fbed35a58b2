"""The code a bundle carries, compared with the runtime that is installed here."""

from collections.abc import Collection
from pathlib import Path

from transformers.dynamic_module_utils import get_relative_import_files

from .. import runtime
from ..staging import file_sha256


RUNTIME_FOLDER = Path(runtime.__file__).parent
GENERATION_CODE = "custom_generate"  # a folder that transformers executes code from


def runtime_files(model_type: str) -> list[Path]:
    """The files that a bundle of this model type holds: its own and what that imports; none if it is not ours."""
    module = RUNTIME_FOLDER / f"modeling_{model_type}.py"
    if not isinstance(model_type, str) or not module.is_file():
        return []
    return [module, *sorted({Path(path) for path in get_relative_import_files(module)})]


def runtime_sha256(model_type: str) -> dict[str, str]:
    """File name -> hash, of what a bundle of this model type holds."""
    return {path.name: file_sha256(path) for path in runtime_files(model_type)}


def foreign_code(folder: Path, config: dict) -> list[str]:
    """What a bundle would execute, and how it differs from the runtime here; empty if it does not."""
    expected = {path.name: path for path in runtime_files(config.get("model_type"))}
    shipped = {path.relative_to(folder).as_posix(): path for path in folder.rglob("*.py")}
    different = sorted(
        file
        for file in expected.keys() | shipped.keys()
        if file not in expected or file not in shipped or expected[file].read_bytes() != shipped[file].read_bytes()
    )
    return different + _executed_besides(folder, config.get("auto_map"), expected)


def modified_code(folder: Path, config: dict, released: dict[str, set[str]]) -> list[str]:
    """What a bundle would execute and no hf_gqa shipped; empty if there is nothing.

    Args:
        released: file name -> the hashes of it that were shipped; the runtime here is added.
    """
    known = {path.name: {file_sha256(path)} for path in runtime_files(config.get("model_type"))}
    known = {name: known.get(name, set()) | released.get(name, set()) for name in known.keys() | released.keys()}
    shipped = {path.relative_to(folder).as_posix(): path for path in sorted(folder.rglob("*.py"))}
    modified = [file for file, path in shipped.items() if file_sha256(path) not in known.get(file, ())]
    return modified + _executed_besides(folder, config.get("auto_map") or {}, known)


def _executed_besides(folder: Path, auto_map, files: Collection[str]) -> list[str]:
    """What transformers would execute that is none of these files."""
    found = [GENERATION_CODE] if (folder / GENERATION_CODE).exists() else []
    for where in auto_map.values() if isinstance(auto_map, dict) else [auto_map]:
        if f"{str(where).partition('.')[0]}.py" not in files:
            found.append(f"auto_map names {where}")
    return found
