"""Rows up to a budget of tokens, in an order that a resumed run finds again."""

import math
from collections.abc import Iterator
from functools import lru_cache

import numpy as np
import torch
from datasets import Dataset, IterableDataset

from ..refusal import Refusal


class BudgetedRows(torch.utils.data.Dataset):
    """As many rows as hold the budget, pass after pass over the corpus, each pass in a permutation of its own.

    Item i is row `permutation_p[i % R]` of pass `p = i // R`, for R rows; for one epoch of a sequential sampler. Its
    key `row` is the row's number. The last item has `valid_tokens` where the budget ends inside it: from there on it
    is `fill_token_id`, as a document of its own, which PackedCollator keeps out of the loss.

    Args:
        rows: as made by `packed_rows`.
        budget_tokens: tokens to train on, at least one row.
        seed: of the permutations; 0 or more. The same everywhere, for it orders raw PCG64 bits.
        fill_token_id: what stands behind the budget; pad or EOS, if there is one.
        multiple_of: items of nothing but `fill_token_id` make their number a multiple of this, where several processes share
            them out; accelerate would repeat the first ones.

    Attributes:
        passes: how often the corpus is seen, in fractions too.

    Raises:
        Refusal: no rows, or a budget below one row.
    """

    def __init__(self, rows: Dataset, budget_tokens: int, seed: int, fill_token_id: int = 0, multiple_of: int = 1):
        if len(rows) == 0:
            raise Refusal("text: holds no rows. Give more text, or a shorter sequence_length.")
        _check_seed(seed)
        self.rows, self.seed, self.fill_token_id, self.multiple_of = rows, seed, fill_token_id, multiple_of
        self.sequence_length = len(rows[0]["input_ids"])
        self.budget_tokens = _checked_budget(budget_tokens, self.sequence_length)
        self.passes = budget_tokens / (len(rows) * self.sequence_length)

    def __len__(self) -> int:
        return _items(self.budget_tokens, self.sequence_length, self.multiple_of)

    def __getitem__(self, index: int) -> dict:
        if not 0 <= index < len(self):
            raise IndexError(index)
        number, place = divmod(index, len(self.rows))
        row = int(_permutation(self.seed, number, len(self.rows))[place])
        valid_tokens = self.budget_tokens - index * self.sequence_length
        return _item(self.rows[row], row, valid_tokens, self.fill_token_id)


class BudgetedStream(torch.utils.data.IterableDataset):
    """The same for a stream: its rows in order, and from the start again where it ends before the budget does.

    With one process or one loader worker; `datasets` would deal the stream out among several.

    Args:
        rows: as made by `packed_rows` from a stream.
        budget_tokens: tokens to train on, at least one row.
        seed: draws rows from a buffer instead of in order, differently in each pass.
        fill_token_id, multiple_of: as in `BudgetedRows`.
        buffer_rows: rows in that buffer.

    Attributes:
        passes: how often the stream was seen; None until it has been read to its end once, in this process.

    Raises:
        Refusal: a stream without rows, or a budget below one row.
    """

    def __init__(
        self,
        rows: IterableDataset,
        budget_tokens: int,
        seed: int | None = None,
        fill_token_id: int = 0,
        multiple_of: int = 1,
        buffer_rows: int = 1000,
    ):
        first = next(iter(rows), None)
        if first is None:
            raise Refusal("text: the stream holds no rows. Give more text, or a shorter sequence_length.")
        if seed is not None:
            _check_seed(seed)
        self.rows, self.seed, self.fill_token_id, self.multiple_of = rows, seed, fill_token_id, multiple_of
        self.buffer_rows = buffer_rows
        self.sequence_length = len(first["input_ids"])
        self.budget_tokens = _checked_budget(budget_tokens, self.sequence_length)
        self.passes: float | None = None

    def __len__(self) -> int:
        return _items(self.budget_tokens, self.sequence_length, self.multiple_of)

    def __iter__(self) -> Iterator[dict]:
        worker = torch.utils.data.get_worker_info()
        if worker is not None and worker.num_workers > 1:
            raise Refusal(
                f"dataloader_num_workers = {worker.num_workers}: a stream is read by one worker, or its order would "
                f"depend on their number. Use 0 or 1, or do not stream."
            )
        index = number = 0
        while index < len(self):
            before = index
            for row, content in self._one_pass(number):
                valid_tokens = self.budget_tokens - index * self.sequence_length
                yield _item(content, row, valid_tokens, self.fill_token_id)
                index += 1
                if index == len(self):
                    return
            if index == before:
                raise Refusal("text: the stream holds no rows any more. Check its source.")
            self.passes = self.budget_tokens / ((index - before) * self.sequence_length)
            number += 1

    def _one_pass(self, number: int) -> Iterator[tuple[int, dict]]:
        numbered = enumerate(self.rows)
        if self.seed is None:
            yield from numbered
            return
        bits, buffer = np.random.PCG64([self.seed, number]), []
        for entry in numbered:
            if len(buffer) < self.buffer_rows:
                buffer.append(entry)
                continue
            place = int(bits.random_raw()) % len(buffer)
            buffer[place], entry = entry, buffer[place]
            yield entry
        yield from (buffer[place] for place in np.argsort(bits.random_raw(len(buffer)), kind="stable"))


@lru_cache(maxsize=2)
def _permutation(seed: int, number: int, length: int) -> np.ndarray:
    """Of pass `number`: numpy promises the same raw bits in every version, and no such thing for its own shuffles."""
    return np.argsort(np.random.PCG64([seed, number]).random_raw(length), kind="stable")


def _item(content: dict, row: int, valid_tokens: int, fill_token_id: int) -> dict:
    """`valid_tokens`: what remains of the budget at the start of the row; below 0 where it ended before."""
    valid_tokens = max(0, valid_tokens)
    item = {name: np.array(content[name]) for name in ("input_ids", "position_ids")}
    length = len(item["input_ids"])
    if valid_tokens < length:
        item["input_ids"][valid_tokens:] = fill_token_id
        item["position_ids"][valid_tokens:] = np.arange(length - valid_tokens)
        item["valid_tokens"] = valid_tokens
    return item | {"row": row}


def _items(budget_tokens: int, sequence_length: int, multiple_of: int) -> int:
    return math.ceil(math.ceil(budget_tokens / sequence_length) / multiple_of) * multiple_of


def _checked_budget(budget_tokens: int, sequence_length: int) -> int:
    if budget_tokens < sequence_length:
        raise Refusal(
            f"budget_tokens = {budget_tokens:,}: is less than one row of sequence_length = {sequence_length:,}. Use "
            f"{sequence_length:,} or more."
        )
    return budget_tokens


def _check_seed(seed: int) -> None:
    if seed < 0:
        raise Refusal(f"seed = {seed}: is negative. Use 0 or more.")
