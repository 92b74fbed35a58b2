"""Python in a process of its own that has imported nothing; warm_process.py has faster ones."""

import json
import os
import subprocess
import sys
from pathlib import Path

import hf_gqa


PACKAGE = Path(hf_gqa.__file__).parent
TESTS = Path(__file__).parent


def run_python(code: str, *arguments, package: Path = PACKAGE, cwd: Path | None = None) -> dict:
    """The JSON that `code` prints last, in a process of its own that finds hf_gqa and these tests."""
    run = subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)],
        env=os.environ | {"PYTHONPATH": f"{package.parent}{os.pathsep}{TESTS.parent}", "HF_HUB_OFFLINE": "1"},
        cwd=cwd,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert run.returncode == 0, run.stderr
    return json.loads(run.stdout.strip().splitlines()[-1])
