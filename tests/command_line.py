"""The command in the process of the tests, and what it must say when it refuses."""

from pathlib import Path

from transformers.utils import logging
from typer.testing import CliRunner

from hf_gqa.cli import app

from .donor_folders import files_of


def run_cli(*arguments):
    """The command in this process; transformers' logging, which the command quietens, is put back."""
    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    try:
        return CliRunner().invoke(app, [str(argument) for argument in arguments])
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()


def assert_one_message(result, exit_code: int, *words: str) -> None:
    """The exit code, no traceback, and one line on stderr that holds all the words."""
    assert isinstance(result.exception, SystemExit), repr(result.exception)
    assert result.exit_code == exit_code, result.stderr
    assert result.stderr.startswith("hf-gqa: ") and result.stderr.count("\n") == 1, result.stderr
    for word in words:
        assert word in result.stderr, f"{word!r} is not in {result.stderr!r}"


def assert_refused(donor, tmp_path: Path, *words: str, options: tuple = (), heads: int | str = 2) -> None:
    """`convert` refuses with these words, and leaves the disk as it was."""
    output = tmp_path / "new" / "student"
    before = files_of(tmp_path)
    result = run_cli("convert", donor, output, "--num-key-value-heads", heads, *options)
    assert_one_message(result, 2, *words)
    assert files_of(tmp_path) == before
    assert not output.parent.exists()
