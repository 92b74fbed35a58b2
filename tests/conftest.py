"""For all tests: tiny models are fastest on one thread, and two workers share the machine."""

import gc
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from tests import warm_process


torch.set_num_threads(1)
SHARED = {file.stem for file in Path(__file__).parent.glob("*.py") if not file.stem.startswith("test_")}
pytest.register_assert_rewrite(*(f"tests.{name}" for name in SHARED - {"__init__", "conftest", "warm_process"}))
# Tensors without values need no random ones: torch would work out the shape of each in Python, a third of a conversion.
ON_META = torch.library.Library("aten", "IMPL")
ON_META.impl("normal_", lambda tensor, *args, **kwargs: tensor, "Meta", allow_override=True)


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
    """What a module makes once is made by one worker (`--dist loadgroup`); all other tests go to whoever is free."""
    donors = sys.modules.get("tests.tiny_donors")  # where no test needs one, none is about families
    for item in items:
        if donors is not None and donors.is_of_another_alone(getattr(item, "callspec", None)):
            item.add_marker("another")
        made = (definitions[-1].scope for definitions in item._fixtureinfo.name2fixturedefs.values())
        if "module" in made:
            item.add_marker(pytest.mark.xdist_group(item.module.__name__))


@pytest.hookimpl(wrapper=True)
def pytest_collection():
    """What is imported and collected stays: neither collecting tests nor Trainer, which often does, looks for garbage there."""
    gc.disable()
    try:
        return (yield)
    finally:
        gc.freeze()
        gc.enable()


def verify_in_warm_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    def run(command: list[str], env: dict, cwd, **how):
        python, isolated, *script = command
        assert (python, isolated) == (sys.executable, "-I")
        return warm_process.run(script, cwd, **env)

    monkeypatch.setattr("hf_gqa.export.verify.subprocess", SimpleNamespace(run=run, DEVNULL=None))


@pytest.fixture
def warm_verification(monkeypatch):
    """`verify` with a fork for its process, which starts in no time; test_verify.py and others have real ones."""
    verify_in_warm_processes(monkeypatch)
