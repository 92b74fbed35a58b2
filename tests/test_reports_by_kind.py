"""Page, terminal, verdict and card of encoder-decoders and encoders: what they have is shown, what they have not is not."""

import json
import re

import pytest
from huggingface_hub import ModelCard
from transformers import (
    BertConfig,
    BertForMaskedLM,
    BertForSequenceClassification,
    BertModel,
    LlamaConfig,
    LlamaModel,
    RobertaConfig,
    RobertaModel,
    T5Config,
    T5EncoderModel,
    T5ForConditionalGeneration,
    WhisperConfig,
    WhisperForConditionalGeneration,
)

from hf_gqa.cli.report_tables import print_report
from hf_gqa.convert.model_kind import kind_of, why_no_kind
from hf_gqa.evaluate.inputs.opened import positions
from hf_gqa.evaluate.page.page import make_page
from hf_gqa.evaluate.report import Report
from hf_gqa.evaluate.report.verdict import verdict
from hf_gqa.export.card_lint import lint_card
from hf_gqa.export.licence import Licence
from hf_gqa.export.model_card import card_of
from hf_gqa.refusal import Refusal

from .balanced_page import Balanced
from .sample_report import sample_report
from .sample_reports_by_kind import encoder_report, masked_report, seq2seq_report


REPORTS = {"seq2seq": seq2seq_report, "masked_lm": masked_report, "encoder": encoder_report}
every_kind = pytest.mark.parametrize("kind", REPORTS)
LICENCE = Licence(license="apache-2.0", license_name=None, license_link=None, source="the donor's")


def card(report: Report) -> str:
    return str(card_of(report, name="student", base_model="donor", licence=LICENCE))


@every_kind
def test_reports_round_trip(kind):
    report = REPORTS[kind]()
    assert Report.from_dict(json.loads(report.to_json())) == report


def test_a_report_without_what_came_later_is_read():
    values = sample_report().to_dict()
    for name in ("kind", "by_source_length", "rouge", "embeddings", "encoding_speed"):
        del values[name]
    for name in ("targets", "truncated_sources", "masked_fraction"):
        del values["text"][name]
    assert Report.from_dict(values) == sample_report()
    with pytest.raises(
        Refusal, match=r"^report: kind = 'speech', expected one of causal_lm, seq2seq, masked_lm, encoder"
    ):
        Report.from_dict(sample_report().to_dict() | {"kind": "speech"})


@every_kind
def test_page_terminal_and_card_show_what_there_is_and_nothing_else(kind, capsys):
    report = REPORTS[kind]()
    page = make_page(report)
    Balanced(page)
    print_report(report)
    shown = {"page": page, "terminal": capsys.readouterr().out, "card": card(report)}
    has = {
        "seq2seq": ("targets", "rougeL", "source, tokens", "0.387"),
        "masked_lm": ("masked tokens", "cosine", "0.9713", "0.8846", "sequences/s"),
        "encoder": ("cosine", "0.9713", "0.8846", "sequences/s"),
    }
    lacks = {
        "seq2seq": ("cosine", "sequences/s", "Retrieval", "context that fits", "None"),
        "masked_lm": ("bits per byte", "cache per", "rouge", "Retrieval", "Capacity", "None", "per token)"),
        "encoder": ("bits per byte", "cache per", "erplexity", "KL", "likeliest", "rouge", "None", "nats"),
    }
    for where, text in shown.items():
        text = text.partition("Record of the conversion")[0].partition("## Recipe")[0]
        text = re.sub(r"<style>.*?</style>", "", text, flags=re.DOTALL)
        for words in has[kind]:
            assert words in text, (where, words)
        for words in lacks[kind]:
            assert words not in text, (where, words)


def test_verdicts():
    assert verdict(seq2seq_report()) == (
        "The cache is 4x smaller (12 KiB to 3 KiB per written token), of the source 4x smaller (12 KiB to 3 KiB per source token), and "
        "decoding is faster wherever it was measured (1.09x to 2x at batch 1 to 16 and source 128 to 480; the bytes moved "
        "would allow 1.19x to 3.01x). It costs 0.08 nats per token of loss (95% interval 0.071 to 0.0894; perplexity 22.2 to "
        "24.05; KL 0.0912), 0.203 for sources of 65 to 119 tokens; both expect the same next token 84.34% of the time. What "
        "it writes is farther from the references (rougeL 0.351 to 0.322)."
    )
    assert verdict(masked_report()) == (
        "Reading is faster in 2 and slower in 0 of 2 settings (1.07x at batch 1 to 16 and length 128). It costs 0.08 nats per "
        "token of loss (95% interval 0.071 to 0.0894; perplexity 22.2 to 24.05; KL 0.0912); both guess the same token 84.34% "
        "of the time. Its embeddings have a cosine of 0.9713 to the donor's (95% interval 0.9688 to 0.9737), and the rank "
        "correlation of their similarities to one another is 0.8846."
    )
    assert verdict(encoder_report()) == (
        "Reading is faster in 2 and slower in 0 of 2 settings (1.07x at batch 1 to 16 and length 128). Its embeddings have a "
        "cosine of 0.9713 to the donor's (95% interval 0.9688 to 0.9737), and the rank correlation of their similarities to "
        "one another is 0.8846."
    )


@every_kind
def test_cards_are_loaded_by_their_class_and_borne_out(kind):
    report = REPORTS[kind]()
    text = card(report)
    data = ModelCard(text).data.to_dict()
    auto, pipeline = {
        "seq2seq": ("AutoModelForSeq2SeqLM", None),
        "masked_lm": ("AutoModelForMaskedLM", "fill-mask"),
        "encoder": ("AutoModel", "feature-extraction"),
    }[kind]
    assert f"import {auto}, AutoTokenizer" in text and f"{auto}.from_pretrained" in text
    assert data.get("pipeline_tag") == pipeline and lint_card(text, report) == []
    metrics = {metric["type"] for result in data["model-index"][0]["results"] for metric in result["metrics"]}
    assert ("perplexity" in metrics) is (kind != "encoder") and ("rougeL" in metrics) is (kind == "seq2seq")
    assert ("cosine" in metrics) is (kind != "seq2seq")
    rows = [line for line in text.splitlines() if line.startswith("|") and re.search(r"\d", line)]
    assert len(rows) > 3
    for row in rows:
        digit = re.search(r"\d", row).start()
        altered = f"{row[:digit]}{(int(row[digit]) + 1) % 10}{row[digit + 1 :]}"
        assert lint_card(text.replace(row, altered, 1), report), row


@pytest.mark.parametrize(
    ("model_class", "config_class", "kind"),
    [
        (T5ForConditionalGeneration, T5Config, "seq2seq"),
        (T5EncoderModel, T5Config, None),
        (BertForMaskedLM, BertConfig, "masked_lm"),
        (BertModel, BertConfig, "encoder"),
        (BertForSequenceClassification, BertConfig, "encoder"),
        (LlamaModel, LlamaConfig, None),
        (WhisperForConditionalGeneration, WhisperConfig, None),
    ],
)
def test_kinds(model_class, config_class, kind):
    assert kind_of(model_class, config_class()) == kind


def test_sound_is_refused_with_its_reason():
    assert why_no_kind(WhisperForConditionalGeneration, WhisperConfig()) == (
        "is a WhisperForConditionalGeneration, which reads sound, and only text is evaluated"
    )


def test_positions_begin_behind_the_padding_token():
    sizes = {
        "hidden_size": 8,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "intermediate_size": 8,
        "vocab_size": 9,
    }
    assert positions(RobertaModel(RobertaConfig(max_position_embeddings=22, pad_token_id=1, **sizes))) == 20
    assert positions(BertModel(BertConfig(max_position_embeddings=22, **sizes))) == 22
