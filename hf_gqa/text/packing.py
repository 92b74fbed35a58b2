"""Documents, one after the other, cut into rows of one length; no token attends to another document.

A row holds pieces of documents. Position ids that restart at 0 say where a piece begins: without an attention mask and
without a cache, transformers masks the pieces from each other (`find_packed_sequence_indices` in its masking_utils).

Shapes: N documents or rows, L sequence_length, B batch.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import takewhile

import numpy as np
import torch
from datasets import Dataset, IterableDataset
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..evaluating import evaluating
from ..refusal import Refusal


DOCUMENTS_PER_BATCH = 100
CHARACTERS_AT_ONCE = 4_000_000
PACKING_VERSION = 1  # part of the name under which datasets caches rows: raise it when rows change
IGNORED = -100


def packed_rows(
    documents: Dataset | IterableDataset,
    tokenizer: PreTrainedTokenizerBase,
    sequence_length: int,
    *,
    attend_across_documents: bool = False,
) -> Dataset | IterableDataset:
    """Rows of exactly `sequence_length` tokens that hold the documents in order.

    Each document is what the tokenizer puts before a text (a BOS, if it does), its tokens, and the EOS, if there is
    one; neither is doubled where the text brings it along. Blank documents are left out. Nothing else is dropped but
    the last tokens of all, too few for a row. A document above 4 million characters is tokenized in pieces cut at line
    ends, which may change a token at a cut.

    Args:
        documents: one column `text`.
        sequence_length: tokens per row, at least 2.
        attend_across_documents: number the tokens of a row through, so that each attends to all before it.

    Returns:
        `input_ids` and `position_ids`, each `[L]`; position ids are 0 at the start of a row and of each document.

    Raises:
        Refusal: less text than one row.
    """
    if sequence_length < 2:
        raise Refusal(f"sequence_length = {sequence_length}: a row needs at least 2 tokens. Use 2 or more.")
    arguments = {
        "documents": documents,
        "tokenizer": tokenizer,
        "sequence_length": sequence_length,
        "attend_across_documents": attend_across_documents,
        "version": PACKING_VERSION,
    }
    if next(_generate_rows(**arguments), None) is None:
        batches = documents.iter(DOCUMENTS_PER_BATCH)
        found = sum(len(tokens) for batch in batches for tokens, _ in token_pieces(batch["text"], tokenizer))
        raise Refusal(
            f"text: has {found:,} tokens, one row needs sequence_length = {sequence_length:,}. Give more text, or a "
            f"shorter sequence_length."
        )
    made = IterableDataset if isinstance(documents, IterableDataset) else Dataset
    return made.from_generator(_generate_rows, gen_kwargs=arguments).with_format("numpy")


def rows_with_positions(
    tokens_NL: np.ndarray, starts_NL: np.ndarray, attend_across_documents: bool = False
) -> Iterator[dict[str, np.ndarray]]:
    """Rows from their tokens and from where in them documents start; the first token of a row always starts one."""
    index_L = np.arange(tokens_NL.shape[1], dtype=np.int32)
    for tokens_L, starts_L in zip(tokens_NL, starts_NL, strict=True):
        start_L = 0 if attend_across_documents else np.maximum.accumulate(np.where(starts_L, index_L, 0))
        yield {"input_ids": tokens_L.astype(np.int32), "position_ids": (index_L - start_L).astype(np.int32)}


def token_pieces(texts: list[str | None], tokenizer: PreTrainedTokenizerBase) -> Iterator[tuple[np.ndarray, bool]]:
    """Of the documents that are not blank: tokens, and whether a document starts with them; mostly all of its tokens."""
    before, eos = _put_before(tokenizer), tokenizer.eos_token_id
    for ids, is_first, is_last in _tokenized([text for text in texts if text and text.strip()], tokenizer):
        if is_first and before and ids[: len(before)].tolist() != before:
            ids = np.concatenate([np.asarray(before, np.int32), ids])
        if is_last and eos is not None and ids[-1:].tolist() != [eos]:
            ids = np.append(ids, np.int32(eos))
        yield ids, is_first


def _generate_rows(
    documents: Dataset | IterableDataset,
    tokenizer: PreTrainedTokenizerBase,
    sequence_length: int,
    attend_across_documents: bool,
    version: int,
) -> Iterator[dict[str, np.ndarray]]:
    tokens, starts = np.empty(0, np.int32), np.empty(0, bool)
    for batch in documents.iter(DOCUMENTS_PER_BATCH):
        for piece, is_first in token_pieces(batch["text"], tokenizer):
            tokens = np.concatenate([tokens, piece])
            starts = np.concatenate([starts, is_first & (np.arange(len(piece)) == 0)])
            used = len(tokens) // sequence_length * sequence_length
            shape = (-1, sequence_length)
            yield from rows_with_positions(
                tokens[:used].reshape(shape), starts[:used].reshape(shape), attend_across_documents
            )
            tokens, starts = tokens[used:], starts[used:]


def _put_before(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The special tokens that the tokenizer puts before a text."""
    letter = tokenizer("a", return_special_tokens_mask=True)
    count = len(list(takewhile(bool, letter["special_tokens_mask"])))
    return letter["input_ids"][:count]


def _tokenized(texts: list[str], tokenizer: PreTrainedTokenizerBase) -> Iterator[tuple[np.ndarray, bool, bool]]:
    """Tokens, whether a text starts with them, whether it ends with them.

    Short texts go to the tokenizer together, and a long one in pieces, for its memory is many times that of the text.
    """
    waiting, characters = [], 0
    for text in texts:
        if waiting and characters + len(text) > CHARACTERS_AT_ONCE:
            yield from ((ids, True, True) for ids in _ids(waiting, tokenizer))
            waiting, characters = [], 0
        if len(text) > CHARACTERS_AT_ONCE:
            pieces = list(_pieces(text))
            for number, piece in enumerate(pieces):
                yield _ids([piece], tokenizer)[0], number == 0, number == len(pieces) - 1
        else:
            waiting.append(text)
            characters += len(text)
    if waiting:
        yield from ((ids, True, True) for ids in _ids(waiting, tokenizer))


def _ids(texts: list[str], tokenizer: PreTrainedTokenizerBase) -> list[np.ndarray]:
    quiet = {"add_special_tokens": False, "return_attention_mask": False, "verbose": False}
    return [np.asarray(ids, np.int32) for ids in tokenizer(texts, **quiet)["input_ids"]]


def _pieces(text: str) -> Iterator[str]:
    start = 0
    while start < len(text):
        end = start + CHARACTERS_AT_ONCE
        if end < len(text):
            end = text.rfind("\n", start, end) + 1 or end
        yield text[start:end]
        start = end


@dataclass(frozen=True, slots=True)
class PackedCollator:
    """Rows -> the tensors of a batch; as `data_collator` of a Trainer with `remove_unused_columns=False`.

    Transformers shifts labels in the loss, so the label at the first token of a piece is masked: the token before it
    is of another document. A row's `valid_tokens` masks the labels from there on; its `row` is kept, for what is
    stored beside the rows.

    Returns:
        int64 tensors: `input_ids`, `position_ids`, `labels` `[B, L]`, and `row` `[B]` where rows have it.
    """

    def __call__(self, rows: list[dict]) -> dict[str, torch.Tensor]:
        batch = {
            name: torch.from_numpy(np.stack([np.asarray(row[name], np.int64) for row in rows]))
            for name in ("input_ids", "position_ids")
        }
        batch["labels"] = batch["input_ids"].masked_fill(batch["position_ids"] == 0, IGNORED)
        for labels_L, row in zip(batch["labels"], rows, strict=True):
            labels_L[row.get("valid_tokens", len(labels_L)) :] = IGNORED
        if "row" in rows[0]:
            batch["row"] = torch.tensor([int(row["row"]) for row in rows])
        return batch


def check_packing(model: PreTrainedModel, batch_size: int = 2) -> None:
    """Refuse a model whose tokens attend across documents in packed rows, after trying it on a few tokens.

    What is computed for the second document of a row may not depend on the first. It does in attention functions that
    get no mask: FlashAttention of transformers looks at position ids in batches of one row only.

    Args:
        batch_size: rows per forward pass in training.

    Raises:
        Refusal: the documents are not independent.
    """
    device, length = model.get_input_embeddings().weight.device, 4
    tokens_BL = torch.arange(1, 2 * length + 1, device=device).remainder(model.config.vocab_size).repeat(batch_size, 1)
    other_BL = torch.cat([tokens_BL[:, :length].flip(1), tokens_BL[:, length:]], dim=1)
    position_ids = torch.arange(length, device=device).repeat(batch_size, 2)
    with torch.no_grad(), evaluating(model):
        one, other = (
            model(input_ids=ids, position_ids=position_ids, use_cache=False).logits[:, length:].float()
            for ids in (tokens_BL, other_BL)
        )
    if not (one - other).abs().max() <= 1e-3 * one.abs().max():
        raise Refusal(
            f"{type(model).__name__}: with attn_implementation = '{model.config._attn_implementation}' and batches of "
            f"{batch_size}, the tokens of a packed row attend across documents. Load it with "
            f"attn_implementation='sdpa', or set attend_across_documents to allow that."
        )
