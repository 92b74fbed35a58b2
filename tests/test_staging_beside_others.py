"""Writers beside each other, and what killed ones left."""

import os
import subprocess
import sys

from hf_gqa.staging import replace_file, staged_file


def test_no_writer_removes_the_fresh_folder_or_file_of_another(tmp_path):
    """Between making a folder and locking it nobody may take it for a dead run's: many at once, all must finish."""
    script = """
import sys
from pathlib import Path
from hf_gqa.staging import replace_file, staged_folder
here, number = Path(sys.argv[1]), sys.argv[2]
for turn in range(40):
    with staged_folder(here / "student", overwrite=True) as staging:
        (staging / "config.json").write_text(number * 1000)
    replace_file(here / "recipe.yaml", number * 1000)
"""
    writers = [
        subprocess.Popen([sys.executable, "-c", script, str(tmp_path), number], stderr=subprocess.PIPE, text=True)
        for number in "1234"
    ]
    for writer in writers:
        assert writer.communicate(timeout=240)[1] == "" and writer.returncode == 0
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]
    for file in (tmp_path / "student/config.json", tmp_path / "recipe.yaml"):
        assert file.read_text() in [number * 1000 for number in "1234"]


def test_file_of_a_killed_writer_is_removed_by_the_next_and_that_of_a_live_one_is_not(tmp_path):
    dead, other, young = (tmp_path / name for name in (".card.md.partial-x", ".card.partial-x", ".card.md.new-x"))
    for file in (dead, other, young):
        file.write_text("half")
    old = tmp_path / ".card.md.new-y"
    old.touch()
    os.utime(old, (1, 1))
    with staged_file(tmp_path / "card.md") as live:
        replace_file(tmp_path / "card.md", "other")
        assert live.exists()
        live.write_text("mine")
    assert (tmp_path / "card.md").read_text() == "mine"
    assert not dead.exists() and not old.exists() and other.exists() and young.exists()
