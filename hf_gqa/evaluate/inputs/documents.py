"""The text of an evaluation as tokens, with what the bits per byte need."""

import hashlib
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ...refusal import Refusal
from ...text.sampled import sampled_rows
from ...text.source import TextSource, open_documents
from .windows import Window, prefix_token, token_ids, windows_of


SEEDS_OF_TRAINING = 2**32  # a recipe's seed is less


@dataclass(frozen=True, slots=True, kw_only=True)
class Documents:
    """Documents that are not empty, each an array of token ids.

    Args:
        prefix: token that stands before each, so that its first token is predicted too; None: that one is not scored.
        tokens: that are scored.
        text_bytes: of the scored text in UTF-8.
        fingerprint: SHA-256 of the text.
        notes: what was left out.
    """

    ids: tuple[np.ndarray, ...]
    prefix: int | None
    tokens: int
    text_bytes: int
    fingerprint: str
    notes: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.ids)

    def windows(self, context_tokens: int, stride_tokens: int) -> Iterator[Window]:
        for ids in self.ids:
            yield from windows_of(ids.tolist(), self.prefix, context_tokens, stride_tokens)


def read_documents(
    source: TextSource,
    tokenizer: PreTrainedTokenizerBase,
    context_tokens: int,
    max_tokens: int | None,
    *,
    for_encoder: bool = False,
) -> Documents:
    """All of the text, or its first `max_tokens` tokens.

    Args:
        for_encoder: which sees a whole window at once: nothing stands before a document, each of its tokens counts, and
            a window may be short.

    Raises:
        Refusal: unreadable text, or less of it than one window.
    """
    prefix, sha256 = None if for_encoder else prefix_token(tokenizer), hashlib.sha256()
    unscored = int(prefix is None and not for_encoder)  # the first token of a document, which nothing predicts
    kept, text_bytes, left, notes = [], 0, max_tokens, []
    try:
        documents = open_documents(source, tokenizer)
    except Refusal as error:
        raise Refusal(str(error).replace("train_file", "--text")) from None
    for text in (row["text"] for row in documents if row["text"]):
        if left is not None and left <= 0:
            break
        ids, used_bytes = _cut(tokenizer, text, left, unscored)
        if len(ids) <= unscored:
            continue
        kept.append(np.asarray(ids, dtype=np.int32))
        text_bytes += used_bytes
        sha256.update(f"{len(text.encode())} ".encode() + text.encode())
        left = left - len(ids) if left is not None else None
    tokens = sum(len(ids) - unscored for ids in kept)
    _check_enough(source, tokens, 1 if for_encoder else context_tokens)
    if left is not None and left <= 0:
        notes.append(f"Only the first {tokens:,} tokens of the text were scored (max_tokens).")
    if unscored:
        notes.append("The tokenizer has no token to begin with, so the first token of each document was not scored.")
    return Documents(
        ids=tuple(kept),
        prefix=prefix,
        tokens=tokens,
        text_bytes=text_bytes,
        fingerprint=sha256.hexdigest(),
        notes=tuple(notes),
    )


def _check_enough(source: TextSource, tokens: int, least: int) -> None:
    if tokens < least:
        where = source.dataset_name or ", ".join(source.train_file)
        raise Refusal(
            f"{where}: holds {tokens:,} tokens, fewer than one window of context_length = {least:,}. Give more text, "
            f"or a shorter --context-length."
        )


def sampled_documents(
    donor: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, tokens: int, context_tokens: int, seed: int
) -> Documents:
    """Text that the donor writes, a window at a time; never that of an uptraining with the same seed.

    Its own loss on it is the entropy of what it says, and the KL is what the student would lose on such text.
    """
    prefix = prefix_token(tokenizer)
    with tempfile.TemporaryDirectory() as folder:
        options = {"tokens": tokens, "sequence_length": context_tokens + 1, "seed": SEEDS_OF_TRAINING + seed}
        rows = sampled_rows(donor, tokenizer, Path(folder) / "text", donor_id="donor", **options)
        ids = tuple(np.asarray(row["input_ids"], dtype=np.int32)[prefix is not None :] for row in rows)
    texts = [tokenizer.decode(row).encode() for row in ids]
    return Documents(
        ids=ids,
        prefix=prefix,
        tokens=sum(len(row) - (prefix is None) for row in ids),
        text_bytes=sum(map(len, texts)),
        fingerprint=hashlib.sha256(b"".join(texts)).hexdigest(),
        notes=("The donor wrote the text, so its own loss is the entropy of its distribution; other text may differ.",),
    )


def _cut(tokenizer: PreTrainedTokenizerBase, text: str, most: int | None, unscored: int) -> tuple[list[int], int]:
    """(tokens, bytes of the text that they score)."""
    ids = token_ids(tokenizer, text)
    size = len(text.encode())
    if most is not None and len(ids) > most:
        ids = ids[:most]
        size = len(tokenizer.decode(ids).encode())
    return ids, size - (len(tokenizer.decode(ids[:1]).encode()) if unscored else 0)
