"""Rows of tokens to look at a donor with: from text files, or from what the donor itself writes.

Shapes: N rows, L tokens of a row.
"""

import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

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


def make_calibration(
    donor: Donor, files: Sequence[str | Path] = (), tokens: int = DEFAULT_TOKENS, seed: int = 0
) -> Calibration:
    """Calibrate a donor on disk.

    Args:
        files: text files or folders, as for uptraining; or one `.safetensors` file that a calibration was written to;
            none: the donor writes its own text.
        tokens: most to look at; of longer files, rows from all over.
        seed: of the sampled text.

    Raises:
        Refusal: unreadable text, no tokens, or a donor that predicts none.
    """
    if any(Path(file).suffix == SAVED for file in files):
        if len(files) > 1:
            raise Refusal(f"calibration: {SAVED} files are calibrations of their own. Give one, or text files.")
        return Calibration.read(Path(files[0]))
    if tokens < 1:
        raise Refusal(f"calibration_tokens = {tokens}: is not a positive number. Use some ten thousand.")
    if not donor.model_class.__name__.endswith(("ForCausalLM", "LMHeadModel")) and not files:
        raise Refusal(
            f"calibration: a {donor.model_class.__name__} predicts no tokens, so it cannot write its own text. Give text files."
        )
    model = donor.model_class.from_pretrained(donor.folder, config=donor.config, dtype="auto").eval()
    tokenizer = load_tokenizer(donor.folder)
    length = min(MOST_ROW_TOKENS, donor.longest_tokens or MOST_ROW_TOKENS)
    if files:
        documents = open_documents(TextSource(train_file=tuple(map(str, files))), tokenizer)
        rows = packed_rows(documents, tokenizer, length, attend_across_documents=True)
        wanted = min(len(rows), -(-tokens // length))
        rows = rows.select(np.linspace(0, len(rows) - 1, wanted).round().astype(int).tolist())
        return calibrate(donor, model, _tokens(rows))
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


def _tokens(rows) -> torch.Tensor:
    return torch.from_numpy(np.stack([row["input_ids"] for row in rows]))
