"""Rows of tokens to look at a donor with: from text files, or from what the donor itself writes.

Shapes: N rows, L tokens of a row.
"""

import tempfile
from collections.abc import Sequence
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase

from ..convert.calibration import Calibration, calibrate, fingerprint, observes
from ..convert.donor import Donor
from ..convert.plan import ConversionPlan
from ..convert.stored_model import loaded_whole, why_loaded_whole
from ..convert.student import load_tokenizer
from ..refusal import Refusal
from ..text.packing import packed_rows
from ..text.sampled import sampled_rows
from ..text.source import TextSource, keep_bars_on_terminals, open_documents


DEFAULT_TOKENS = 65_536
MOST_ROW_TOKENS = 512
SAVED = ".safetensors"


def dataset_source(given: str) -> TextSource:
    """'NAME', 'NAME:CONFIGURATION' or 'NAME:CONFIGURATION:SPLIT' -> a dataset that is streamed."""
    name, *others = given.split(":")
    if not name or len(others) > 2:
        raise Refusal(
            f"calibration dataset '{given}': is no dataset. Give NAME, NAME:CONFIGURATION or NAME:CONFIGURATION:SPLIT."
        )
    configuration, split = [*others, "", ""][:2]
    return TextSource(
        dataset_name=name, dataset_config_name=configuration or None, dataset_split=split or "train", streaming=True
    )


def make_calibration(
    donor: Donor,
    files: Sequence[str | Path] = (),
    tokens: int = DEFAULT_TOKENS,
    seed: int = 0,
    dataset: TextSource | None = None,
) -> Calibration:
    """Calibrate a donor on disk with what `calibration_text` gives."""
    given = calibration_text(donor, files, tokens, seed, dataset)
    return given if isinstance(given, Calibration) else calibrate(donor, None, given)


def calibration_text(
    donor: Donor,
    files: Sequence[str | Path] = (),
    tokens: int = DEFAULT_TOKENS,
    seed: int = 0,
    dataset: TextSource | None = None,
) -> Calibration | torch.Tensor:
    """Rows of tokens for a donor on disk, or the calibration that was made of some before.

    Args:
        files: text files or folders, as for uptraining; or one `.safetensors` file that a calibration was written to;
            none: the donor, loaded whole, writes its own text.
        tokens: most to look at; of longer files, rows from all over.
        seed: of the sampled text.
        dataset: in place of files; of a streamed one, the first rows.

    Raises:
        Refusal: unreadable text, no tokens, or a donor that predicts none.
    """
    keep_bars_on_terminals()
    if files and dataset is not None:
        raise Refusal("calibration: files and a dataset are given. Give one of them.")
    if is_saved(files):
        if len(files) > 1:
            raise Refusal(f"calibration: {SAVED} files are calibrations of their own. Give one, or text files.")
        return Calibration.read(Path(files[0]))
    if tokens < 1:
        raise Refusal(f"calibration_tokens = {tokens}: is not a positive number. Use some ten thousand.")
    if not donor.model_class.__name__.endswith(("ForCausalLM", "LMHeadModel")) and not (files or dataset):
        raise Refusal(
            f"calibration: a {donor.model_class.__name__} predicts no tokens, so it cannot write its own text. Give text files."
        )
    tokenizer = load_tokenizer(donor.folder)
    length = min(MOST_ROW_TOKENS, donor.longest_tokens or MOST_ROW_TOKENS)
    if not (files or dataset):
        return _written_rows(donor, tokenizer, tokens, length, seed)
    return _rows_of(dataset or TextSource(train_file=tuple(map(str, files))), tokenizer, tokens, length)


def is_saved(files: Sequence[str | Path]) -> bool:
    """Whether a calibration is given in place of text."""
    return any(Path(file).suffix == SAVED for file in files)


def memory_note(donor: Donor, plan: ConversionPlan, files: Sequence[str | Path], is_text: bool) -> str | None:
    """Why calibrating takes the memory of the whole donor, if it does.

    Args:
        is_text: whether there are files or a dataset; otherwise the donor writes its own text.
    """
    if not is_text:
        return "The donor is loaded whole, to write its own text. Text files take the memory of one layer."
    if plan.shared_init == "fit":
        return "Donor and student are held whole in memory while borrowers are fitted."
    reason = None if is_saved(files) and not observes(plan) else why_loaded_whole(donor)
    return reason and f"The donor is loaded whole for its calibration: {reason}."


def _rows_of(source: TextSource, tokenizer: PreTrainedTokenizerBase, tokens: int, length: int) -> torch.Tensor:
    rows = packed_rows(open_documents(source, tokenizer), tokenizer, length, attend_across_documents=True)
    wanted = -(-tokens // length)
    if source.streaming:
        return _tokens(islice(rows, wanted))
    picked = np.linspace(0, len(rows) - 1, min(len(rows), wanted)).round().astype(int)
    return _tokens(rows.select(picked.tolist()))


def _written_rows(
    donor: Donor, tokenizer: PreTrainedTokenizerBase, tokens: int, length: int, seed: int
) -> torch.Tensor:
    model = loaded_whole(donor)
    with tempfile.TemporaryDirectory() as scratch:
        rows = sampled_rows(
            model,
            tokenizer,
            Path(scratch) / "text",
            donor_id=fingerprint(donor),
            tokens=tokens,
            sequence_length=length,
            seed=seed,
            batch_size=min(32, -(-tokens // length)),
        )
        return _tokens(rows)


def _tokens(rows) -> torch.Tensor:
    return torch.from_numpy(np.stack([row["input_ids"] for row in rows]))
