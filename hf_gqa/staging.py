"""Write a folder beside its final place and rename it when it is complete."""

import ctypes
import hashlib
import os
import shutil
import stat
import tempfile
import time
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from .refusal import Refusal


try:
    import fcntl
except ImportError:  # not POSIX: leftovers of killed runs are then left alone
    fcntl = None

RENAME_EXCHANGE = 2
AT_FDCWD = -100
PARTIAL, NEW = ".partial-", ".new-"  # of a run that writes; of one that is about to
NEW_SECONDS = 60  # after which that is the name of a killed one
REPLACED = "replaced"  # what a folder is called while another takes its place in two steps


def check_apart(output: Path, read_only: Path, whose: str) -> None:
    """Refuse an output that touches a folder which is only read."""
    resolved, read = output.resolve(), read_only.resolve()
    if resolved == read or resolved in read.parents or read in resolved.parents:
        raise Refusal(f"{output}: overlaps the {whose}'s folder {read_only}. Write the student somewhere else.")


def check_output(output: Path, overwrite: bool, donor_folder: Path | None) -> None:
    """Refuse an output that exists, that is not ours to replace, or that touches the donor."""
    if donor_folder is not None:
        check_apart(output, donor_folder, "donor")
    if _is_there(output, overwrite) and any(output.iterdir()) and not (output / "config.json").is_file():
        raise Refusal(
            f"{output}: holds no config.json, so it is no model that --overwrite could replace. Remove it first."
        )


def check_folder_of(output: Path, overwrite: bool, files: Collection[str], what: str) -> None:
    """Refuse an output that exists, or that is not ours to replace.

    Args:
        files: names of all that a folder of this kind holds.
        what: such a folder's name in messages, such as "report".
    """
    there = output.iterdir() if _is_there(output, overwrite) else ()
    foreign = sorted(path.name for path in there if path.name not in files)
    if foreign:
        raise Refusal(f"{output}: holds '{foreign[0]}', which is no {what}'s, so --overwrite would lose it. Move it.")


def _is_there(output: Path, overwrite: bool) -> bool:
    """Whether a folder would be replaced; raises Refusal if what is there is none, or may not be."""
    if not output.exists():
        return False
    if not output.is_dir():
        raise Refusal(f"{output}: exists and is not a folder. Give another output.")
    if not overwrite:
        raise Refusal(f"{output}: exists. Give another output, or --overwrite to replace it.")
    return True


@contextmanager
def staged_folder(output: Path, overwrite: bool, keep_permissions: bool = False) -> Iterator[Path]:
    """A fresh folder that becomes `output`, replacing it at one stroke, if the block ends without an exception.

    Otherwise the folder is removed and `output` is as it was. What a killed run left behind is removed by the next one.

    Args:
        keep_permissions: what has the name of something in the old `output` gets the permissions of that.
    """
    output = output.resolve()
    made = [parent for parent in output.parents if not parent.exists()]
    output.parent.mkdir(parents=True, exist_ok=True)
    remove_leftovers(output)
    staging, lock = _locked_partial(output, tempfile.mkdtemp)
    try:
        yield staging
        _flush(staging, output if keep_permissions else None)
        _publish(staging, output, overwrite)
    finally:
        shutil.rmtree(staging, ignore_errors=True)
        _unlock(lock)
        with suppress(OSError):
            for parent in made:  # those that are empty, because nothing came of it
                parent.rmdir()


def _publish(staging: Path, output: Path, overwrite: bool) -> None:
    """Put `staging` in the place of `output`; what was there before is then in `staging`, or gone."""
    if not output.exists():
        os.rename(staging, output)
    elif not overwrite:
        raise Refusal(f"{output}: exists now, and did not when the conversion began. Nothing was replaced.")
    elif not _exchange(staging, output):
        retired, lock = _locked_partial(output, tempfile.mkdtemp)
        os.rename(output, retired / REPLACED)
        try:
            os.rename(staging, output)
        except BaseException:
            os.rename(retired / REPLACED, output)
            raise
        finally:
            shutil.rmtree(retired, ignore_errors=True)
            _unlock(lock)
    flush(output.parent)


def _exchange(one: Path, other: Path) -> bool:
    """Swap two folders atomically where the system can (Linux)."""
    try:
        renameat2 = ctypes.CDLL(None, use_errno=True).renameat2
    except (OSError, AttributeError, TypeError):
        return False
    return renameat2(AT_FDCWD, os.fsencode(one), AT_FDCWD, os.fsencode(other), RENAME_EXCHANGE) == 0


def _locked_partial(output: Path, make: Callable[..., str]) -> tuple[Path, int | None]:
    """A fresh folder or file beside `output` that no `remove_leftovers` takes for one of a killed run; and its lock.

    It has the name of a partial one only once it is locked.

    Args:
        make: `tempfile.mkdtemp`, or what makes a file as that makes a folder.
    """
    while True:
        lock = None
        new = Path(make(prefix=f".{output.name}{NEW}", dir=output.parent))
        partial = new.with_name(new.name.replace(NEW, PARTIAL))
        with suppress(FileNotFoundError):  # somebody took it for an old one
            lock = _lock(new)
            os.rename(new, partial)
            return partial, lock
        _unlock(lock)


def _lock(path: Path) -> int | None:
    """An open, locked handle; None if another process holds it, or locks are not to be had."""
    if fcntl is None:
        return None
    handle = os.open(path, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(handle)
        return None
    return handle


def _unlock(lock: int | None) -> None:
    if lock is not None:
        os.close(lock)


def _beside(output: Path, kind: str) -> list[Path]:
    return [path for path in output.parent.iterdir() if path.name.startswith(f".{output.name}{kind}")]


def remove_leftovers(output: Path) -> None:
    """What killed runs that wrote `output`, a folder or a file, left beside it; that of a live one stays."""
    output = output.resolve()
    for path in _beside(output, PARTIAL):
        with suppress(FileNotFoundError):
            handle = _lock(path)
            if handle is not None:
                shutil.rmtree(path, ignore_errors=True) if path.is_dir() else path.unlink()
                os.close(handle)
    for path in _beside(output, NEW):  # empty, and by now locked and renamed if its run lives
        with suppress(OSError):
            if time.time() - path.stat().st_mtime > NEW_SECONDS:
                path.rmdir() if path.is_dir() else path.unlink()


def replaced_by_a_killed_run(output: Path) -> Path | None:
    """Where `output` is if a run was killed after it had moved it away, and before the new one was in its place."""
    output = output.resolve()
    if output.exists() or not output.parent.is_dir():
        return None
    return next((path / REPLACED for path in _beside(output, PARTIAL) if (path / REPLACED).is_dir()), None)


def _flush(folder: Path, old: Path | None) -> None:
    """Everything to disk, with the permissions that it has in the old folder, or those that the user's umask gives."""
    mask = _umask()
    for path in (*sorted(folder.rglob("*")), folder):
        before = old / path.relative_to(folder) if old is not None else None
        if before is not None and before.exists():
            _chmod(path, stat.S_IMODE(before.stat().st_mode))
        elif path.is_file() or path == folder:
            _chmod(path, (0o666 if path.is_file() else 0o777) & ~mask)
        if path.is_file() or path == folder:
            flush(path)


def _chmod(path: Path, mode: int) -> None:
    """Not where it has that mode: a file that is linked from elsewhere may be somebody else's."""
    if stat.S_IMODE(path.stat().st_mode) != mode:
        path.chmod(mode)


def flush(path: Path) -> None:
    """A file's bytes, or a folder's entries, to disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def publish_file(partial: Path, file: Path) -> None:
    """The file has its name only when its bytes are on disk."""
    flush(partial)
    os.replace(partial, file)
    flush(file.parent)


@contextmanager
def staged_file(file: Path) -> Iterator[Path]:
    """An empty file beside `file` that takes its place if the block ends without an exception, and is removed otherwise."""
    file.parent.mkdir(parents=True, exist_ok=True)
    remove_leftovers(file)
    partial, lock = _locked_partial(file, _empty_file)
    try:
        yield partial
        partial.chmod(0o666 & ~_umask())
        publish_file(partial, file)
    finally:
        partial.unlink(missing_ok=True)
        _unlock(lock)


def _empty_file(prefix: str, dir: Path) -> str:
    handle, name = tempfile.mkstemp(prefix=prefix, dir=dir)
    os.close(handle)
    return name


def replace_file(file: Path, text: str) -> None:
    """Write beside its final place and rename, so that it is there whole or not at all."""
    with staged_file(file) as partial:
        partial.write_text(text, encoding="utf-8", newline="")


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def file_sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def git_blob_sha1(path: Path) -> str:
    """What git calls a file of this content."""
    digest = hashlib.sha1(b"blob %d\0" % path.stat().st_size)
    with open(path, "rb") as file:
        return hashlib.file_digest(file, lambda: digest).hexdigest()
