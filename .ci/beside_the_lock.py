"""Prints what is installed beside what the lock pins; run by the Python of the environment in question."""

import re
from importlib.metadata import distributions
from pathlib import Path


LOCK = Path(__file__).parents[1] / "requirements.lock"
ALWAYS = ("transformers", "torch", "accelerate", "peft", "datasets", "huggingface-hub")


def normalised(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def main() -> None:
    pins = [line.split("==") for line in LOCK.read_text(encoding="utf-8").splitlines() if "==" in line]
    locked = dict(pins)
    installed = {normalised(found.name): found.version for found in distributions()}
    differ = {name for name in locked if name in installed and installed[name].partition("+")[0] != locked[name]}
    print(f"{'':24}{'lock':16}installed")
    for name in [*ALWAYS, *sorted(differ - {*ALWAYS, "pip", "setuptools"})]:
        here = installed.get(name, "not installed")
        print(f"{name:24}{locked[name]:16}{here}{'  <- differs' if name in differ else ''}")


if __name__ == "__main__":
    main()
