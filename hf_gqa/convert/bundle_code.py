"""The code a bundle carries, compared with the runtime that is installed here."""

from pathlib import Path

from transformers.dynamic_module_utils import get_relative_import_files

from .. import runtime


RUNTIME_FOLDER = Path(runtime.__file__).parent
GENERATION_CODE = "custom_generate"  # a folder that transformers executes code from


def runtime_files(model_type: str) -> list[Path]:
    """The files that a bundle of this model type holds: its own and what that imports; none if it is not ours."""
    module = RUNTIME_FOLDER / f"modeling_{model_type}.py"
    if not isinstance(model_type, str) or not module.is_file():
        return []
    return [module, *sorted({Path(path) for path in get_relative_import_files(module)})]


def foreign_code(folder: Path, config: dict) -> list[str]:
    """What a bundle would execute, and how it differs from the runtime here; empty if it does not."""
    expected = {path.name: path for path in runtime_files(config.get("model_type"))}
    shipped = {path.relative_to(folder).as_posix(): path for path in folder.rglob("*.py")}
    different = sorted(
        file
        for file in expected.keys() | shipped.keys()
        if file not in expected or file not in shipped or expected[file].read_bytes() != shipped[file].read_bytes()
    )
    if (folder / GENERATION_CODE).exists():
        different.append(GENERATION_CODE)
    auto_map = config.get("auto_map")
    for where in auto_map.values() if isinstance(auto_map, dict) else [auto_map]:
        if f"{str(where).partition('.')[0]}.py" not in expected:
            different.append(f"auto_map names {where}")
    return different
