"""From a donor on disk through the converted student to report, card and command line, for encoders and encoder-decoders."""

import json
from importlib.util import find_spec

import pytest

from hf_gqa import convert_checkpoint
from hf_gqa.convert.families import FAMILIES
from hf_gqa.evaluate import evaluate
from hf_gqa.evaluate.page.page import make_page
from hf_gqa.evaluate.report import Report
from hf_gqa.export.card_lint import lint_card
from hf_gqa.export.model_card import make_card

from .command_line import assert_one_message, run_cli
from .tiny_text_models import tiny_bert, tiny_sentence_bert, tiny_t5, tokenizer_of_kind


FAST = {"dtype": "float32", "speed": False, "peak_memory": False, "resamples": 100, "generation_tokens": 5}
FAST |= {} if find_spec("rouge_score") else {"rouge_pairs": 0}
MAKE = {"masked_lm": tiny_bert, "encoder": tiny_sentence_bert}
MAKE |= {"seq2seq": tiny_t5} if "t5" in FAMILIES.names() else {}


@pytest.fixture(scope="module", params=MAKE)
def made(request, tmp_path_factory):
    """(kind, folder with donor, student of two heads, the donor again, and text)."""
    kind, folder = request.param, tmp_path_factory.mktemp(request.param)
    MAKE[kind]().save_pretrained(folder / "donor")
    tokenizer_of_kind(kind).save_pretrained(folder / "donor")
    for name, heads in (("student", 2), ("same", 4)):
        convert_checkpoint(folder / "donor", folder / name, num_key_value_heads=heads, export="bundle")
    rows = [
        {"text": f"It was {word} there", "source": f"It was {word}.", "target": f"{word} it was"}
        for word in "abcdefghij"
    ]
    (folder / "text.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return kind, folder


def test_a_converted_student_is_measured_and_shown(made):
    kind, folder = made
    report = evaluate(folder / "student", folder / "donor", text=str(folder / "text.jsonl"), **FAST)
    assert report.kind == kind and report.conversion["plan"]["num_key_value_heads"] == 2
    assert report.donor.num_key_value_heads == (4, 4) and report.student.num_key_value_heads == (2, 2)
    assert Report.from_dict(json.loads(report.to_json())) == report
    if kind == "seq2seq":
        assert report.student.cache_bytes_per_token_computed == report.student.cache_bytes_per_token_measured
        assert report.student.cache_bytes_per_token_measured == report.donor.cache_bytes_per_token_measured / 2
        source = report.student.cache_bytes_per_source_token_measured
        assert source == report.student.cache_bytes_per_source_token_computed
        assert source == report.donor.cache_bytes_per_source_token_measured / 2
    else:
        assert report.embeddings.mean_cosine < 1 and report.student.cache_bytes_per_token_measured is None
    if kind != "encoder":
        assert report.kl_nats_per_token > 0
    card = str(make_card(report, folder / "student"))
    assert lint_card(card, report, folder / "student") == [] and make_page(report)


def test_a_student_that_is_the_donor_again_does_not_differ(made):
    kind, folder = made
    report = evaluate(folder / "same", folder / "donor", text=str(folder / "text.jsonl"), **FAST)
    if kind == "encoder":
        assert report.kl_nats_per_token is None
    else:
        assert report.kl_nats_per_token == 0 and report.top1_agreement_fraction == 1
    if kind != "seq2seq":
        assert report.embeddings.mean_cosine == pytest.approx(1, abs=1e-9)


def test_the_command_writes_and_prints_it(made, tmp_path):
    kind, folder = made
    arguments = ["evaluate", folder / "student", "--donor", folder / "donor", "--text", folder / "text.jsonl"]
    options = ["--no-speed", "--no-peak-memory", "--resamples", "100", "--generation-tokens", "5", "--dtype", "float32"]
    options += ["--rouge-pairs", "0"] if "rouge_pairs" in FAST else []
    done = run_cli(*arguments, *options, "--output-dir", tmp_path / "report")
    assert done.exit_code == 0, done.output
    assert Report.read(tmp_path / "report").kind == kind and (tmp_path / "report/report.html").is_file()
    assert {"masked_lm": "masked tokens", "encoder": "cosine", "seq2seq": "loss of the targets"}[kind] in done.output


def test_one_recipe_from_donor_to_card(made, tmp_path):
    kind, folder = made
    evaluating = {"text": [str(folder / "text.jsonl")], **FAST, "memory": ["1GB"]}
    recipe = {"donor": str(folder / "donor"), "output_dir": str(tmp_path / "run"), "evaluate": evaluating}
    (tmp_path / "recipe.yaml").write_text(json.dumps(recipe | {"convert": {"num_key_value_heads": 2}}))
    done = run_cli("run", tmp_path / "recipe.yaml")
    assert done.exit_code == 0, done.output
    report = Report.read(tmp_path / "run/report")
    card = next((tmp_path / "run").rglob("README.md"))
    assert report.kind == kind and lint_card(card.read_text(), report, card.parent) == []


@pytest.mark.slow
def test_peak_memory_is_measured_in_a_fresh_process(made):
    from hf_gqa.evaluate.cost.peak_memory import peak_memory_bytes

    kind, folder = made
    settings = {"dtype": "float32", "batch_size": 2, "context_tokens": 16, "decode_tokens": 2, "kind": kind}
    assert peak_memory_bytes(folder / "student", **settings) > 0


def test_another_kind_than_the_donors_is_refused(made, tmp_path):
    _, folder = made
    arguments = ["--donor", "examples/donor", "--text", folder / "text.jsonl", "--output-dir", tmp_path / "report"]
    assert_one_message(run_cli("evaluate", folder / "student", *arguments), 2, "Convert a donor with a causal")
