"""The whole evaluation: against perplexity worked out by hand, the same twice, and bad input refused."""

import json
import math
import shlex
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_gqa import convert, convert_checkpoint
from hf_gqa.convert.cache_bytes import cache_bytes_by_class, cache_bytes_computed
from hf_gqa.evaluate.evaluation import Evaluation, evaluate
from hf_gqa.evaluate.recipe import EvaluationRecipe
from hf_gqa.evaluate.report import PAGE_FILE, REPORT_FILE, Report
from hf_gqa.refusal import Refusal

from .command_line import assert_one_message, run_cli
from .tiny_donors import tiny_donor


DONOR = "examples/donor"
SENTENCES = (
    "Once upon a time there was a little girl who lived near the old forest with her mother and her brother.",
    "The captain looked at the sea for a long time, and said nothing; then he turned and went below.",
    "It was in the spring of that year that my uncle first spoke to me of the house upon the hill.",
)
FAST = {"context_length": 48, "dtype": "float32", "retrieval_samples": 0, "speed": False, "peak_memory": False}
FAST |= {"continuation_tokens": 4, "resamples": 200}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A student of two KV heads, one that is the donor again, and text of several documents."""
    made = tmp_path_factory.mktemp("evaluation")
    convert_checkpoint(DONOR, made / "student", num_key_value_heads=2)
    convert_checkpoint(DONOR, made / "same", num_key_value_heads=8)
    documents = [" ".join(SENTENCES[n:] + SENTENCES[:n]) * 3 for n in range(3)] + ["Yes.", ""]
    (made / "text.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in documents))
    return made


@pytest.fixture(scope="module")
def report(folder) -> Report:
    return evaluate(folder / "student", DONOR, text=str(folder / "text.jsonl"), **FAST)


@torch.no_grad()
def losses_by_hand(name: str, documents: list[str], context: int) -> list[float]:
    """Plain transformers: BOS before each document, windows that begin with the last token of the one before."""
    tokenizer = AutoTokenizer.from_pretrained(DONOR)
    model = AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32).eval()
    losses = []
    for text in documents:
        tokens = [tokenizer.bos_token_id, *tokenizer(text, add_special_tokens=False)["input_ids"]]
        windows = {}
        for target in range(1, len(tokens)):
            end = min(len(tokens) - 1, math.ceil(target / context) * context)  # of the window that scores it
            begin = max(0, end - context)
            if begin not in windows:
                windows[begin] = model(torch.tensor([tokens[begin:end]])).logits[0].double().log_softmax(-1)
            losses.append(float(-windows[begin][target - begin - 1, tokens[target]]))
    return losses


def test_perplexity_is_the_one_worked_out_by_hand(folder, report):
    documents = [json.loads(line)["text"] for line in (folder / "text.jsonl").read_text().splitlines()][:-1]
    for name, side in ((DONOR, report.donor), (folder / "student", report.student)):
        losses = losses_by_hand(str(name), documents, 48)
        mean = sum(losses) / len(losses)
        assert report.text.tokens == len(losses) and report.text.documents == 4
        assert side.perplexity == pytest.approx(math.exp(mean), rel=1e-6)
        assert side.loss_nats_per_token == pytest.approx(mean, rel=1e-6)
        size = sum(len(text.encode()) for text in documents)
        assert report.text.text_bytes == size
        assert side.bits_per_byte == pytest.approx(sum(losses) / math.log(2) / size, rel=1e-6)


def test_differences_are_those_of_the_two_sides(report):
    found, donor, student = report.differences, report.donor, report.student
    assert found.loss_nats_per_token.value == pytest.approx(student.loss_nats_per_token - donor.loss_nats_per_token)
    assert found.perplexity_ratio.value == pytest.approx(student.perplexity / donor.perplexity)
    assert found.bits_per_byte.value == pytest.approx(student.bits_per_byte - donor.bits_per_byte)
    assert found.kl_nats_per_token.value == pytest.approx(report.kl_nats_per_token) and report.kl_nats_per_token > 1
    assert found.top1_agreement_fraction.value == pytest.approx(report.top1_agreement_fraction)
    for name in found.__dataclass_fields__:
        interval = getattr(found, name)
        assert interval.low < interval.value < interval.high


def test_cache_is_counted_and_measured(report):
    for side, heads in ((report.donor, 8), (report.student, 2)):
        assert side.num_key_value_heads == (heads,) * 6
        assert side.cache_bytes_per_token_computed == side.cache_bytes_per_token_measured == 6 * 2 * heads * 32 * 4
    assert report.student.weight_bytes == report.student.parameters * 4


def test_the_donor_does_not_differ_from_itself(folder):
    found = evaluate(folder / "same", DONOR, text=[str(folder / "text.jsonl")], **FAST)
    assert found.kl_nats_per_token == 0 and found.top1_agreement_fraction == 1
    assert found.donor.loss_nats_per_token == found.student.loss_nats_per_token
    loss = found.differences.loss_nats_per_token
    assert (loss.value, loss.low, loss.high) == (0, 0, 0)


def test_same_numbers_twice_and_by_the_command_it_names(folder, report, tmp_path):
    assert evaluate(folder / "student", DONOR, text=str(folder / "text.jsonl"), **FAST) == report
    words = shlex.split(report.command)
    assert words[:3] == ["hf-gqa", "evaluate", str(folder / "student")]
    done = run_cli(*words[1:], "--output-dir", str(tmp_path / "report"), "--json")
    assert done.exit_code == 0, done.stderr
    assert Report.read(tmp_path / "report") == replace(report, command=report.command)
    assert json.loads(done.stdout) == json.loads(report.to_json())
    assert {path.name for path in (tmp_path / "report").iterdir()} == {REPORT_FILE, PAGE_FILE}


def test_batch_size_changes_rounding_alone(folder, report):
    found = evaluate(folder / "student", DONOR, text=str(folder / "text.jsonl"), batch_size=3, **FAST)
    assert found.settings.batch_size == 3 != report.settings.batch_size
    assert found.student.perplexity == pytest.approx(report.student.perplexity, rel=1e-5)
    assert found.kl_nats_per_token == pytest.approx(report.kl_nats_per_token, rel=1e-5)


def test_a_stride_gives_more_context_and_so_less_loss(folder, report):
    found = evaluate(folder / "student", DONOR, text=str(folder / "text.jsonl"), stride=8, **FAST)
    assert found.text.tokens == report.text.tokens and found.text.windows > report.text.windows
    assert found.donor.loss_nats_per_token < report.donor.loss_nats_per_token


def test_everything_at_once(folder):
    """Recall, speed, memory, and what the student wrote before; and through JSON."""
    asked = FAST | {"retrieval_samples": 2, "speed": True, "peak_memory": True, "context_length": 64}
    asked |= {"repetitions": 3, "decode_tokens": 2, "speed_batch_sizes": (1,), "speed_context_lengths": (8, 16)}
    asked |= {"memory": ("16MB", "1GB"), "prompts": ("Once upon a time",), "max_tokens": 300}
    found = evaluate(folder / "student", DONOR, text=str(folder / "text.jsonl"), converted=folder / "same", **asked)
    assert Report.from_dict(json.loads(found.to_json())) == found
    assert [speed.context_tokens for speed in found.speed] == [8, 16]
    assert {row.task for row in found.retrieval} >= {"repeated_tokens"}
    assert [size.memory_bytes for size in found.capacity] == [16_000_000, 10**9]
    assert found.capacity[1].student_context_tokens > 3 * found.capacity[1].donor_context_tokens
    assert found.donor.peak_memory_bytes is None or found.donor.peak_memory_bytes > 10_000_000
    (written,) = found.continuations
    assert written.converted == written.donor != written.student and written.prompt == "Once upon a time"
    assert found.text.tokens == 300 and any("Only the first 300 tokens" in note for note in found.notes)
    assert any("The models take 512 tokens" in note for note in found.notes)


def test_a_measurement_that_fails_is_a_note(folder, monkeypatch):
    def fail(*arguments, **options):
        raise Refusal("the process ended with 137.")

    monkeypatch.setattr("hf_gqa.evaluate.evaluation.peak_memory_bytes", fail)
    found = evaluate(folder / "same", DONOR, sampled_tokens=96, **FAST | {"peak_memory": True})
    assert found.student.peak_memory_bytes is None and found.kl_nats_per_token == 0
    assert sum("was not measured: the process ended with 137." in note for note in found.notes) == 2


def test_the_donor_can_write_the_text(folder):
    found = evaluate(folder / "student", DONOR, sampled_tokens=480, **FAST)
    again = evaluate(folder / "student", DONOR, sampled_tokens=480, **FAST)
    assert found == again and found.text.tokens == 480 and found.text.windows == 10
    assert found.donor.loss_nats_per_token < found.student.loss_nats_per_token
    assert any("The donor wrote the text" in note for note in found.notes)


def test_few_windows_have_no_intervals_and_say_so(folder, tmp_path):
    (tmp_path / "short.txt").write_text(SENTENCES[0] * 4)
    found = evaluate(folder / "student", DONOR, text=str(tmp_path / "short.txt"), **FAST)
    assert found.differences.kl_nats_per_token is None and found.text.windows < 8
    assert any("windows; intervals need 8" in note for note in found.notes)


def test_a_student_without_a_record_is_evaluated_with_a_note(folder, tmp_path):
    donor = AutoModelForCausalLM.from_pretrained(DONOR, dtype="auto")
    convert(donor, num_key_value_heads=2).save_pretrained(tmp_path / "student")
    AutoTokenizer.from_pretrained(DONOR).save_pretrained(tmp_path / "student")
    found = evaluate(tmp_path / "student", DONOR, text=str(folder / "text.jsonl"), **FAST)
    assert found.conversion is None and any("was not checked" in note for note in found.notes)


@pytest.fixture
def text(folder) -> dict:
    return {"text": str(folder / "text.jsonl")}


def test_a_student_of_another_donor_is_refused(folder, text, tmp_path):
    shutil.copytree(DONOR, tmp_path / "other")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "other", dtype="auto")
    with torch.no_grad():
        model.model.norm.weight.mul_(1.5)
    model.save_pretrained(tmp_path / "other")
    with pytest.raises(
        Refusal, match=r"student: was converted from another donor \('donor', with other weights\) than other\."
    ):
        evaluate(folder / "student", tmp_path / "other", **text, **FAST)


def test_another_vocabulary_is_refused(folder, text, tmp_path):
    tiny_donor("llama").save_pretrained(tmp_path / "tiny")
    AutoTokenizer.from_pretrained(DONOR).save_pretrained(tmp_path / "tiny")
    (tmp_path / "tiny" / "conversion_manifest.json").unlink(missing_ok=True)
    with pytest.raises(
        Refusal, match=r"donor donor: its vocabulary has 2,048 tokens, the student's 99; .* Evaluate against"
    ):
        evaluate(tmp_path / "tiny", DONOR, **text, **FAST)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({}, r"text: got none\. Give exactly one of --text, --dataset-name, --sampled-tokens\."),
        ({"text": "a.txt", "sampled_tokens": 5}, r"text: got --text, --sampled-tokens\. Give exactly one of"),
        ({"text": "/nowhere.txt"}, r"/nowhere\.txt: is no file and no folder\. Check --text\."),
        ({"sampled_tokens": 100, "context_length": 1000}, r"context_length = 1,000: the models have positions for 512"),
        (
            {"sampled_tokens": 100, "stride": 50},
            r"stride = 50 is more than context_length = 48, so that tokens would be",
        ),
        ({"sampled_tokens": 100, "dtype": "int8"}, r"dtype = 'int8' is unknown\. Use one of auto, float32"),
        ({"sampled_tokens": 100, "confidence": 95.0}, r"confidence = 95\.0: use a fraction from 0\.5 to less than 1"),
        ({"sampled_tokens": 100, "batch_size": 0}, r"batch_size = 0 is not a positive whole number\. Use 1 or more\."),
        ({"sampled_tokens": 100, "device": "toaster"}, r"device = 'toaster' is not to be had .* use cpu\."),
        ({"sampled_tokens": 100, "attn_implementation": "magic"}, r"attn_implementation = 'magic' cannot be used"),
        ({"sampled_tokens": 100, "memory": ("lots",)}, r"memory = 'lots' is no amount of memory\."),
        ({"sampled_tokens": 100, "speed": True, "repetitions": 1}, r"speed: repetitions = 1 are too few for a median"),
        (
            {"sampled_tokens": 100, "speed": True, "speed_context_lengths": (510,)},
            r"more than the 512 positions of the",
        ),
        ({"sampled_tokens": 100, "windows": 3}, r"recipe: unknown key 'windows'\. Known: text, "),
    ],
)
def test_bad_recipes_are_refused(folder, fields, message):
    with pytest.raises(Refusal, match=message):
        Evaluation(folder / "student", DONOR, **FAST | fields)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"Too short.", "fewer than one window of context_length = 48. Give more text, or a shorter --context-length."),
        (b"", "is empty. Leave it out."),
        (b"caf\xe9 " * 200, "is not UTF-8"),
    ],
)
def test_text_that_cannot_be_used_is_one_message(folder, tmp_path, content, message):
    (tmp_path / "bad.txt").write_bytes(content)
    output = tmp_path / "report"
    asked = ["--text", tmp_path / "bad.txt", "--context-length", 48, "--output-dir", output]
    result = run_cli("evaluate", folder / "student", "--donor", DONOR, *asked)
    assert_one_message(result, 2, "bad.txt", message)
    assert not output.exists()


def test_outputs_that_exist_are_kept(folder, tmp_path):
    (tmp_path / "report").mkdir()
    asked = [
        "evaluate",
        folder / "student",
        "--donor",
        DONOR,
        "--sampled-tokens",
        96,
        "--output-dir",
        tmp_path / "report",
    ]
    assert_one_message(run_cli(*asked), 2, "exists. Give another output, or --overwrite")
    (tmp_path / "report" / "thesis.tex").write_text("years of work")
    assert_one_message(run_cli(*asked, "--overwrite"), 2, "holds 'thesis.tex', which is no report's")
    assert (tmp_path / "report" / "thesis.tex").read_text() == "years of work"


def test_dry_run_explains_and_measures_nothing(folder, tmp_path):
    asked = ["--sampled-tokens", 96, "--context-length", 48, "--dry-run", "--output-dir", tmp_path / "report"]
    result = run_cli("evaluate", folder / "student", "--donor", DONOR, *asked)
    assert result.exit_code == 0 and "96 tokens" in result.stdout and "Nothing was measured" in result.stdout
    assert not (tmp_path / "report").exists()


def test_recipe_round_trips_and_wins_over_nothing(tmp_path):
    recipe = EvaluationRecipe(text=("a.txt",), memory=("1GB",), speed=False, confidence=0.9)
    assert EvaluationRecipe.from_dict(recipe.to_dict()) == recipe
    assert recipe.to_dict() == {"text": ["a.txt"], "memory": ["1GB"], "speed": False, "confidence": 0.9}


def test_measured_cache_equals_computed_for_every_class():
    """The report's numbers are of a dynamic cache; the others are counted alike."""
    model = AutoModelForCausalLM.from_pretrained(DONOR, dtype=torch.float32)
    found = cache_bytes_by_class(model, 40)
    assert {"dynamic", "static"} <= found.keys()
    for name, per_token in found.items():
        assert per_token * 40 == cache_bytes_computed(model.config, [8] * 6, torch.float32, name, 40)
