"""Python in processes of their own that need not import torch and transformers again: forks of one that did, and computed nothing.

That one has not imported hf_gqa, so a fork stands for a fresh process with hf_gqa as well as for one without it.
"""

import multiprocessing
import os
import runpy
import subprocess
import sys
import tempfile
from functools import cache
from importlib.util import find_spec
from multiprocessing.forkserver import ensure_running
from pathlib import Path
from unittest import mock

import transformers.dynamic_module_utils
import transformers.utils
import transformers.utils.hub


IMPORTED = ["torch", "transformers.modeling_utils", "transformers.generation.utils", "transformers.trainer", "datasets"]
IMPORTED += ["accelerate", "peft", "pandas", "scipy.optimize", "typer", "pytest", "matplotlib.backends.backend_svg"]
REPOSITORY = Path(__file__).parents[1]
RUNTIME = Path(find_spec("hf_gqa").origin).parent / "runtime"  # found, not imported
FAMILIES = [file.stem.removeprefix("modeling_gqa_") for file in RUNTIME.glob("modeling_gqa_*.py")]
IMPORTED += [f"transformers.models.{name}.modeling_{name}" for name in FAMILIES]  # where there are such
IMPORTED += ["torch.distributed.fsdp", __name__]


@cache
def warm_processes() -> multiprocessing.context.ForkServerContext:
    """Where `Process` starts forks."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(IMPORTED)
    paths = os.pathsep.join([str(REPOSITORY), *filter(None, [os.environ.get("PYTHONPATH")])])
    settings = {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}
    with mock.patch.dict(os.environ, settings):
        ensure_running()
    return context


def become(command: list[str], folder: Path, environment: dict[str, str], output: Path, errors: Path) -> None:
    """What `python *command` is, there."""
    for descriptor, path in ((1, output), (2, errors)):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600), descriptor)
    os.chdir(folder)
    os.environ.update(environment)
    sys.path = [path for path in sys.path if not Path(path, "transformers_modules").is_dir()]  # of who asked for this
    if "HF_MODULES_CACHE" in environment:  # read at import
        for module in (transformers.utils, transformers.utils.hub, transformers.dynamic_module_utils):
            module.HF_MODULES_CACHE = environment["HF_MODULES_CACHE"]
    how, *arguments = command
    sys.argv = ["-c", *arguments[1:]] if how == "-c" else arguments if how == "-m" else command
    if how == "-c":
        exec(compile(arguments[0], "<string>", "exec"), {"__name__": "__main__"})
    elif how == "-m":
        runpy.run_module(arguments[0], run_name="__main__", alter_sys=True)
    else:
        runpy.run_path(how, run_name="__main__")


def start(command: list, folder: Path, output: Path, errors: Path, **environment: str):
    arguments = (list(map(str, command)), folder, environment, output, errors)
    process = warm_processes().Process(target=become, args=arguments)
    process.start()
    return process


def run(command: list, folder: Path, timeout: float = 300, **environment: str) -> subprocess.CompletedProcess:
    """`subprocess.run([sys.executable, *command], ...)` with what it printed."""
    with tempfile.TemporaryDirectory() as scratch:
        files = [Path(scratch) / name for name in ("output.txt", "errors.txt")]
        process = start(command, folder, *files, **environment)
        process.join(timeout)
        process.kill()
        process.join()
        printed = (path.read_text(encoding="utf-8", errors="replace") for path in files)
        return subprocess.CompletedProcess(list(map(str, command)), process.exitcode, *printed)
