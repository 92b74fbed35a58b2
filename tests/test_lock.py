"""What the lock files pin: everything, exactly, and nothing that only one machine can find."""

import json
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement


REPOSITORY = Path(__file__).resolve().parents[1]
NEWEST, OLDEST = "requirements.lock", "requirements-oldest.lock"
PIN = re.compile(r"([a-z0-9]+(?:-[a-z0-9]+)*)==([0-9][0-9a-z.]*)")
WITH_CUDA = re.compile(r"(cuda|nvidia)-.*|triton")  # what torch brings along wherever pip finds no build without CUDA


def normalised(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def pins_in(text: str) -> dict[str, str]:
    """Version by name; ValueError for a line that is neither a comment nor an exact pin, or that stands twice."""
    pins = {}
    for line in text.splitlines():
        if not line or line.startswith("#"):
            continue
        pin = PIN.fullmatch(line)
        if not pin or pin[1] in pins or WITH_CUDA.fullmatch(pin[1]):
            raise ValueError(f"{line!r} is no exact pin of its own. Renew the locks with `make lock`.")
        pins[pin[1]] = pin[2]
    return pins


def read(name: str) -> str:
    return (REPOSITORY / name).read_text(encoding="utf-8")


def not_pinned(requirements: list[str], pins: dict[str, str]) -> list[str]:
    """Those of the requirements for which there is no pin, or one that they do not allow."""
    asked = {text: Requirement(text) for text in requirements}
    versions = {text: pins.get(normalised(asks.name)) for text, asks in asked.items()}
    return [text for text, asks in asked.items() if not versions[text] or versions[text] not in asks.specifier]


def not_as_locked(pins: dict[str, str], installed: dict[str, str]) -> list[str]:
    """What is installed beside hf_gqa in another version than the lock's, not at all, or besides."""
    beside = {name: version for name, version in installed.items() if not WITH_CUDA.fullmatch(name)}
    beside.pop("hf-gqa", None)
    names = sorted(name for name in pins.keys() | beside.keys() if pins.get(name) != beside.get(name))
    return [f"{name}: {pins.get(name)} locked, {beside.get(name)} installed" for name in names]


def project() -> dict:
    return tomllib.loads(read("pyproject.toml"))


def transformers_range() -> Requirement:
    (found,) = (text for text in project()["project"]["dependencies"] if text.startswith("transformers"))
    return Requirement(found)


def test_both_pin_one_torch():
    """`make test-oldest` leaves out what depends on torch alone."""
    assert pins_in(read(NEWEST))["torch"] == pins_in(read(OLDEST))["torch"]


@pytest.mark.parametrize("name", [NEWEST, OLDEST])
def test_every_line_is_an_exact_pin_that_any_machine_can_find(name):
    text = read(name)
    assert len(pins_in(text)) > 50
    assert "/" not in text and "Python 3.11\n" in text, "made by another Python, or of a place"


@pytest.mark.parametrize(
    "line",
    [
        *("torch==2.13.0+cpu", "torch>=2.13.0", "torch", "torch==2.*", "torch[opt]==2.13.0", "triton==3.7.1"),
        *("--extra-index-url https://a.b/simple", "--find-links /wheels", "-c constraints.txt", "-e ."),
        *("torch @ file:///wheels/torch.whl", "https://a.b/torch.whl", "torch==2.13.0 --hash=sha256:00"),
        *("  torch==2.13.0", "numpy==2.4.6"),
    ],
)
def test_any_other_line_is_noticed(line):
    with pytest.raises(ValueError, match="no exact pin of its own"):
        pins_in(f"# comment\n\nnumpy==2.4.6\n{line}\n")


def test_every_direct_dependency_is_locked():
    stated, extras = project()["project"], project()["project"]["optional-dependencies"]
    built_by = project()["build-system"]["requires"]
    held = [line for line in read("constraints.txt").splitlines() if not line.startswith("#")]
    asked = [*stated["dependencies"], *built_by, *held, *(text for extra in extras.values() for text in extra)]
    assert not_pinned(asked, pins_in(read(NEWEST))) == []
    asked = [*stated["dependencies"], *built_by, *held, "pytest-xdist", "hypothesis"]
    assert not_pinned(asked, pins_in(read(OLDEST))) == []


def test_dependency_that_is_not_locked_is_noticed():
    pins = {"huggingface-hub": "2.4.0", "pytest": "9.2.0"}
    assert not_pinned(["huggingface_hub>=1.0", "peft", "pytest<9.2"], pins) == ["peft", "pytest<9.2"]


def test_readme_names_the_two_releases_of_transformers_that_are_tested():
    versions = [pins_in(read(name))["transformers"] for name in (OLDEST, NEWEST)]
    oldest, newest = (".".join(version.split(".")[:2]) for version in versions)
    assert all(version in transformers_range().specifier for version in versions)
    assert f"({oldest} and {newest} are tested)" in read("README.md"), "say there what the locks test"


def test_oldest_lock_is_of_the_lowest_transformers():
    (lowest,) = (bound.version for bound in transformers_range().specifier if bound.operator == ">=")
    assert pins_in(read(OLDEST))["transformers"] == lowest


def test_installed_is_what_the_lock_says():
    lock = Path(sys.prefix) / "locked"  # written by the Makefile once all of it is installed
    if not lock.is_file():
        pytest.skip(f"{sys.prefix} was not installed from a lock; `make test` makes an environment that is")
    # in a process of its own: setuptools, once imported, shows packages that it carries as if they were installed
    listing = "from importlib.metadata import distributions as d; import json; print(json.dumps([[p.name, p.version] for p in d()]))"
    listed = json.loads(
        subprocess.run([sys.executable, "-c", listing], capture_output=True, text=True, check=True).stdout
    )
    installed = {normalised(name): version.partition("+")[0] for name, version in listed}
    assert not_as_locked(pins_in(lock.read_text(encoding="utf-8")), installed) == [], "`make clean` and begin anew"


def test_environment_that_is_not_the_lock_is_noticed():
    installed = {"hf-gqa": "0.1.0", "numpy": "2.4.5", "torch": "2.13.0", "triton": "3.7.1", "six": "1.17.0"}
    assert not_as_locked({"numpy": "2.4.6", "torch": "2.13.0", "peft": "0.21.2"}, installed) == [
        "numpy: 2.4.6 locked, 2.4.5 installed",
        "peft: 0.21.2 locked, None installed",
        "six: None locked, 1.17.0 installed",
    ]
