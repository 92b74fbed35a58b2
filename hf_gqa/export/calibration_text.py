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

from ..convert.calibration import Calibration, calibrate, fingerprint
from ..convert.donor import Donor
from ..convert.student import load_tokenizer
from ..refusal import Refusal
from ..text.packing import packed_rows
from ..text.sampled import sampled_rows
from ..text.source import TextSource, open_documents


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
    """Calibrate a donor on disk.

    Args:
        files: text files or folders, as for uptraining; or one `.safetensors` file that a calibration was written to;
            none: the donor writes its own text.
        tokens: most to look at; of longer files, rows from all over.
        seed: of the sampled text.
        dataset: in place of files; of a streamed one, the first rows.

    Raises:
        Refusal: unreadable text, no tokens, or a donor that predicts none.
    """
    if files and dataset is not None:
        raise Refusal("calibration: files and a dataset are given. Give one of them.")
    if any(Path(file).suffix == SAVED for file in files):
        if len(files) > 1:
            raise Refusal(f"calibration: {SAVED} files are calibrations of their own. Give one, or text files.")
        return Calibration.read(Path(files[0]))
    if tokens < 1:
        raise Refusal(f"calibration_tokens = {tokens}: is not a positive number. Use some ten thousand.")
    if not donor.model_class.__name__.endswith(("ForCausalLM", "LMHeadModel")) and not (files or dataset):
        raise Refusal(
            f"calibration: a {donor.model_class.__name__} predicts no tokens, so it cannot write its own text. Give text files."
        )
    model = donor.model_class.from_pretrained(donor.folder, config=donor.model_config, dtype="auto").eval()
    tokenizer = load_tokenizer(donor.folder)
    length = min(MOST_ROW_TOKENS, donor.longest_tokens or MOST_ROW_TOKENS)
    if files or dataset:
        source = dataset or TextSource(train_file=tuple(map(str, files)))
        return calibrate(donor, model, _tokens(_rows_of(source, tokenizer, length, -(-tokens // length))))
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
        return calibrate(donor, model, _tokens(rows))


def _rows_of(source: TextSource, tokenizer: PreTrainedTokenizerBase, length: int, wanted: int):
    """From all over the text; of a stream, the first."""
    rows = packed_rows(open_documents(source, tokenizer), tokenizer, length, attend_across_documents=True)
    if source.streaming:
        return islice(rows, wanted)
    return rows.select(np.linspace(0, len(rows) - 1, min(len(rows), wanted)).round().astype(int).tolist())


def _tokens(rows) -> torch.Tensor:
    return torch.from_numpy(np.stack([row["input_ids"] for row in rows]))
