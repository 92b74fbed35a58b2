"""Encoders: masked tokens by hand, the same masks for both models and twice, embeddings, and options that mean nothing."""

import json
import math

import numpy as np
import pytest
import torch
from transformers import BertForSequenceClassification

from hf_gqa.evaluate.quality.bootstrap import Bootstrap
from hf_gqa.evaluate.quality.embeddings import compare_embeddings, embedded, rank_correlation
from hf_gqa.evaluate.quality.masked_tokens import MaskedWindow, score_masked
from hf_gqa.evaluate.report import Report
from hf_gqa.refusal import Refusal

from .tiny_text_models import (
    VOCAB_SIZE,
    as_pair,
    evaluation_of,
    perturbed,
    tiny_bert,
    tiny_sentence_bert,
    tokenizer_of_kind,
)


FAST = {"dtype": "float32", "speed": False, "peak_memory": False, "resamples": 200, "context_length": 32}
DOCUMENTS = [
    f"{word} was the word that she said when they came" * (1 + n % 3)
    for n, word in enumerate(["I", "We", "You", "It", "One"])
]
DOCUMENTS += ["a", "So it is."]


def random_windows(count: int = 7) -> list[MaskedWindow]:
    random = np.random.default_rng(2)
    windows = []
    for size in random.integers(3, 14, count):
        masked = random.choice(size, size=max(1, size // 4), replace=False)
        tokens = random.integers(5, VOCAB_SIZE, size)
        windows.append(MaskedWindow(tokens=tuple(map(int, tokens)), masked=tuple(sorted(map(int, masked)))))
    return windows


@torch.no_grad()
def losses_by_hand(model, tokens, masked, mask_token: int = 3) -> list[float]:
    """One window, without padding."""
    read = torch.tensor([tokens])
    read[0, list(masked)] = mask_token
    logs = model(input_ids=read).logits[0].double().log_softmax(-1)
    return [-float(logs[place, tokens[place]]) for place in masked]


@pytest.mark.parametrize("batch_size", [1, 3, 7])
def test_loss_is_the_one_worked_out_by_hand(batch_size):
    donor, windows = tiny_bert(), random_windows()
    student = perturbed(donor)
    scores = score_masked(donor, student, windows, 3, batch_size)
    for model, losses_N in ((donor, scores.donor_loss_N), (student, scores.student_loss_N)):
        by_hand = [losses_by_hand(model, window.tokens, window.masked) for window in windows]
        assert scores.by_window(losses_N) == pytest.approx([sum(one) for one in by_hand], rel=1e-5, abs=1e-5)
        assert losses_N.mean() == pytest.approx(np.mean([loss for one in by_hand for loss in one]), rel=1e-6)
    assert scores.kl_N.mean() > 1e-4


def test_a_model_does_not_differ_from_itself():
    donor = tiny_bert()
    scores = score_masked(donor, donor, random_windows(), 3, 4)
    assert not scores.kl_N.any() and scores.agrees_N.all()
    rows_WE = embedded(donor, [window.tokens for window in random_windows()], 3)
    found = compare_embeddings(rows_WE, rows_WE, Bootstrap())
    assert found.mean_cosine == pytest.approx(1, abs=1e-12) and found.spearman == pytest.approx(1, abs=1e-12)


def test_an_embedding_is_the_mean_over_its_own_tokens():
    """Whatever it is padded with."""
    model, windows = tiny_sentence_bert(), [window.tokens for window in random_windows()]
    with torch.no_grad():
        alone = np.stack([model(input_ids=torch.tensor([w])).last_hidden_state[0].mean(0).numpy() for w in windows])
    for batch_size in (1, 2, 7):
        assert embedded(model, windows, batch_size) == pytest.approx(alone, abs=1e-5)
    student = embedded(perturbed(model, 1.0), windows, 4)
    found = compare_embeddings(alone, student, Bootstrap())
    cosines = [
        one @ other / np.linalg.norm(one) / np.linalg.norm(other) for one, other in zip(alone, student, strict=True)
    ]
    assert found.mean_cosine == pytest.approx(np.mean(cosines), abs=1e-6) and found.mean_cosine < 1 - 1e-6
    assert found.spearman_windows == found.windows == 7 and found.cosine is None


def test_rank_correlation_is_spearmans():
    one, other = np.array([3.0, 1, 2, 2, 5]), np.array([1.0, 4, 2, 9, 9])
    wanted = np.corrcoef([4, 1, 2.5, 2.5, 5], [1, 3, 2, 4.5, 4.5])[0, 1]  # mean ranks of what is equal
    assert rank_correlation(one, other) == pytest.approx(wanted)
    assert rank_correlation(one, -one) == pytest.approx(-1) and rank_correlation(one, np.ones(5)) is None


@pytest.fixture
def text(tmp_path):
    file = tmp_path / "text.jsonl"
    file.write_text("".join(json.dumps({"text": text}) + "\n" for text in DOCUMENTS))
    return file


def test_the_whole_report_of_a_masked_model(text, monkeypatch):
    donor, tokenizer = tiny_bert(), tokenizer_of_kind("masked_lm")
    pair = as_pair(donor, perturbed(donor), tokenizer)
    evaluation = evaluation_of(monkeypatch, pair, text=(str(text),), **FAST)
    windows = evaluation.measurement.masked
    again = evaluation_of(monkeypatch, pair, text=(str(text),), batch_size=1, **FAST)
    other = evaluation_of(monkeypatch, pair, text=(str(text),), seed=1, **FAST).measurement.masked
    assert windows == again.measurement.masked != other
    for window in windows:
        assert window.tokens[0] == tokenizer.bos_token_id and window.tokens[-1] == tokenizer.eos_token_id
        own = len(window.tokens) - 2
        assert (
            len(window.masked) == max(1, round(0.15 * own)) and window.masked[0] > 0 and window.masked[-1] <= own <= 30
        )
    read = "".join(tokenizer.decode(window.tokens[1:-1]) for window in windows)
    assert read.replace(" ", "") == "".join(DOCUMENTS).replace(" ", "")
    report = evaluation.run()
    losses = [loss for window in windows for loss in losses_by_hand(donor, window.tokens, window.masked)]
    assert report.donor.loss_nats_per_token == pytest.approx(np.mean(losses), rel=1e-6)
    assert report.donor.perplexity == pytest.approx(math.exp(np.mean(losses)), rel=1e-6)
    assert report.kind == "masked_lm" and report.text.tokens == len(losses) and report.text.masked_fraction == 0.15
    assert report.differences.loss_nats_per_token.low < report.differences.loss_nats_per_token.high
    assert (
        report.embeddings.windows == len(windows) and report.embeddings.cosine.low < report.embeddings.cosine.high < 1
    )
    for model in (report.donor, report.student):
        assert (
            model.bits_per_byte is model.cache_bytes_per_token_computed is model.cache_bytes_per_token_measured is None
        )
    assert report.speed == report.retrieval == report.capacity == report.continuations == ()
    assert Report.from_dict(json.loads(report.to_json())) == report
    assert again.run().kl_nats_per_token == pytest.approx(report.kl_nats_per_token, rel=1e-5)


@pytest.mark.parametrize("make", [tiny_sentence_bert, lambda: tiny_bert(BertForSequenceClassification)])
def test_an_encoder_without_that_head_has_embeddings_and_speed(make, text, monkeypatch):
    donor = make()
    pair = as_pair(donor, perturbed(donor, 1.0), tokenizer_of_kind("encoder"))
    timed = {"speed": True, "repetitions": 3, "speed_batch_sizes": (2,)}
    report = evaluation_of(monkeypatch, pair, text=(str(text),), **FAST | timed).run()
    assert report.kind == "encoder" and report.donor.loss_nats_per_token is report.kl_nats_per_token is None
    assert report.text.masked_fraction is None and report.text.tokens > 100 and 0 < report.embeddings.mean_cosine < 1
    assert [(row.batch_size, row.length_tokens, row.repetitions) for row in report.encoding_speed] == [
        (2, 8, 3),
        (2, 32, 3),
    ]
    assert all(row.speedup_low <= row.speedup <= row.speedup_high for row in report.encoding_speed)
    assert Report.from_dict(json.loads(report.to_json())) == report
    noted = any("What BertForSequenceClassification makes of its embeddings" in note for note in report.notes)
    assert noted is (type(donor) is BertForSequenceClassification)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sampled_tokens": 9, "text": ()}, "sampled_tokens = 9: means nothing for an encoder. Leave it out."),
        ({"stride": 9}, "stride = 9: means nothing for an encoder. Leave it out."),
        ({"context_length": 65}, "context_length = 65: the models have positions for 64 tokens. Use 64 or fewer."),
        ({"context_length": 2}, "context_length = 2: leaves no room beside the special tokens. Use more."),
        ({"speed": True, "repetitions": 1}, "speed: repetitions = 1 are too few for a median. Use 3 or more."),
        (
            {"speed": True, "speed_context_lengths": (99,)},
            "speed: sequences of 99 tokens are longer than the 64 positions of",
        ),
    ],
)
def test_bad_input(options, message, text, monkeypatch):
    pair = as_pair(tiny_bert(), tiny_bert(), tokenizer_of_kind("masked_lm"))
    with pytest.raises(Refusal) as refused:
        evaluation_of(monkeypatch, pair, **{"text": (str(text),), **FAST, **options})
    assert str(refused.value).startswith(message)


def test_without_a_mask_token_nothing_can_be_masked(text, monkeypatch):
    tokenizer = tokenizer_of_kind("masked_lm")
    tokenizer.mask_token = None
    with pytest.raises(
        Refusal, match=r"^tokenizer: has no mask token, so nothing can be masked\. Give the donor's own"
    ):
        evaluation_of(monkeypatch, as_pair(tiny_bert(), tiny_bert(), tokenizer), text=(str(text),), **FAST)
