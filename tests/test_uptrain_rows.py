"""A budget is spent to the token, in an order that does not depend on who reads or when."""

import math
import pickle

import numpy as np
import pytest
import torch
from datasets import Dataset
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader

from hf_gqa import Refusal
from hf_gqa.text.packing import PackedCollator
from hf_gqa.uptrain.budgeted_rows import BudgetedRows, BudgetedStream


LENGTH = 4


def rows(count: int) -> Dataset:
    """Row r is r * 10, r * 10 + 1, ..., a document of two tokens and one of two."""
    tokens = [[10 * row + place for place in range(LENGTH)] for row in range(count)]
    columns = {"input_ids": np.array(tokens, np.int32).reshape(count, LENGTH), "position_ids": [[0, 1, 0, 1]] * count}
    return Dataset.from_dict(columns).with_format("numpy")


def stream(count: int):
    return rows(count).with_format(None).to_iterable_dataset(num_shards=min(count, 3)).with_format("numpy")


def plain(items) -> list[dict]:
    return [{name: np.asarray(value).tolist() for name, value in item.items()} for item in items]


@settings(max_examples=40, deadline=None)
@given(count=st.integers(1, 7), budget=st.integers(LENGTH, 90), multiple_of=st.integers(1, 9), streamed=st.booleans())
def test_items_that_make_up_the_number_teach_nothing(count, budget, multiple_of, streamed):
    """Where processes share the items out; accelerate would train the first ones again."""
    made = {}
    for number in (1, multiple_of):
        if streamed:
            made[number] = plain(BudgetedStream(stream(count), budget, fill_token_id=99, multiple_of=number))
        else:
            items = BudgetedRows(rows(count), budget, 0, fill_token_id=99, multiple_of=number)
            made[number] = plain(items[i] for i in range(len(items)))
    alone, found = made[1], made[multiple_of]
    assert found[: len(alone)] == alone and len(found) == math.ceil(len(alone) / multiple_of) * multiple_of
    batch = PackedCollator()([{name: np.array(value) for name, value in item.items()} for item in found])
    assert int((batch["labels"] != -100).sum()) == int(
        (
            PackedCollator()([{name: np.array(value) for name, value in item.items()} for item in alone])["labels"]
            != -100
        ).sum()
    )
    for item in found[len(alone) :]:
        assert item["valid_tokens"] == 0 and item["input_ids"] == [99] * LENGTH


@settings(max_examples=60, deadline=None)
@given(count=st.integers(1, 7), budget=st.integers(LENGTH, 90), seed=st.integers(0, 2**64))
def test_budget_is_spent_to_the_token(count, budget, seed):
    corpus = rows(count)
    items = BudgetedRows(corpus, budget, seed, fill_token_id=99)
    found = plain(items[i] for i in range(len(items)))
    assert len(found) == math.ceil(budget / LENGTH) and items.budget_tokens == budget
    assert items.passes == pytest.approx(budget / (count * LENGTH))
    numbers = [item["row"] for item in found]
    for start in range(0, len(numbers), count):
        in_pass = numbers[start : start + count]
        assert len(set(in_pass)) == len(in_pass)
    whole = found[:-1] if budget % LENGTH else found
    assert all(
        item
        == {"row": item["row"]} | {name: corpus[item["row"]][name].tolist() for name in ("input_ids", "position_ids")}
        for item in whole
    )
    if budget % LENGTH:
        valid = budget % LENGTH
        last = corpus[numbers[-1]]["input_ids"].tolist()[:valid]
        assert found[-1]["valid_tokens"] == valid
        assert found[-1]["input_ids"] == last + [99] * (LENGTH - valid)
        assert found[-1]["position_ids"] == [0, 1, 0, 1][:valid] + list(range(LENGTH - valid))


def test_order_is_pinned():
    """Raw bits of PCG64 decide it: a resumed run finds it on another machine and after an update of numpy."""
    items = BudgetedRows(rows(5), 15 * LENGTH, seed=3)
    numbers = [item["row"] for item in items]
    assert numbers == [0, 4, 1, 3, 2, 0, 2, 1, 3, 4, 4, 0, 3, 1, 2]
    assert [item["row"] for item in BudgetedRows(rows(5), 15 * LENGTH, seed=4)] != numbers


def test_items_do_not_depend_on_what_was_read_before():
    items = BudgetedRows(rows(5), 50, seed=1)
    wanted = plain(items)
    backwards = plain(items[i] for i in reversed(range(len(items))))
    assert backwards[::-1] == wanted
    assert plain(pickle.loads(pickle.dumps(items))) == wanted
    with pytest.raises(IndexError):
        items[len(items)]


def test_rows_that_are_read_stay_as_they_are():
    corpus = rows(1)
    items = BudgetedRows(corpus, 2 * LENGTH + 1, seed=0, fill_token_id=99)
    assert [item["input_ids"].tolist() for item in items] == [[0, 1, 2, 3], [0, 1, 2, 3], [0, 99, 99, 99]]
    assert corpus[0]["input_ids"].tolist() == [0, 1, 2, 3]


def test_budget_counts_what_the_loss_sees():
    items = BudgetedRows(rows(3), 3 * LENGTH + 3, seed=0)
    labels = torch.cat([batch["labels"] for batch in DataLoader(items, 2, collate_fn=PackedCollator())])
    assert labels[-1].tolist() == [-100, int(items[3]["input_ids"][1]), -100, -100]
    assert int((labels != -100).sum()) == 3 * 2 + 1


@settings(max_examples=40, deadline=None)
@given(count=st.integers(1, 7), budget=st.integers(LENGTH, 60))
def test_stream_gives_the_rows_in_order_and_again(count, budget):
    corpus, items = rows(count), BudgetedStream(stream(count), budget, fill_token_id=99)
    found = plain(items)
    assert len(found) == len(items) == math.ceil(budget / LENGTH)
    assert [item["row"] for item in found] == [index % count for index in range(len(items))]
    mapped = BudgetedRows(corpus, budget, seed=0, fill_token_id=99)
    for index, item in enumerate(found):
        valid = item.get("valid_tokens", LENGTH)
        assert item["input_ids"][:valid] == corpus[item["row"]]["input_ids"].tolist()[:valid]
        assert item.keys() == mapped[index].keys()
        assert item.get("valid_tokens") == mapped[index].get("valid_tokens")
    assert plain(items) == found
    assert items.passes is None if len(items) <= count else items.passes == mapped.passes


def test_shuffled_stream_is_the_same_each_time_and_differs_in_each_pass():
    items = BudgetedStream(stream(20), 60 * LENGTH, seed=5, buffer_rows=8)
    numbers = [item["row"] for item in items]
    passes = [numbers[start : start + 20] for start in (0, 20, 40)]
    assert [sorted(in_pass) for in_pass in passes] == [list(range(20))] * 3
    assert passes[0] != passes[1] != passes[2] and passes[0] != list(range(20))
    assert [item["row"] for item in items] == numbers
    assert [item["row"] for item in pickle.loads(pickle.dumps(items))] == numbers
    assert plain(items) == plain(BudgetedStream(stream(20), 60 * LENGTH, seed=5, buffer_rows=8))


@pytest.mark.parametrize("make", [lambda: BudgetedRows(rows(6), 50, 1), lambda: BudgetedStream(stream(6), 50, 1)])
def test_skipping_finds_the_same_batches(make):
    """As Trainer does when it resumes: it reads on behind the batches that were done."""
    batches = list(DataLoader(make(), 4, collate_fn=PackedCollator()))
    later = list(DataLoader(make(), 4, collate_fn=PackedCollator()))[2:]
    assert len(batches) == 4 and len(later) == 2
    for one, other in zip(batches[2:], later, strict=True):
        assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.filterwarnings("ignore:.*use of fork:DeprecationWarning")
def test_one_loader_worker_reads_what_the_process_reads():
    items = BudgetedStream(stream(6), 50, 1)
    alone = [batch["row"].tolist() for batch in DataLoader(items, 4, collate_fn=PackedCollator())]
    worker = DataLoader(items, 4, collate_fn=PackedCollator(), num_workers=1)
    assert [batch["row"].tolist() for batch in worker] == alone


def test_several_loader_workers_are_refused(monkeypatch):
    items = BudgetedStream(stream(6), 50)
    worker = type("Worker", (), {"num_workers": 4, "id": 0})()
    monkeypatch.setattr(torch.utils.data, "get_worker_info", lambda: worker)
    with pytest.raises(Refusal) as refusal:
        next(iter(items))
    assert str(refusal.value) == (
        "dataloader_num_workers = 4: a stream is read by one worker, or its order would depend on their number. Use 0 or "
        "1, or do not stream."
    )


def test_stream_that_runs_dry_is_refused():
    class OnceOnly:
        readings = 0

        def __iter__(self):
            self.readings += 1
            return iter(rows(2)) if self.readings < 3 else iter(())

    with pytest.raises(Refusal) as refusal:
        list(BudgetedStream(OnceOnly(), 3 * LENGTH))
    assert str(refusal.value) == "text: the stream holds no rows any more. Check its source."


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: BudgetedRows(rows(2), 3, 0), "budget_tokens = 3: is less than one row of sequence_length = 4. Use 4 or more."),
        (lambda: BudgetedRows(rows(2), 0, 0), "budget_tokens = 0: is less than one row of sequence_length = 4. Use 4 or more."),
        (
            lambda: BudgetedStream(stream(2), -5),
            "budget_tokens = -5: is less than one row of sequence_length = 4. Use 4 or more.",
        ),
        (lambda: BudgetedRows(rows(2), 9, -1), "seed = -1: is negative. Use 0 or more."),
        (lambda: BudgetedStream(stream(2), 9, -1), "seed = -1: is negative. Use 0 or more."),
        (lambda: BudgetedRows(rows(0), 9, 0), "text: holds no rows. Give more text, or a shorter sequence_length."),
        (
            lambda: BudgetedStream(rows(0), 9),
            "text: the stream holds no rows. Give more text, or a shorter sequence_length.",
        ),
    ],
)  # fmt: skip
def test_what_cannot_be_is_refused(make, message):
    with pytest.raises(Refusal) as refusal:
        make()
    assert str(refusal.value) == message
