"""The examples and the README's code blocks run, offline, as a newcomer would run them."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from hf_gqa.evaluate.page.page import make_page
from hf_gqa.evaluate.report import Report
from hf_gqa.export.card_lint import lint_card
from tests import warm_process


REPOSITORY = Path(__file__).resolve().parents[1]
EXAMPLES = REPOSITORY / "examples"
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not EXAMPLES.is_dir(), reason="the tests run without the checkout's examples"),
]


@pytest.fixture(scope="module")
def empty_folder(tmp_path_factory):
    """An empty folder that sees the examples as the checkout does."""
    folder = tmp_path_factory.mktemp("newcomer")
    (folder / "examples").symlink_to(EXAMPLES)
    return folder


def printed_by(done: subprocess.CompletedProcess) -> str:
    assert done.returncode == 0, f"{shlex.join(done.args)}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def run(command: list[str], folder: Path) -> str:
    """`python *command` or, where that begins so, `hf-gqa ...`."""
    given = ["-m", "hf_gqa.cli", *command[1:]] if command[0] == "hf-gqa" else command
    return printed_by(warm_process.run(given, folder))


def test_demo_and_command_as_installed(empty_folder):
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    how = {"cwd": empty_folder, "env": environment, "capture_output": True, "text": True}
    printed = printed_by(subprocess.run([sys.executable, "examples/demo.py"], **how))
    assert "12,288 B" in printed and "1,536 B" in printed
    assert "wrecks the untrained student" in printed
    assert "5.05M" in printed_by(subprocess.run(["hf-gqa", "inspect", "examples/donor"], **how))


def test_convert_in_memory(empty_folder):
    assert "the same logits: True" in run(["examples/convert_in_memory.py"], empty_folder)


def test_generate(empty_folder):
    printed = run(["examples/generate.py"], empty_folder)
    assert "both caches write the same: True" in printed


def test_convert_on_disk_then_push(empty_folder):
    printed = run(["examples/convert_on_disk.py"], empty_folder)
    assert "equals the donor's merged heads" in printed and "FAILED" not in printed
    printed = run(["examples/push.py"], empty_folder)
    assert "conversion_manifest.json" in printed and (empty_folder / "pushed/prose-gqa-2/model.safetensors").is_file()


@pytest.mark.parametrize("example", ["uptrain_trainer", "uptrain_distilled", "uptrain_lora"])
def test_uptraining(example, empty_folder):
    printed = run([f"examples/{example}.py"], empty_folder)
    before, after = map(float, re.search(r"held-out loss: ([\d.]+) -> ([\d.]+)", printed).groups())
    assert after < before - 1


def test_heal(empty_folder):
    printed = run(["examples/heal.py", "16384"], empty_folder)
    assert float(re.search(r"gap closed: ([\d.]+)%", printed)[1]) > 60
    assert (empty_folder / "students/healed/uptraining.json").is_file()


def test_examples_are_short():
    for example in EXAMPLES.glob("*.py"):
        assert len(example.read_text().splitlines()) < 80, example


def blocks(language: str) -> list[str]:
    readme = (REPOSITORY / "README.md").read_text(encoding="utf-8")
    return re.findall(rf"^```{language}\n(.*?)^```", readme, flags=re.MULTILINE | re.DOTALL)


def test_readme_blocks(tmp_path):
    (tmp_path / "examples").symlink_to(EXAMPLES)
    commands = [line for block in blocks("bash") for line in block.splitlines() if line.startswith("hf-gqa ")]
    assert len(commands) >= 3 and len(blocks("python")) >= 2
    for command in commands:
        run(shlex.split(command, comments=True), tmp_path)
    for block in blocks("python"):
        run(["-c", block], tmp_path)


def test_recipe(empty_folder):
    """With a smaller budget, for the same stations."""
    recipe = (EXAMPLES / "recipe.yaml").read_text()
    small = recipe.replace("163840", "4096").replace("32768", "2048").replace("[1, 16]", "[1]")
    small = small.replace("512", "64").replace("[128, 480]", "[16, 32]")
    small = small.replace("evaluate:\n", "evaluate:\n  retrieval_samples: 2\n")
    (empty_folder / "small.yaml").write_text(small)
    printed = run(["hf-gqa", "run", "small.yaml"], empty_folder)
    assert "The cache is 4x smaller" in printed
    assert (empty_folder / "students/healed-gqa-2/student/README.md").is_file()


def test_committed_cards_are_borne_out_by_their_reports():
    cards = sorted((REPOSITORY / "model_cards").glob("*-gqa-*.md"))
    assert cards
    for card in cards:
        report = Report.read(EXAMPLES / card.stem)
        assert lint_card(card.read_text(encoding="utf-8"), report) == []
        assert (EXAMPLES / card.stem / "report.html").read_text(encoding="utf-8") == make_page(report)
