"""Encoder-decoders: the loss of targets by hand, ROUGE by rouge_score itself, cache bytes, and pairs that are refused."""

import json
import math
from importlib.util import find_spec

import numpy as np
import pytest
import torch

from hf_gqa.evaluate.cost.seq2seq_cache import cache_bytes_of_a_token, measured_cache_bytes_of_a_token, seq2seq_heads
from hf_gqa.evaluate.cost.seq2seq_speed import position_limits, read_source_and_decode, step_weight_bytes
from hf_gqa.evaluate.inputs.seq2seq_pairs import TokenPair
from hf_gqa.evaluate.quality.bootstrap import Bootstrap
from hf_gqa.evaluate.quality.by_length import by_source_length
from hf_gqa.evaluate.quality.rouge import rouge, written
from hf_gqa.evaluate.quality.target_tokens import score_pairs
from hf_gqa.evaluate.report import Report
from hf_gqa.refusal import Refusal
from hf_gqa.text.pairs import TextPair

from .tiny_text_models import VOCAB_SIZE, as_pair, evaluation_of, perturbed, tiny_bart, tiny_t5, tokenizer_of_kind


ROWS = [
    {"source": ["The cat sat.", f"It was {word} there."], "target": [f"The cat sat and was {word}", f"{word} cat"]}
    for word in ("cold", "warm", "there", "not", "seen", "lost", "old", "young", "late")
]
ROWS.append({"source": ["A long story."] * 6, "target": ["Long"]})
FAST = {"dtype": "float32", "speed": False, "peak_memory": False, "generation_tokens": 6, "resamples": 200}
SILENT = FAST | {"rouge_pairs": 0}
with_rouge = pytest.mark.skipif(find_spec("rouge_score") is None, reason="needs the extra hf_gqa[eval]")
every_model = pytest.mark.parametrize("make", [tiny_t5, tiny_bart])


def random_rows(seed: int, count: int = 9) -> list[TokenPair]:
    random = np.random.default_rng(seed)
    lengths = random.integers(1, 12, (count, 2))
    return [
        TokenPair(
            pair=number // 2, **{f"{name}_ids": tuple(random.integers(5, VOCAB_SIZE, size)) for name, size in named}
        )
        for number, named in enumerate(zip(("source", "target"), pair, strict=True) for pair in lengths)
    ]


@torch.no_grad()
def loss_by_hand(model, source, target) -> list[float]:
    """One pair, without padding: the decoder reads its start token and the target, a token late."""
    start = model.config.decoder_start_token_id
    logits = (
        model(input_ids=torch.tensor([source]), decoder_input_ids=torch.tensor([[start, *target[:-1]]]))
        .logits[0]
        .double()
        .log_softmax(-1)
    )
    return [-float(logits[place, token]) for place, token in enumerate(target)]


@every_model
@pytest.mark.parametrize("batch_size", [1, 4, 9])
def test_loss_is_the_one_worked_out_by_hand(make, batch_size):
    donor, rows = make(), random_rows(3)
    student = perturbed(donor)
    scores = score_pairs(donor, student, rows, batch_size)
    assert len(scores) == sum(len(row.target_ids) for row in rows)
    for model, losses_N in ((donor, scores.donor_loss_N), (student, scores.student_loss_N)):
        by_hand = {}
        for row in rows:
            by_hand[row.pair] = by_hand.get(row.pair, 0) + sum(loss_by_hand(model, row.source_ids, row.target_ids))
        found = scores.by_window(losses_N)
        assert found == pytest.approx([by_hand[pair] for pair in range(5)], rel=1e-5, abs=1e-5)
        assert losses_N.mean() == pytest.approx(sum(by_hand.values()) / len(scores), rel=1e-6)


@every_model
def test_a_model_does_not_differ_from_itself(make):
    donor = make()
    scores = score_pairs(donor, donor, random_rows(4), 3)
    assert not scores.kl_N.any() and scores.agrees_N.all()
    assert (scores.donor_loss_N == scores.student_loss_N).all()
    assert score_pairs(donor, perturbed(donor), random_rows(4), 3).kl_N.mean() > 1e-4


def test_lengths_of_sources_hold_every_pair_once():
    donor, rows = tiny_t5(), random_rows(5, 40)
    rows = [
        TokenPair(pair=n, source_ids=row.source_ids * (1 + 3 * (n % 4)), target_ids=row.target_ids)
        for n, row in enumerate(rows)
    ]
    scores = score_pairs(donor, perturbed(donor), rows, 8)
    found = by_source_length(scores, Bootstrap(resamples=100))
    assert sum(row.pairs for row in found) == 40 and sum(row.tokens for row in found) == len(scores)
    assert len(found) > 1 and [row.first_source_tokens for row in found] == sorted(
        row.first_source_tokens for row in found
    )
    lengths = [len(row.source_ids) for row in rows]
    for row in found:
        inside = [n for n, length in enumerate(lengths) if row.first_source_tokens <= length <= row.last_source_tokens]
        losses = [loss for n in inside for loss in loss_by_hand(donor, rows[n].source_ids, rows[n].target_ids)]
        assert row.pairs == len(inside) and row.donor_loss_nats_per_token == pytest.approx(np.mean(losses), rel=1e-5)


@with_rouge
def test_rouge_is_that_of_rouge_score_with_the_best_reference():
    from rouge_score import rouge_scorer as scorer

    pairs = [TextPair(source="x", references=(f"the {word} cats sat", f"a {word}")) for word in "abcdefghij"]
    theirs, ours = [f"the {word} cat" for word in "abcdefghij"], [f"a {word} dog" for word in "abcdefghjj"]
    found = rouge(pairs, theirs, ours, num_beams=1, most_tokens=9, bootstrap=Bootstrap(resamples=300))
    assert [row.metric for row in found] == ["rouge1", "rouge2", "rougeL"]
    for row in found:
        one = scorer.RougeScorer([row.metric], use_stemmer=True)
        means = [
            np.mean(
                [
                    max(one.score(r, text)[row.metric].fmeasure for r in pair.references)
                    for pair, text in zip(pairs, texts, strict=True)
                ]
            )
            for texts in (theirs, ours)
        ]
        assert [row.donor_fraction, row.student_fraction] == pytest.approx(means)
        assert row.difference.value == pytest.approx(means[1] - means[0]) and row.pairs == 10
        assert row.difference.low <= row.difference.value <= row.difference.high


@every_model
@pytest.mark.parametrize("num_beams", [1, 2])
def test_what_is_written_does_not_depend_on_the_batch(make, num_beams):
    model, tokenizer = make(), tokenizer_of_kind("seq2seq")
    sources = [row.source_ids for row in random_rows(6, 5)]
    options = {"num_beams": num_beams, "most_tokens": 5}
    together = written(model, tokenizer, sources, batch_size=5, **options)
    assert together == written(model, tokenizer, sources, batch_size=1, **options)
    answer = model.generate(torch.tensor([sources[2]]), max_new_tokens=5, num_beams=num_beams, do_sample=False)
    assert together[2] == tokenizer.decode(answer[0], skip_special_tokens=True).strip() and any(together)


def test_cache_is_computed_and_measured():
    for model, heads, head_dim in ((tiny_t5(), (4, 4), 8), (tiny_bart(), (2, 2), 8)):
        found = seq2seq_heads(model.config)
        assert (
            found.decoder == found.cross == heads
            and found.head_dim == head_dim
            and found.encoder == heads + heads[: len(found.encoder) - 2]
        )
        computed = cache_bytes_of_a_token(model.config, model.dtype)
        assert computed == (2 * sum(heads) * head_dim * 4,) * 2 == measured_cache_bytes_of_a_token(model)


@every_model
def test_timed_decoding_is_what_generate_does(make):
    model = make()
    tokens = torch.randint(5, VOCAB_SIZE, (2, 7), generator=torch.Generator().manual_seed(1))
    answers, timing = read_source_and_decode(model, tokens, 4)
    wanted = model.generate(
        tokens, min_new_tokens=5, max_new_tokens=5, forced_eos_token_id=None, eos_token_id=None, do_sample=False
    )
    assert torch.equal(answers, wanted[:, 1:]) and timing.first_token_seconds > 0 and timing.decode_seconds > 0


def test_a_step_computes_with_the_decoder_alone():
    """Not with the encoder, nor with the projections of what it says; of the tied embedding all, for the head."""
    model = tiny_t5()
    projections = [
        m for layer in model.decoder.block for m in (layer.layer[1].EncDecAttention.k, layer.layer[1].EncDecAttention.v)
    ]
    left_out = {id(p) for p in model.encoder.parameters()} | {id(m.weight) for m in projections}
    used = [p for p in model.decoder.parameters() if id(p) not in left_out or p is model.shared.weight]
    bias = model.decoder.block[0].layer[0].SelfAttention.relative_attention_bias.weight
    elements = sum(p.numel() for p in used) - bias.numel() + 3 * bias.shape[1]
    head = (
        0
        if model.lm_head.weight is model.shared.weight
        else model.lm_head.weight.numel() - model.shared.weight.numel() + 3 * 24
    )
    assert step_weight_bytes(model, 3) == 4 * (elements + head)
    assert position_limits(model.config) == (None, None) and position_limits(tiny_bart().config) == (80, 80)


@pytest.fixture
def text(tmp_path):
    file = tmp_path / "pairs.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return file


@with_rouge
def test_the_whole_report(text, monkeypatch):
    donor, tokenizer = tiny_t5(), tokenizer_of_kind("seq2seq")
    pair = as_pair(donor, perturbed(donor), tokenizer)
    found = evaluation_of(monkeypatch, pair, text=(str(text),), **FAST)
    assert found.explanation()["pairs"] == found.explanation()["rouge_pairs"] == 10
    report = found.run()
    losses, size = [], 0
    for row in ROWS:
        source = tokenizer(" ".join(row["source"]), truncation=True, max_length=64)["input_ids"]
        for target in row["target"]:
            losses += loss_by_hand(donor, source, tokenizer(target)["input_ids"])
            size += len(target.encode())
    assert report.kind == "seq2seq" and report.text.tokens == len(losses) and report.text.targets == 19
    assert report.donor.loss_nats_per_token == pytest.approx(np.mean(losses), rel=1e-6)
    assert report.donor.perplexity == pytest.approx(math.exp(np.mean(losses)), rel=1e-6)
    assert report.donor.bits_per_byte == pytest.approx(sum(losses) / math.log(2) / size, rel=1e-6)
    assert (
        report.text.truncated_sources == 1
        and "1 of 10 sources are longer than 64 tokens and were cut there." in report.notes
    )
    assert (
        report.differences.kl_nats_per_token.low < report.kl_nats_per_token < report.differences.kl_nats_per_token.high
    )
    assert len(report.rouge) == 3 and report.continuations[0].reference in ROWS[1]["target"]
    assert report.donor.num_hidden_layers == 2 and report.donor.encoder_num_key_value_heads == (4, 4, 4)
    assert report.retrieval == report.by_context == () and report.embeddings is None
    assert Report.from_dict(json.loads(report.to_json())) == report
    assert evaluation_of(monkeypatch, pair, text=(str(text),), **FAST).run() == report


@with_rouge
def test_speed_and_fewer_rouge_pairs(text, monkeypatch):
    donor = tiny_t5()
    pair = as_pair(donor, perturbed(donor), tokenizer_of_kind("seq2seq"))
    few = {"speed": True, "speed_batch_sizes": (2,), "decode_tokens": 3, "repetitions": 3, "rouge_pairs": 2}
    report = evaluation_of(monkeypatch, pair, text=(str(text),), **FAST | few).run()
    assert [(row.batch_size, row.context_tokens) for row in report.speed] == [(2, 16), (2, 64)]
    assert [(row.memory_bytes, row.batch_size) for row in report.capacity] == [(24 * 10**9, 2)]
    assert report.capacity[0].student_context_tokens == report.capacity[0].donor_context_tokens > 1000
    assert all(row.donor_decode_tokens_per_second > 0 and row.allowed_decode_speedup == 1 for row in report.speed)
    assert not any("Latin" in note for note in report.notes)
    assert report.rouge[0].pairs == 2 and "ROUGE is of 2 of the 10 pairs, evenly spread (rouge_pairs)." in report.notes


@with_rouge
def test_a_script_that_rouge_does_not_read_is_named(tmp_path, monkeypatch):
    (tmp_path / "pairs.jsonl").write_text(json.dumps({"source": "a", "target": ["\u043a\u043e\u0442", "cat"]}) + "\n")
    pair = as_pair(tiny_t5(), tiny_t5(), tokenizer_of_kind("seq2seq"))
    report = evaluation_of(monkeypatch, pair, text=(str(tmp_path / "pairs.jsonl"),), **FAST).run()
    assert "ROUGE reads Latin letters and digits only: 1 of 2 references hold none and count as 0." in report.notes
    assert report.differences.loss_nats_per_token is report.rouge[0].difference is None
    assert "The text has 1 pairs; intervals need 8. Give more text." in report.notes


@pytest.mark.parametrize(
    ("rows", "options", "message"),
    [
        (
            [{"source": "a", "goal": "b"}],
            {},
            "pairs.jsonl: has no column 'target' (columns: source, goal), and an encoder-",
        ),
        (
            [{"source": "a", "target": " "}],
            {},
            "pairs.jsonl: row 1, column 'target': is empty. Fill it, or leave the row",
        ),
        (
            [{"source": "a", "target": []}],
            {},
            "pairs.jsonl: row 1, column 'target': is empty. Fill it, or leave the row",
        ),
        (
            [{"source": 3, "target": "b"}],
            {},
            "pairs.jsonl: row 1, column 'source': holds 3, which is neither text nor a ",
        ),
        (
            ROWS,
            {"sampled_tokens": 9, "text": ()},
            "sampled_tokens = 9: means nothing for an encoder-decoder. Leave it out.",
        ),
        (ROWS, {"stride": 9}, "stride = 9: means nothing for an encoder-decoder. Leave it out."),
        ([{"source": "a", "target": "b" * 90}], {}, "text: the target 'bbb"),
        (
            ROWS,
            {"context_length": 81},
            "context_length = 81: the models have positions for 80 tokens. Use 80 or fewer.",
        ),
        (ROWS, {"speed": True, "repetitions": 2}, "speed: repetitions = 2 are too few for a median. Use 3 or more."),
    ],
)
def test_bad_input(rows, options, message, tmp_path, monkeypatch):
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    pair = as_pair(tiny_bart(), tiny_bart(), tokenizer_of_kind("seq2seq"))
    with pytest.raises(Refusal) as refused:
        evaluation_of(monkeypatch, pair, **{"text": (str(tmp_path / "pairs.jsonl"),), **SILENT, **options})
    assert str(refused.value).removeprefix(f"{tmp_path}/").startswith(message)


def test_without_rouge_score_the_extra_is_named(text, monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "rouge_score.rouge_scorer", None)
    pair = as_pair(tiny_t5(), tiny_t5(), tokenizer_of_kind("seq2seq"))
    with pytest.raises(
        Refusal,
        match=r"^rouge: rouge-score cannot be imported \(.*\)\. Run pip install 'hf_gqa\[eval\]', or give --rouge-pairs 0\.$",
    ):
        evaluation_of(monkeypatch, pair, text=(str(text),), **FAST)
    assert evaluation_of(monkeypatch, pair, text=(str(text),), **SILENT).run().rouge == ()
