"""Renew the code of a bundle that an older hf_gqa wrote; its weights, and all that is not code, stay as they are."""

import errno
import json
import os
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import transformers
from packaging.version import Version

from ..convert.bundle_code import GENERATION_CODE, modified_code, runtime_files, runtime_sha256
from ..convert.families import FAMILIES, Family, load_family
from ..convert.manifest import MANIFEST_FILE, Manifest
from ..reading import read_json
from ..refusal import Refusal
from ..runtime import native_call
from ..staging import file_sha256, remove_leftovers, replaced_by_a_killed_run, staged_folder
from .json_members import read_text, with_members
from .released_code import RELEASED_CODE
from .verify import Check, CheckFailed, verify


CONFIG_FILE = "config.json"
CHANGED = "{folder}: was changed meanwhile, so it was not refreshed. Run hf-gqa refresh again."
OWN_PREFIX = "gqa_"  # of the model types of bundles
OWN_KEY = "hf_gqa"  # of what the configuration says its code was tested with


@dataclass(frozen=True, slots=True, kw_only=True)
class FileChange:
    """A file of code before and after; the values of the side where there is none are None."""

    file: str
    sha256_before: str | None
    sha256_after: str | None
    bytes_before: int | None
    bytes_after: int | None

    @property
    def change(self) -> str:
        if self.sha256_before is None:
            return "added"
        return "removed" if self.sha256_after is None else "changed"

    def to_dict(self) -> dict:
        return {"change": self.change} | asdict(self)


@dataclass(frozen=True, slots=True, kw_only=True)
class RefreshPlan:
    """What refreshing a bundle changes.

    Args:
        folder: of the bundle.
        versions_before, versions_after: of hf_gqa and transformers: that wrote the code, and that renew it.
        files: code that is added, changed or removed.
        config: keys of `config.json` -> (value before, value after).
        model_class: what the manifest calls the class then.
        modified: code that no hf_gqa shipped, which is replaced or removed.
    """

    folder: Path
    model_type: str
    model_class: str
    versions_before: dict
    versions_after: dict
    files: tuple[FileChange, ...]
    config: dict[str, tuple]
    modified: tuple[str, ...]

    @property
    def is_needed(self) -> bool:
        return bool(self.files or self.config or self.modified)

    def to_dict(self) -> dict:
        return asdict(self) | {
            "folder": str(self.folder),
            "files": [change.to_dict() for change in self.files],
            "config": {key: {"before": before, "after": after} for key, (before, after) in self.config.items()},
            "modified": list(self.modified),
            "needed": self.is_needed,
        }


def refresh(
    folder: str | Path, *, overwrite_modified: bool = False, announce: Callable[[RefreshPlan], None] = lambda plan: None
) -> RefreshPlan:
    """Give a bundle that an older hf_gqa wrote the code of this one; weights and all other files stay byte for byte.

    `verify` passes on the result before it takes the place of the folder, at one stroke; otherwise nothing changes. Nothing
    in the folder is executed before it is replaced. The manifest records which versions wrote and renewed the code.

    Args:
        folder: of a bundle with its manifest.
        overwrite_modified: replace code that was changed since, and remove code that is not of hf_gqa.
        announce: gets the plan before anything is written.

    Returns:
        What was changed; nothing if it was not `is_needed`.

    Raises:
        CheckFailed: `verify` found something wrong with the result.
        Refusal: no bundle, one of a newer hf_gqa, modified code, or files that are missing or broken.
        OSError: the folder may not be written to, or the disk failed.
    """
    plan = plan_refresh(folder, overwrite_modified=overwrite_modified)
    announce(plan)
    carry_out(plan)
    return plan


def plan_refresh(folder: str | Path, *, overwrite_modified: bool = False) -> RefreshPlan:
    """Look at everything that can be looked at without writing; arguments and errors as for `refresh`."""
    folder = Path(folder).expanduser()
    config, recorded = _read_bundle(folder)
    family, manifest = _family(folder, config), Manifest.read(folder)
    _check_links(folder)
    modified = modified_code(folder, config, _released_code(manifest))
    if modified and not overwrite_modified:
        raise Refusal(
            f"{folder}: has code that no hf_gqa shipped ({', '.join(modified)}), which would be lost. Keep a copy of the "
            f"folder, then use --overwrite-modified to replace or remove it."
        )
    renamed = _renamed_classes(folder, config, family, manifest.model_class)
    return RefreshPlan(
        folder=folder,
        model_type=config["model_type"],
        model_class=renamed(manifest.model_class),
        versions_before=_written_by(config, recorded),
        versions_after={"hf_gqa": native_call.VERSION, "transformers": transformers.__version__},
        files=_file_changes(folder, config["model_type"]),
        config=_config_changes(config, family, renamed),
        modified=tuple(modified),
    )


def carry_out(plan: RefreshPlan) -> list[Check]:
    """Put the renewed bundle in the place of the old one; what `verify` found of it, or nothing if nothing was to do."""
    if not plan.is_needed:
        remove_leftovers(plan.folder)  # of a run that was killed when all was done
        return []
    _check_replaceable(plan.folder)
    before = _listing(plan.folder)
    if _file_changes(plan.folder, plan.model_type) != plan.files:  # by another run since the plan was made
        raise Refusal(CHANGED.format(folder=plan.folder))
    with staged_folder(plan.folder, overwrite=True, keep_permissions=True) as staging:
        _write(plan, staging)
        checks = verify(staging)
        failed = [check for check in checks if check.passed is False]
        if failed:
            detail = failed[0].detail.replace(str(staging), str(plan.folder))
            raise CheckFailed(
                f"{plan.folder}: not refreshed, a check failed: {failed[0].name} ({detail}). The folder is as it was."
            )
        if _listing(plan.folder) != before:
            raise Refusal(CHANGED.format(folder=plan.folder))
    return checks


def _read_bundle(folder: Path) -> tuple[dict, dict]:
    """`config.json` and the manifest, as they are, of a bundle that this hf_gqa is not too old for."""
    if not folder.is_dir():
        moved = replaced_by_a_killed_run(folder)
        where = f", but {moved} is where a killed run left it: move it back" if moved else ""
        raise Refusal(f"{folder}: no such folder{where}. Give the folder of a bundle.")
    config = _read_json(folder / CONFIG_FILE)
    model_type, path = config.get("model_type"), folder / MANIFEST_FILE
    if not str(model_type).startswith(OWN_PREFIX):
        what = "a native student, which runs" if path.is_file() else "no bundle of hf_gqa: it runs"
        raise Refusal(
            f"{folder}: is {what} as the class that transformers has for {model_type!r}. There is no code to refresh."
        )
    if not path.is_file():
        raise Refusal(
            f"{path}: missing, as in bundles that were saved from memory, so its code cannot be compared with what was "
            f"shipped. Import hf_gqa, load the folder without trust_remote_code and save it: that writes the code of today."
        )
    recorded = _read_json(path)
    _check_not_newer(folder, config, recorded)
    if recorded.get("export") != "bundle":
        raise Refusal(f"{path}: export = {recorded.get('export')!r}, which has no code. Give the folder of a bundle.")
    return config, recorded


def _read_json(path: Path) -> dict:
    if not path.is_file():
        raise Refusal(f"{path}: missing, so the folder is no bundle. Give a folder that hf-gqa convert wrote.")
    found = read_json(path, "Restore it from where the bundle came from.")
    if not isinstance(found, dict):
        raise Refusal(f"{path}: holds {type(found).__name__}, expected an object. Restore it.")
    return found


def _written_by(config: dict, recorded: dict) -> dict:
    """The versions that wrote the code: the configuration says it of itself, the manifest may be older."""
    refreshed = recorded.get("refreshed")
    last = refreshed[-1]["to"] if refreshed else recorded.get("versions")
    versions = {name: last.get(name) for name in ("hf_gqa", "transformers")} if isinstance(last, dict) else {}
    own = config.get(OWN_KEY)
    return versions | ({"hf_gqa": own["version"]} if isinstance(own, dict) and "version" in own else {})


def _check_not_newer(folder: Path, config: dict, recorded: dict) -> None:
    try:
        stated = [_written_by(config, recorded), _written_by({}, recorded)]
        newest = max(Version(versions["hf_gqa"]) for versions in stated)
    except (ValueError, KeyError, TypeError, AttributeError, IndexError):  # InvalidVersion is a ValueError
        raise Refusal(
            f"{folder}: neither {MANIFEST_FILE} nor {CONFIG_FILE} says which hf_gqa wrote it. Restore them from where the "
            f"bundle came from."
        ) from None
    if newest > Version(native_call.VERSION):
        raise Refusal(
            f"{folder}: written by hf_gqa {newest}, and this is {native_call.VERSION}, which has only older code. Install "
            f"hf_gqa >= {newest}."
        )


def _family(folder: Path, config: dict) -> Family:
    name = config["model_type"].removeprefix(OWN_PREFIX)
    if name not in FAMILIES.names():
        known = ", ".join(f"{OWN_PREFIX}{known}" for known in FAMILIES.names())
        raise Refusal(
            f"{folder / CONFIG_FILE}: model_type = {config['model_type']!r} is none that hf_gqa {native_call.VERSION} has "
            f"code for. Known: {known}. Install the hf_gqa that wrote it."
        )
    return load_family(name)


def _check_links(folder: Path) -> None:
    for path in folder.rglob("*"):
        name = path.relative_to(folder).as_posix()
        target = Path(os.path.realpath(path))  # which, unlike resolve, bears a link that leads to itself
        if path.is_symlink() and not target.is_relative_to(folder.resolve()):
            raise Refusal(
                f"{folder}: '{name}' is a link to {target}, outside the bundle, as in the cache of the Hub. Copy the "
                f"folder with what its links lead to (cp -rL), then refresh the copy."
            )
        if not (path.is_file() or path.is_dir()):
            raise Refusal(f"{folder}: '{name}' is neither a file nor a folder. Remove it.")


def _auto_map(family: Family) -> dict[str, str]:
    """As the configuration class of the family writes it."""
    classes = {"AutoConfig": family.config_class, "AutoModel": family.base_class, **family.head_classes}
    return {key: f"{own.__module__.rpartition('.')[2]}.{own.__name__}" for key, own in classes.items()}


def _renamed_classes(folder: Path, config: dict, family: Family, model_class: str) -> Callable[[str], str]:
    """Name of a class of the bundle -> its name here: that which the same Auto class loads."""
    now = {key: where.rpartition(".")[2] for key, where in _auto_map(family).items()}
    before = config["auto_map"] if isinstance(config.get("auto_map"), dict) else {}
    names = {name: name for name in now.values()}
    for key, where in before.items():
        if key in now and isinstance(where, str):
            names.setdefault(where.rpartition(".")[2], now[key])
    architectures = config.get("architectures")
    for name in (model_class, *(architectures if isinstance(architectures, list) else ())):
        if not isinstance(name, str) or name not in names:
            raise Refusal(
                f"{folder}: is a {name}, which hf_gqa {native_call.VERSION} does not have. Use one of {', '.join(names)}, or "
                f"the hf_gqa that wrote it."
            )
    return names.__getitem__


def _config_changes(config: dict, family: Family, renamed: Callable[[str], str]) -> dict[str, tuple]:
    wanted = {"auto_map": _auto_map(family), OWN_KEY: json.loads(json.dumps(native_call.tested_with()))}
    if isinstance(config.get("architectures"), list):
        wanted["architectures"] = [renamed(name) for name in config["architectures"]]
    return {key: (config.get(key), value) for key, value in sorted(wanted.items()) if config.get(key) != value}


def _released_code(manifest: Manifest) -> dict[str, set[str]]:
    """File name -> hashes of it that some hf_gqa shipped, as far as is known here."""
    released: dict[str, set[str]] = {}
    for files in (*RELEASED_CODE.values(), manifest.code_sha256 or {}):
        for name, sha256 in files.items():
            released.setdefault(name, set()).add(sha256)
    return released


def _file_changes(folder: Path, model_type: str) -> tuple[FileChange, ...]:
    code = [*folder.rglob("*.py"), *(folder / GENERATION_CODE).rglob("*"), folder / GENERATION_CODE]
    before = {path.relative_to(folder).as_posix(): path for path in code if path.is_file()}
    after = {path.name: path for path in runtime_files(model_type)}
    changes = []
    for file in sorted(before.keys() | after.keys()):
        sides = [where.get(file) for where in (before, after)]
        hashes = [None if path is None else file_sha256(path) for path in sides]
        sizes = [None if path is None else path.stat().st_size for path in sides]
        if hashes[0] != hashes[1]:
            names = ("sha256_before", "sha256_after", "bytes_before", "bytes_after")
            changes.append(FileChange(file=file, **dict(zip(names, (*hashes, *sizes), strict=True))))
    return tuple(changes)


def _check_replaceable(folder: Path) -> None:
    resolved, here = folder.resolve(), Path.cwd()
    if resolved in (here, *here.parents):
        raise Refusal(
            f"{folder}: you are in this folder, and a renewed one takes its place. Change to another folder and give the path."
        )
    for path in (resolved.parent, resolved, *(path for path in resolved.rglob("*") if path.is_dir())):
        if not os.access(path, os.R_OK | os.W_OK | os.X_OK):
            reason = "may not be read and written to. Nothing was changed: get permission, or refresh a copy"
            raise PermissionError(errno.EACCES, reason, str(path))


def _listing(folder: Path) -> dict[Path, tuple]:
    """What tells whether somebody changed a file, added one or removed one."""
    stats = {path: path.lstat() for path in folder.rglob("*") if not path.is_dir()}
    return {path: (stat.st_ino, stat.st_size, stat.st_mtime_ns) for path, stat in stats.items()}


def _write(plan: RefreshPlan, staging: Path) -> None:
    """The renewed bundle into an empty folder."""
    removed = {change.file for change in plan.files if change.sha256_after is None}
    renewed = {change.file for change in plan.files} - removed
    for path in sorted(plan.folder.rglob("*")):
        name = path.relative_to(plan.folder)
        if name.parts[0] == GENERATION_CODE or name.as_posix() in removed | renewed | {CONFIG_FILE, MANIFEST_FILE}:
            continue
        if path.is_dir() and not path.is_symlink():
            (staging / name).mkdir()
        else:
            _link(path, staging / name)
    for path in runtime_files(plan.model_type):
        if path.name in renewed:
            shutil.copyfile(path, staging / path.name)
    changed = {key: after for key, (_, after) in plan.config.items()}
    _write_changed(plan.folder / CONFIG_FILE, staging, changed)
    record = {"from": plan.versions_before, "to": plan.versions_after}
    recorded = {
        "code_sha256": runtime_sha256(plan.model_type),
        "model_class": plan.model_class,
        "refreshed": [*(Manifest.read(plan.folder).refreshed or ()), record],
    }
    _write_changed(plan.folder / MANIFEST_FILE, staging, recorded)


def _write_changed(path: Path, staging: Path, changes: dict) -> None:
    (staging / path.name).write_bytes(with_members(read_text(path), changes).encode("utf-8"))


def _link(path: Path, copy: Path) -> None:
    """The same file under a second name, which takes no room; a copy where the file system has no such names."""
    try:
        os.link(path, copy, follow_symlinks=False)
    except (OSError, NotImplementedError):
        shutil.copy2(path, copy, follow_symlinks=False)
