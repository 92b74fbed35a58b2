"""Documents come out of packed rows whole and in order, and none sees another."""

import functools

import numpy as np
import pytest
import torch
from datasets import Dataset
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch.utils.checkpoint import checkpoint
from transformers import AutoTokenizer
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from hf_gqa import Refusal, convert
from hf_gqa.text import packing
from hf_gqa.text.packing import PackedCollator, check_packing, packed_rows, token_pieces

from .tiny_donors import SOME_MODEL_TYPES, VOCAB_SIZE, tiny_donor
from .tiny_tokenizer import letters


KEEPING_APART = [*SOME_MODEL_TYPES, "phi", "starcoder2", "olmo2", "cohere"]
LOOKING_ACROSS = ["bloom", "mpt", "opt"]  # their masks do not ask for positions; Falcon's do since transformers 5.24


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "datasets-cache")


def dataset(*texts: str | None) -> Dataset:
    return Dataset.from_dict({"text": list(texts)})


def tokens_of(texts: list[str | None], tokenizer) -> list[list[int]]:
    documents = []
    for tokens, is_first in token_pieces(texts, tokenizer):
        assert tokens.dtype == np.int32
        documents += [[]] if is_first else []
        documents[-1] += tokens.tolist()
    return documents


def plain_rows(texts: list[str], length: int, before: list[int], after: list[int]) -> list[tuple[list, list]]:
    """The slow reference: token by token."""
    rows, ids, positions = [], [], []
    for text in filter(str.strip, texts):
        position = 0
        for token in [*before, *(ord(letter) - 93 if letter != "\n" else 3 for letter in text), *after]:
            ids.append(token)
            positions.append(position if positions else 0)
            position = positions[-1] + 1
            if len(ids) == length:
                rows.append((ids, positions))
                ids, positions = [], []
    return rows


def as_lists(rows) -> list[tuple[list, list]]:
    return [(row["input_ids"].tolist(), row["position_ids"].tolist()) for row in rows]


TEXTS = st.lists(st.text("abcxyz\n", max_size=12), min_size=1, max_size=30)
MANY = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@MANY
@given(texts=TEXTS, length=st.integers(2, 9), bos=st.booleans(), eos=st.booleans(), batch=st.integers(1, 4))
def test_rows_are_those_of_plain_python(texts, length, bos, eos, batch, monkeypatch):
    monkeypatch.setattr(packing, "DOCUMENTS_PER_BATCH", batch)
    wanted = plain_rows(texts, length, [1] * bos, [2] * eos)
    arguments = [letters(bos, eos), length]
    documents = dataset(*texts)
    found = packing._generate_rows(documents, *arguments, attend_across_documents=False, version=1)
    assert as_lists(found) == wanted
    if wanted:
        assert as_lists(packed_rows(documents.to_iterable_dataset(min(3, len(texts))), *arguments)) == wanted


def test_rows_on_disk_in_memory_and_streamed_are_the_same():
    texts = ["abc" * n for n in range(150)]
    mapped = packed_rows(dataset(*texts), letters(), 16)
    streamed = packed_rows(dataset(*texts).to_iterable_dataset(num_shards=4), letters(), 16)
    wanted = plain_rows(texts, 16, [1], [2])
    assert set(mapped.features) == {"input_ids", "position_ids"}
    assert all(feature.feature.dtype == "int32" for feature in mapped.features.values())
    assert len(mapped) == len(wanted) and as_lists(mapped) == wanted
    assert as_lists(streamed) == wanted and as_lists(streamed) == wanted  # twice: each reading starts anew
    first, second = iter(streamed), iter(streamed)
    assert as_lists([next(first), next(second), next(first), next(second)]) == [wanted[i] for i in (0, 0, 1, 1)]


def test_one_long_document_gives_all_its_rows(caplog):
    tokenizer = AutoTokenizer.from_pretrained("examples/donor")
    text = "The rows of one long document.\n" * 33_000
    rows = list(packing._generate_rows(dataset(text), tokenizer, 512, attend_across_documents=False, version=1))
    tokens = tokenizer(text, verbose=False)["input_ids"] + [tokenizer.eos_token_id]
    assert len(text) > 1_000_000 and len(rows) == len(tokens) // 512
    assert np.concatenate([row["input_ids"] for row in rows]).tolist() == tokens[: len(rows) * 512]
    assert (np.stack([row["position_ids"] for row in rows]) == np.arange(512)).all()
    assert caplog.records == []


@MANY
@given(texts=st.lists(st.text("ab\n", min_size=1, max_size=40), max_size=8), limit=st.integers(1, 12))
def test_documents_are_tokenized_in_bounded_pieces(texts, limit, monkeypatch):
    seen, ids = [], packing._ids
    monkeypatch.setattr(packing, "CHARACTERS_AT_ONCE", limit)
    monkeypatch.setattr(packing, "_ids", lambda texts, tokenizer: seen.append("".join(texts)) or ids(texts, tokenizer))
    found = tokens_of(texts, letters())
    assert found == [[*letters()(text)["input_ids"], 2] for text in texts if text.strip()]
    assert all(len(text) <= limit for text in seen)


def test_long_documents_are_cut_at_line_ends(monkeypatch):
    monkeypatch.setattr(packing, "CHARACTERS_AT_ONCE", 5)
    assert list(packing._pieces("ab\ncd\nefghijkl\nm")) == ["ab\n", "cd\n", "efghi", "jkl\nm"]


@pytest.mark.parametrize(
    ("text", "tokens"),
    [("ab", [1, 4, 5, 2]), ("<s>ab", [1, 4, 5, 2]), ("ab</s>", [1, 4, 5, 2]), ("<s>ab</s>", [1, 4, 5, 2])],
)
def test_what_the_text_brings_along_is_not_doubled(text, tokens):
    assert tokens_of([text], letters()) == [tokens]


def test_bos_that_is_also_eos():
    assert tokens_of(["ab"], letters(same=True)) == [[1, 4, 5, 1]]
    assert tokens_of(["ab"], letters(bos=False, same=True)) == [[4, 5, 1]]


def test_blank_documents_are_left_out():
    assert tokens_of(["", None, " \n"], letters()) == []


def test_tokens_may_attend_across_documents():
    rows = packed_rows(dataset("abc", "abcdef"), letters(), 5, attend_across_documents=True)
    assert as_lists(rows) == [([1, 4, 5, 6, 2], [0, 1, 2, 3, 4]), ([1, 4, 5, 6, 7], [0, 1, 2, 3, 4])]


@pytest.mark.parametrize("stream", [False, True])
def test_too_little_text_is_refused(stream):
    documents = dataset("abc", "ab")
    documents = documents.to_iterable_dataset() if stream else documents
    with pytest.raises(Refusal) as refusal:
        packed_rows(documents, letters(), 1000)
    assert str(refusal.value) == (
        "text: has 9 tokens, one row needs sequence_length = 1,000. Give more text, or a shorter sequence_length."
    )


def test_rows_of_one_token_are_refused():
    with pytest.raises(Refusal) as refusal:
        packed_rows(dataset("abc"), letters(), 1)
    assert str(refusal.value) == "sequence_length = 1: a row needs at least 2 tokens. Use 2 or more."


def test_batch_has_labels_that_no_other_document_predicts():
    rows = [
        {"input_ids": [1, 4, 2, 1, 5], "position_ids": [0, 1, 2, 0, 1], "row": 7},
        {"input_ids": [6, 2, 1, 0, 0], "position_ids": [0, 1, 0, 0, 1], "row": 3, "valid_tokens": 3},
    ]
    batch = PackedCollator()(rows)
    assert {name: tensor.dtype for name, tensor in batch.items()} == dict.fromkeys(
        ("input_ids", "position_ids", "labels", "row"), torch.int64
    )
    assert batch["labels"].tolist() == [[-100, 4, 2, -100, 5], [-100, 2, -100, -100, -100]]
    assert batch["input_ids"].tolist() == [row["input_ids"] for row in rows]
    assert batch["position_ids"].tolist() == [row["position_ids"] for row in rows]
    assert batch["row"].tolist() == [7, 3]
    assert "row" not in PackedCollator()([{"input_ids": [1, 2], "position_ids": [0, 1]}])


def packed_batch() -> tuple[list[list[torch.Tensor]], dict[str, torch.Tensor]]:
    """Two rows of three documents each, some longer than the tiny donors' sliding windows, one of a single token."""
    lengths, generator = [(9, 1, 14), (3, 11, 10)], torch.Generator().manual_seed(0)
    documents = [[torch.randint(3, VOCAB_SIZE, (n,), generator=generator) for n in row] for row in lengths]
    rows = [
        {"input_ids": torch.cat(row), "position_ids": torch.cat([torch.arange(len(document)) for document in row])}
        for row in documents
    ]
    return documents, PackedCollator()(rows)


DROPOUTS = ("attention_dropout", "attn_pdrop", "resid_pdrop", "embd_pdrop")


def models_of(model_type: str, attention: str) -> dict[str, torch.nn.Module]:
    """A donor and the students of it that are of another class, in training mode."""
    donor = tiny_donor(model_type, **dict.fromkeys(DROPOUTS, 0.0))
    donor.config.architectures = [type(donor).__name__]
    found = {"donor": donor}
    for heads, export in ((2, "bundle"), (1, "native")):
        found[f"{export} {heads}"] = convert(donor, num_key_value_heads=heads, export=export)
    for model in found.values():
        model.set_attn_implementation(attention)
        model.train()
    return found


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("model_type", KEEPING_APART)
def test_packed_documents_are_computed_as_if_alone(model_type, attention):
    documents, batch = packed_batch()
    for name, model in models_of(model_type, attention).items():
        alone = torch.stack([
            torch.cat([model(document[None], use_cache=False).logits[0] for document in row]) for row in documents
        ])  # fmt: skip
        inputs = {"input_ids": batch["input_ids"], "use_cache": False}
        packed = model(**inputs, position_ids=batch["position_ids"]).logits
        torch.testing.assert_close(packed, alone, rtol=1e-5, atol=1e-5, msg=lambda text, name=name: f"{name}: {text}")
        assert (model(**inputs).logits - alone).abs().max() > 0.1, name
        cached = inputs | {"use_cache": True}
        assert (model(**cached, position_ids=batch["position_ids"]).logits - alone).abs().max() > 0.1, name
        check_packing(model)


@pytest.mark.parametrize("model_type", KEEPING_APART)
def test_gradient_of_a_packed_row_is_the_sum_of_its_documents(model_type):
    documents, batch = packed_batch()
    model = models_of(model_type, "sdpa")["donor"]
    inputs = {name: batch[name] for name in ("input_ids", "position_ids", "labels")}
    tokens = int((batch["labels"] != -100).sum())
    model(**inputs, use_cache=False, num_items_in_batch=tokens).loss.backward()
    packed = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    model.zero_grad()
    for document in (document for row in documents for document in row if len(document) > 1):
        alone = document[None]
        model(alone, labels=alone, use_cache=False, num_items_in_batch=tokens).loss.backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(packed[name], parameter.grad, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("model_type", LOOKING_ACROSS)
def test_family_that_knows_no_packed_rows_is_refused(model_type):
    with pytest.raises(Refusal, match="the tokens of a packed row attend across documents"):
        check_packing(tiny_donor(model_type))


def test_gradient_checkpointing_keeps_documents_apart():
    _, batch = packed_batch()
    model = models_of("llama", "sdpa")["donor"]
    inputs = {"input_ids": batch["input_ids"], "position_ids": batch["position_ids"], "use_cache": False}
    wanted = model(**inputs).logits
    for module in model.modules():
        if isinstance(module, GradientCheckpointingLayer):
            module.gradient_checkpointing = True
            module._gradient_checkpointing_func = functools.partial(checkpoint, use_reentrant=False)
    torch.testing.assert_close(model(**inputs).logits, wanted)


def test_model_that_looks_across_documents_is_refused(monkeypatch):
    model = tiny_donor("llama")
    model.model.layers[0].self_attn.train()
    functions = ALL_ATTENTION_FUNCTIONS._global_mapping
    monkeypatch.setitem(functions, "without_mask", functions["sdpa"])  # gets no mask, as flash attention gets none
    model.config._attn_implementation = "without_mask"
    with pytest.raises(Refusal) as refusal:
        check_packing(model, batch_size=4)
    assert str(refusal.value) == (
        "LlamaForCausalLM: with attn_implementation = 'without_mask' and batches of 4, the tokens of a packed row attend "
        "across documents. Load it with attn_implementation='sdpa', or set attend_across_documents to allow that."
    )
    assert model.model.layers[0].self_attn.training and not model.model.layers[1].self_attn.training
