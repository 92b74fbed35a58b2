"""The text of an encoder-decoder's evaluation: sources and targets as tokens, each target once."""

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from ...refusal import Refusal
from ...text.pairs import TextPair


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenPair:
    """One reference of one source, with the tokens that the tokenizer puts around them.

    Args:
        pair: number of the source it belongs to; references of one source share it.
    """

    pair: int
    source_ids: tuple[int, ...]
    target_ids: tuple[int, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Seq2SeqText:
    """All pairs.

    Args:
        pairs: as text.
        rows: as tokens, one for each reference.
        text_bytes: of the references in UTF-8.
        truncated_sources: how many were cut to what the model reads.
        fingerprint: SHA-256 of the text.
        notes: what was cut or left out.
    """

    pairs: tuple[TextPair, ...]
    rows: tuple[TokenPair, ...]
    text_bytes: int
    truncated_sources: int
    fingerprint: str
    notes: tuple[str, ...]

    @property
    def tokens(self) -> int:
        return sum(len(row.target_ids) for row in self.rows)


def read_seq2seq_text(
    pairs: Iterable[TextPair],
    tokenizer: PreTrainedTokenizerBase,
    source_tokens: int,
    target_tokens: int | None,
    max_tokens: int | None = None,
) -> Seq2SeqText:
    """Tokenize them, saying what does not fit.

    Args:
        source_tokens: most tokens of a source; the rest of it is not read.
        target_tokens: most tokens that the decoder has positions for; None: no limit.
        max_tokens: stop after the pair in which so many target tokens are reached.

    Raises:
        Refusal: no pairs, or a target longer than the decoder's positions.
    """
    kept, rows, truncated, left, sha256 = [], [], 0, max_tokens, hashlib.sha256()
    for pair in pairs:
        if left is not None and left <= 0:
            break
        source_ids = tokenizer(pair.source, verbose=False)["input_ids"]
        if len(source_ids) > source_tokens:
            truncated += 1
            source_ids = tokenizer(pair.source, truncation=True, max_length=source_tokens)["input_ids"]
        for reference in pair.references:
            target_ids = _target_ids(tokenizer, reference, target_tokens)
            rows.append(TokenPair(pair=len(kept), source_ids=tuple(source_ids), target_ids=tuple(target_ids)))
            left = left - len(target_ids) if left is not None else None
        kept.append(pair)
        for text in (pair.source, *pair.references):
            sha256.update(f"{len(text.encode())} ".encode() + text.encode())
    if not rows:
        raise Refusal("text: holds no pairs of source and target. Give other text.")
    notes = []
    if truncated:
        notes.append(
            f"{truncated:,} of {len(kept):,} sources are longer than {source_tokens:,} tokens and were cut there."
        )
    if left is not None and left <= 0:
        notes.append(f"Only the first {len(kept):,} pairs of the text were scored (max_tokens).")
    return Seq2SeqText(
        pairs=tuple(kept),
        rows=tuple(rows),
        text_bytes=sum(len(reference.encode()) for pair in kept for reference in pair.references),
        truncated_sources=truncated,
        fingerprint=sha256.hexdigest(),
        notes=tuple(notes),
    )


def _target_ids(tokenizer: PreTrainedTokenizerBase, reference: str, most: int | None) -> list[int]:
    ids = tokenizer(text_target=reference, verbose=False)["input_ids"]
    if most is not None and len(ids) > most:
        raise Refusal(
            f"text: the target {reference!r:.60} has {len(ids):,} tokens, the decoder has positions for {most:,}. Shorten "
            f"it, or leave the row out."
        )
    return ids
