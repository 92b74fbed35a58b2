"""The donor writes the same corpus whether it was stopped or not, and is itself left as it was."""

import json
import sys

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import GenerationConfig

from hf_gqa import Refusal
from hf_gqa.text import sampled as sampled_text
from hf_gqa.text.sampled import sampled_rows

from .tiny_donors import MODEL_TYPES, SOME_MODEL_TYPES, tiny_donor
from .tiny_tokenizer import letters


WANTED = {"donor_id": "d", "tokens": 100, "sequence_length": 12, "seed": 3, "batch_size": 4}


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "datasets-cache")


def sampled(folder, donor=None, tokenizer=None, **changes):
    return sampled_rows(donor or tiny_donor("llama"), tokenizer or letters(), folder, **WANTED | changes)


def contents(folder) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def tokens_of(rows) -> np.ndarray:
    return np.stack(rows["input_ids"])


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_room_for_all_tokens_changes_none(tmp_path, model_type, monkeypatch):
    """Against the cache that `generate` makes; 12 tokens are more than a sliding window of the tiny donors."""
    rows = tokens_of(sampled(tmp_path / "text", tiny_donor(model_type)))
    monkeypatch.setattr(sampled_text, "roomy_cache", lambda config, length: None)
    assert (rows == tokens_of(sampled(tmp_path / "plain", tiny_donor(model_type)))).all()


@pytest.mark.parametrize("model_type", SOME_MODEL_TYPES)
def test_every_family_fills_its_rows(tmp_path, model_type):
    rows = sampled(tmp_path / "text", tiny_donor(model_type))
    assert len(rows) == 9 and set(rows.features) == {"input_ids", "position_ids"}
    assert tokens_of(rows).shape == (9, 12) and (tokens_of(rows)[:, 0] == 1).all()
    assert sorted(contents(tmp_path / "text")) == ["corpus.json", *(f"shard-0000{n}.safetensors" for n in range(3))]
    assert json.loads((tmp_path / "text" / "corpus.json").read_text()) == {
        **{"donor_id": "d", "seed": 3, "temperature": 1.0, "sequence_length": 12},
        **{"vocab_size": 99, "batch_size": 4, "eos_token_id": 2, "start_token_id": 1},
    }


def test_documents_end_with_eos_and_the_row_goes_on(tmp_path):
    rows = sampled(tmp_path / "text", tokens=2000, batch_size=84)
    assert (tokens_of(rows) == 2).any()
    for row in rows:
        position = 0
        for place, (token, found) in enumerate(zip(row["input_ids"], row["position_ids"], strict=True)):
            assert found == position
            position = 0 if token == 2 and place > 0 else position + 1


@pytest.mark.parametrize(
    ("tokenizer", "first"),
    [(letters(), 1), (letters(bos=False, same=True), 1), (letters(eos=False), 1)],
)
def test_rows_start_as_documents_do(tmp_path, tokenizer, first):
    assert (tokens_of(sampled(tmp_path / "text", tokenizer=tokenizer))[:, 0] == first).all()


def test_eos_starts_rows_where_there_is_no_bos_and_random_tokens_where_there_is_neither(tmp_path, monkeypatch):
    tokenizer = type("Tokenizer", (), {"bos_token_id": None, "eos_token_id": 2})()
    rows = sampled(tmp_path / "eos", tokenizer=tokenizer)
    assert (tokens_of(rows)[:, 0] == 2).all() and (np.stack(rows["position_ids"])[:, :2] == [0, 1]).all()
    tokenizer.eos_token_id = None
    rows = sampled(tmp_path / "neither", tokenizer=tokenizer)
    assert len(set(tokens_of(rows)[:, 0])) > 3
    assert (np.stack(rows["position_ids"]) == np.arange(12)).all()


def test_tokens_have_the_probabilities_of_the_donor(tmp_path):
    donor = tiny_donor("llama")
    donor.generation_config = GenerationConfig(top_k=1, top_p=0.1, repetition_penalty=9.0, eos_token_id=5, max_length=3)
    with torch.no_grad():
        donor.lm_head.weight.mul_(0.1)
        expected = torch.softmax(donor(torch.tensor([[1]])).logits[0, 0] / 0.7, -1)
    rows = sampled(tmp_path / "text", donor, tokens=4000, sequence_length=2, batch_size=2000, temperature=0.7)
    counts = torch.bincount(torch.tensor(tokens_of(rows)[:, 1], dtype=torch.int64), minlength=99)
    statistic = float(((counts - 2000 * expected) ** 2 / (2000 * expected)).sum())
    assert statistic < 153  # chi-squared of 98 degrees of freedom exceeds that once in 3,000 times


def test_stopped_run_goes_on_and_gives_the_same(tmp_path, monkeypatch):
    wanted = sampled(tmp_path / "whole")
    write, written = sampled_text._write, []

    def stop_in_the_second_shard(file, content):
        written.append(file.name)
        if len(written) == 3:
            file.with_name(f".{file.name}.partial").write_bytes(content[:50])
            raise KeyboardInterrupt
        write(file, content)

    monkeypatch.setattr(sampled_text, "_write", stop_in_the_second_shard)
    with pytest.raises(KeyboardInterrupt):
        sampled(tmp_path / "stopped")
    monkeypatch.undo()
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "datasets-cache")
    assert sorted(contents(tmp_path / "stopped")) == [
        ".shard-00001.safetensors.partial", "corpus.json", "shard-00000.safetensors",
    ]  # fmt: skip
    first = (tmp_path / "stopped" / "shard-00000.safetensors").stat().st_mtime_ns
    torch.rand(7)
    found = sampled(tmp_path / "stopped")
    assert contents(tmp_path / "stopped") == contents(tmp_path / "whole")
    assert (tmp_path / "stopped" / "shard-00000.safetensors").stat().st_mtime_ns == first
    assert np.array_equal(tokens_of(found), tokens_of(wanted))


def test_run_stopped_before_its_settings_were_written_goes_on(tmp_path):
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / ".corpus.json.partial").write_text("{")
    assert len(sampled(tmp_path / "text")) == 9


def test_more_tokens_are_sampled_after_those_that_are_there(tmp_path):
    few, many = sampled(tmp_path / "text"), sampled(tmp_path / "text", tokens=200)
    assert len(many) == 17 and np.array_equal(tokens_of(many)[:9], tokens_of(few))
    again = sampled(tmp_path / "text")
    assert np.array_equal(tokens_of(again), tokens_of(few))
    other = sampled(tmp_path / "other", seed=4)
    assert not np.array_equal(tokens_of(other), tokens_of(few))


def test_donor_and_random_numbers_are_left_as_they_were(tmp_path):
    donor = tiny_donor("gpt2").train()
    donor.transformer.h[0].eval()
    modes = [module.training for module in donor.modules()]
    own, torch_state, numpy_state = donor.generation_config, torch.get_rng_state(), np.random.get_state()[1].copy()
    config = donor.config.to_dict()
    weights = {name: tensor.clone() for name, tensor in donor.state_dict().items()}
    rows = sampled(tmp_path / "text", donor)
    assert [module.training for module in donor.modules()] == modes
    assert donor.generation_config is own and donor.config.to_dict() == config
    assert torch.equal(torch.get_rng_state(), torch_state)
    assert np.array_equal(np.random.get_state()[1], numpy_state)
    assert all(torch.equal(tensor, weights[name]) for name, tensor in donor.state_dict().items())
    assert np.array_equal(tokens_of(sampled(tmp_path / "eval", donor.eval())), tokens_of(rows))  # without dropout


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tokens": 0}, "tokens = 0: is not a positive number. Use one."),
        ({"temperature": 0.0}, "temperature = 0.0: is not a positive number. Use one."),
        ({"temperature": float("nan")}, "temperature = nan: is not a positive number. Use one."),
        ({"batch_size": -1}, "batch_size = -1: is not a positive number. Use one."),
        ({"sequence_length": 1}, "sequence_length = 1: a row needs at least 2 tokens. Use 2 or more."),
        ({"seed": -1}, "seed = -1: is negative. Use 0 or more."),
    ],
)
def test_numbers_out_of_range_are_refused(tmp_path, changes, message):
    with pytest.raises(Refusal) as refusal:
        sampled(tmp_path / "text", **changes)
    assert str(refusal.value) == message and not (tmp_path / "text").exists()


@pytest.mark.parametrize(
    ("changes", "difference"),
    [
        ({"donor_id": "e"}, "donor_id = 'd', now it is 'e'. Give another folder, or the same donor_id."),
        ({"seed": 4}, "seed = 3, now it is 4. Give another folder, or the same seed."),
        ({"temperature": 0.5}, "temperature = 1.0, now it is 0.5. Give another folder, or the same temperature."),
        ({"sequence_length": 6}, "sequence_length = 12, now it is 6. Give another folder, or the same sequence_length."),
        ({"batch_size": 2}, "batch_size = 4, now it is 2. Give another folder, or the same batch_size."),
        (
            {"donor": tiny_donor("llama", vocab_size=100)},
            "vocab_size = 99, now it is 100. Give another folder, or the same vocab_size.",
        ),
        (
            {"tokenizer": letters(eos=False)},
            "eos_token_id = 2, now it is None. Give another folder, or the same eos_token_id.",
        ),
    ],
)  # fmt: skip
def test_folder_made_with_other_settings_is_refused(tmp_path, changes, difference):
    folder = tmp_path / "text"
    sampled(folder, tokens=12)
    before = contents(folder)
    with pytest.raises(Refusal) as refusal:
        sampled(folder, **changes)
    assert str(refusal.value) == f"{folder / 'corpus.json'}: this text was sampled with {difference}"
    assert contents(folder) == before


def test_folder_of_something_else_is_refused(tmp_path):
    (tmp_path / "file.txt").write_text("mine")
    for folder in (tmp_path, tmp_path / "file.txt"):
        with pytest.raises(Refusal) as refusal:
            sampled(folder)
        assert str(refusal.value) == (
            f"{folder}: exists and holds no corpus.json. Give another folder for the sampled text."
        )


def test_damaged_settings_are_refused(tmp_path):
    (tmp_path / "corpus.json").write_text("{")
    with pytest.raises(Refusal) as refusal:
        sampled(tmp_path)
    assert str(refusal.value) == (
        f"{tmp_path / 'corpus.json'}: not readable JSON (Expecting property name enclosed in double quotes: line 1 column 2 "
        f"(char 1)). Remove the folder, and sample again."
    )


def test_damaged_shards_are_refused(tmp_path):
    sampled(tmp_path / "text")
    shard = tmp_path / "text" / "shard-00001.safetensors"
    tokens = load_file(shard)["input_ids"]
    shard.write_bytes(shard.read_bytes()[:-1])
    with pytest.raises(Refusal) as refusal:
        sampled(tmp_path / "text")
    assert str(refusal.value).startswith(f"{shard}: is damaged (")
    assert str(refusal.value).endswith("). Remove it, and run again.")
    save_file({"input_ids": tokens[:3]}, shard)
    with pytest.raises(Refusal) as refusal:
        sampled(tmp_path / "text")
    assert str(refusal.value) == f"{shard}: has shape [3, 12], not [4, 12]. Remove it, and run again."


def test_bar_is_shown_on_terminals_only(tmp_path, capsys, monkeypatch):
    sampled(tmp_path / "silent")
    assert "Sampling" not in capsys.readouterr().err
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    monkeypatch.setattr("hf_gqa.progress_bar.are_progress_bars_disabled", lambda: False)  # by a command of another test
    sampled(tmp_path / "shown")
    assert "Sampling: 100%" in capsys.readouterr().err
