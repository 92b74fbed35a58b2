"""hf-gqa analyze: what it prints and writes, that its plan converts, and what it refuses."""

import json
import re
from itertools import combinations
from pathlib import Path

import pytest
import torch
import yaml

from hf_gqa import Refusal, convert
from hf_gqa.analyze import Analysis, AnalysisRecipe
from hf_gqa.analyze.borrowing import Sharing, measure_sharings
from hf_gqa.analyze.heatmap import draw_heatmap
from hf_gqa.analyze.solver import nearest_owners
from hf_gqa.cli.analyze import duration, verdict
from hf_gqa.convert.plan import ConversionPlan

from .command_line import assert_one_message, run_cli
from .donor_folders import files_of, write_donor
from .tiny_donors import tiny_donor
from .tiny_tokenizer import letter_tokenizer


TEXT = " ".join(
    f"Line {number}: the cat sat on mat {number * 7 % 13} and looked at dog {number % 5}." for number in range(40)
)
SMALL = {"tokens": 64, "samples": 3, "sample_tokens": 16, "batch_size": 3}
OPTIONS = [word for name, value in SMALL.items() for word in (f"--{name.replace('_', '-')}", value)]


@pytest.fixture(scope="module")
def text(tmp_path_factory) -> Path:
    file = tmp_path_factory.mktemp("text") / "text.txt"
    file.write_text(TEXT, encoding="utf-8")
    return file


def donor_in(folder: Path, model_type: str = "llama", **changes) -> Path:
    write_donor(folder, model_type, **{"num_hidden_layers": 4, **changes})
    letter_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def donor(tmp_path_factory) -> Path:
    return donor_in(tmp_path_factory.mktemp("donor") / "donor")


@pytest.fixture(scope="module")
def analyzed(donor, text, tmp_path_factory):
    """(what is printed, the folder)"""
    output = tmp_path_factory.mktemp("analysis") / "out"
    done = run_cli("analyze", donor, "--text", text, "--shared-layers", 2, "--output-dir", output, *OPTIONS)
    assert done.exit_code == 0 and done.stderr == "", done.stderr
    return done.stdout, output


def test_what_it_prints_and_writes(analyzed, donor):
    printed, output = analyzed
    for words in (
        "echo: 6 pairs of 4 layers, each tried alone",
        "3 samples of 16 tokens",
        "64 tokens to choose by, 64 to check with",
        "115 rows read at most, about ",
        "donor",
        "3<2: layer 3 borrows from layer 2.",
        f"Convert: hf-gqa convert {donor} ./my-student --plan {output / 'plan.yaml'}",
    ):
        assert words in printed
    assert {path.name for path in output.iterdir()} == {"analysis.json", "heatmap.svg", "plan.yaml"}
    found = json.loads((output / "analysis.json").read_text())
    assert found["format"] == "hf_gqa analysis 1" and found["sharing"] == "echo" and found["samples"] == 3
    assert found["kinds"] == ["attention, 4 KV heads"] * 4 and len(found["pairs"]) == 6
    assert [pair["kl"] > 0 for pair in found["pairs"]] == [True] * 6
    assert found["plan"] == yaml.safe_load((output / "plan.yaml").read_text())
    sets = {tuple(map(tuple, chosen["owners"])) for chosen in found["choices"]}
    assert {len(owners) for owners in sets} == {1, 2, 3}


def test_plan_is_made_of_measured_pairs_and_converts(analyzed, donor, tmp_path):
    found = json.loads((analyzed[1] / "analysis.json").read_text())
    by_chooser = {(chosen["chooser"], len(chosen["owners"])): chosen for chosen in found["choices"]}
    plan, cheapest = by_chooser["plan", 2], by_chooser["kl", 2]
    assert plan["summed_kl"] >= cheapest["summed_kl"]
    costs = {(pair["borrower"], pair["owner"]): pair["kl"] for pair in found["pairs"]}
    assert plan["summed_kl"] == pytest.approx(sum(costs[tuple(pair)] for pair in plan["owners"]))
    done = run_cli("convert", donor, tmp_path / "student", "--plan", analyzed[1] / "plan.yaml", "--json")
    assert done.exit_code == 0, done.stderr
    rows = json.loads((tmp_path / "student/config.json").read_text())["layer_plan"]
    assert {layer: row["query_from"] for layer, row in enumerate(rows) if "query_from" in row} == dict(plan["owners"])


def test_choices_are_measured_on_text_that_they_were_not_chosen_by(donor, text):
    analysis = Analysis(donor, text=[str(text)], sharing="cross_layer_kv", **SMALL)
    choosing, checking = (
        {tuple(row.tolist()) for row in rows} for rows in (analysis.to_choose_NT, analysis.to_check_NT)
    )
    assert len(choosing) == len(checking) == 4 and not choosing & checking
    result = analysis.run()
    assert result.plan is None
    chosen = next(one for one in result.choices if one.chooser == "kl" and len(one.owners) == 2)
    student = convert(analysis.model, sharing="cross_layer_kv", shared_layers=[layer for layer, _ in chosen.owners])
    with torch.no_grad():
        theirs, ours = (m(analysis.to_check_NT).logits[:, :-1].log_softmax(-1) for m in (analysis.model, student))
    assert chosen.kl == pytest.approx(float((theirs.exp() * (theirs - ours)).sum(-1).mean()), rel=1e-3)
    assert chosen.cache_bytes_per_token == result.donor_cache_bytes_per_token // 2


def test_explanation_counts_every_row_that_is_read(donor, text, monkeypatch):
    analysis = Analysis(donor, text=[str(text)], **SMALL)
    most = analysis.explanation()["forward_passes"]
    read = []
    analysis.model.register_forward_pre_hook(lambda module, args: read.append(len(args[0])))
    analysis.run()
    assert len(analysis.samples_NT) + sum(read) <= most <= 2 * sum(read)


@pytest.mark.parametrize(
    ("budget", "layers"), [({"cache_bytes_per_token": 768}, 2), ({"parameters": 40_000}, 1), ({"shared_layers": 3}, 3)]
)
def test_plan_meets_its_budget_with_the_best_candidate(donor, text, budget, layers):
    analysis = Analysis(donor, text=[str(text)], **SMALL, **budget)
    result = analysis.run()
    plan = result.choices[-1]
    assert plan.chooser == "plan" and len(plan.owners) == layers
    for name, amount in budget.items():
        assert name == "shared_layers" or getattr(plan, name) <= amount
    sets = [nearest_owners(borrowers, ["any"] * 4) for borrowers in combinations(range(1, 4), layers)]  # no more than 8
    sharings = [Sharing(pattern="echo", owners=owners) for owners in sets]
    scores = measure_sharings(analysis.model, analysis.donor.layout, analysis.to_choose_NT, sharings, 3)
    best = min(zip(sets, scores, strict=True), key=lambda pair: pair[1].kl)[0]
    assert plan.owners == tuple(best.items()) and ConversionPlan.from_dict(result.plan).shared_layers == tuple(best)


@pytest.mark.parametrize("budget", [{"shared_layers": 2}, {"parameters": 40_000}, {"cache_bytes_per_token": 768}])
def test_plan_by_similarity_is_the_first_in_its_order_that_meets_the_budget(donor, text, budget):
    result = Analysis(donor, text=[str(text)], choose_by="similarity", **SMALL, **budget).run()
    ordered, plan = [one for one in result.choices if one.chooser == "echoatt"], result.choices[-1]
    assert plan.chooser == "plan" and [len(one.owners) for one in ordered] == [1, 2, 3]
    ((name, amount),) = budget.items()

    def meets(one) -> bool:
        return len(one.owners) >= amount if name == "shared_layers" else getattr(one, name) <= amount

    assert plan.owners == next(one.owners for one in ordered if meets(one))
    assert ConversionPlan.from_dict(result.plan).shared_layers == tuple(borrower for borrower, _ in plan.owners)


def test_no_candidates_are_measured_for_a_plan_by_similarity(donor, text):
    by_kl, by_similarity = (
        Analysis(donor, text=[str(text)], shared_layers=2, choose_by=name, **SMALL).explanation()["forward_passes"]
        for name in ("kl", "similarity")
    )
    assert by_kl - by_similarity == 9 * 4


def test_reach_and_fewer_heads(donor, text):
    analysis = Analysis(donor, text=[str(text)], reach=1, num_key_value_heads=2, shared_layers=2, **SMALL)
    assert analysis.pairs == [(1, 0), (2, 1), (3, 2)]
    result = analysis.run()
    assert result.plan["shared_layers"] == [1, 3] and result.plan["num_key_value_heads"] == 2
    assert result.donor_cache_bytes_per_token == 4 * 2 * 2 * 8 * 4
    assert any("donor's own KV heads" in note for note in result.notes)
    too_far = [one for one in result.choices if one.chooser == "echoatt" and len(one.owners) == 3]
    assert too_far[0].summed_kl is None and too_far[0].kl > 0


def test_layers_share_within_their_kind(text, tmp_path):
    types = ["sliding_attention", "full_attention"] * 2
    folder = donor_in(tmp_path / "donor", "gemma3_text", layer_types=types)
    analysis = Analysis(folder, text=[str(text)], shared_layers=2, **SMALL)
    assert analysis.pairs == [(2, 0), (3, 1)]
    result = analysis.run()
    assert result.choices[-1].owners == ((2, 0), (3, 1)) and result.plan["shared_layers"] == [2, 3]


def test_heatmap_shows_every_pair(donor, text):
    result = Analysis(donor, text=[str(text)], **SMALL).run()
    drawn = draw_heatmap(result)
    assert drawn.startswith("<?xml") and draw_heatmap(result) == drawn
    texts = re.findall(r"<text[^>]*>([^<]*)</text>", drawn)
    assert "owner" in texts and "borrower" in texts
    for pair in result.pairs:
        assert f"{pair.kl:.2g}" in texts
    assert verdict(result)


def test_json_and_dry_run(donor, text):
    done = run_cli("analyze", donor, "--text", text, *OPTIONS, "--json")
    assert done.stderr == "" and json.loads(done.stdout)["donor"] == "donor"
    done = run_cli("analyze", donor, "--text", text, *OPTIONS, "--dry-run", "--json")
    assert json.loads(done.stdout)["written"] is False
    assert "Nothing was measured" in run_cli("analyze", donor, "--text", text, *OPTIONS, "--dry-run").stdout


def test_durations():
    assert [duration(seconds) for seconds in (0.2, 59, 90, 7200)] == ["1 s", "59 s", "2 min", "2.0 h"]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--shared-layers", 4], "shared_layers = 4: no plan with sharing = echo for 'donor' meets it. Use 3 or fewer"),
        (
            ["--cache-bytes-per-token", 639],
            "cache_bytes_per_token = 639: no plan with sharing = echo for 'donor' meets it. Use 640 or more",
        ),
        (["--cache-bytes-per-token", 1024], "cache_bytes_per_token = 1,024: 'donor' needs only 1,024 without sharing."),
        (["--parameters", 7], "parameters = 7: no plan with sharing = echo"),
        (["--parameters", 7, "--shared-layers", 1], "budget: got parameters and shared_layers. Give one of"),
        (["--shared-layers", 0], "shared_layers = 0 is not a positive whole number. Use 1 or more."),
        (["--sharing", "albert"], "sharing = 'albert' is not one that is analyzed. Use one of echo, cross_layer_kv."),
        (["--sample-tokens", 65], "sample_tokens = 65: 'donor' has positions for 64 tokens. Use 64 or fewer."),
        (["--sample-tokens", 1], "sample_tokens = 1: is too small. Use 2 or more."),
        (["--num-key-value-heads", 3, "--shared-layers", 1], "num_key_value_heads = 3 does not divide"),
        (["--choose-by", "echoatt"], "choose_by = 'echoatt' is unknown. Use one of kl, similarity."),
        (["--choose-by", "similarity", "--reach", 2], "reach = 2: the order of similarity knows no reach."),
        (["--dtype", "int8"], "dtype = 'int8' is unknown. Use one of auto, float32, bfloat16, float16."),
        (["--device", "nowhere"], "device = 'nowhere' is not to be had"),
    ],
)
def test_bad_options_are_refused(donor, text, tmp_path, options, words):
    small = [word for pair in zip(OPTIONS[::2], OPTIONS[1::2], strict=True) if pair[0] not in options for word in pair]
    before = files_of(tmp_path)
    result = run_cli("analyze", donor, "--text", text, "--output-dir", tmp_path / "out", *small, *options)
    assert_one_message(result, 2, words)
    assert files_of(tmp_path) == before


@pytest.mark.parametrize(
    ("written", "words"),
    [
        ("short", "holds less than one sample of 64 tokens. Give more text, or a shorter --sample-tokens."),
        ("x" * 100, "holds one sample of 64 tokens, and choosing and checking need one each."),
        ("", "is empty"),
    ],
)
def test_too_little_text_is_refused(donor, tmp_path, written, words):
    (tmp_path / "text.txt").write_text(written, encoding="utf-8")
    assert_one_message(run_cli("analyze", donor, "--text", tmp_path / "text.txt"), 2, words)


def test_less_text_than_asked_for_is_said(donor, text):
    result = Analysis(donor, text=[str(text)], tokens=6400, samples=300, sample_tokens=64).run()
    assert "half of them to choose by; 12,800 were asked for" in result.notes[0]
    assert "not 300" in result.notes[1]


def test_donors_whose_layers_cannot_share_are_refused(text, tmp_path):
    one = donor_in(tmp_path / "one", num_hidden_layers=1)
    two = donor_in(tmp_path / "two", "gemma3_text", num_hidden_layers=2)
    for folder, words in (
        (one, "one: none of its 1 layers has an earlier one of its kind to borrow from (attention, 4 KV heads)."),
        (two, "(sliding_attention, 4 KV heads; full_attention, 4 KV heads)."),
    ):
        assert_one_message(run_cli("analyze", folder, "--text", text), 2, words)


def test_encoders_and_layers_that_share_already_are_refused(text, tmp_path):
    shared = convert(tiny_donor("llama", num_hidden_layers=3), sharing="echo", shared_layers=[2])
    shared.save_pretrained(tmp_path / "shared")
    letter_tokenizer().save_pretrained(tmp_path / "shared")
    base = tiny_donor("llama").model
    base.save_pretrained(tmp_path / "base")
    for folder, words in (
        ("shared", "its layer 2 borrows from another already. Analyze its donor."),
        ("base", "is a LlamaModel, which predicts no next tokens"),
    ):
        assert_one_message(run_cli("analyze", tmp_path / folder, "--text", text), 2, words)


def test_recipe_needs_text():
    with pytest.raises(Refusal, match=r"text: got none. Give --text with files or folders\."):
        AnalysisRecipe(text=())


def test_output_that_is_no_analysis_is_left_alone(donor, text, tmp_path):
    (tmp_path / "mine.txt").write_text("mine")
    arguments = ["analyze", donor, "--text", text, "--output-dir", tmp_path]
    assert_one_message(run_cli(*arguments), 2, "exists. Give another output, or --overwrite to replace it.")
    assert_one_message(run_cli(*arguments, "--overwrite"), 2, "holds 'mine.txt', which is no analysis's")
    assert_one_message(run_cli(*arguments[:-1], donor / "analysis"), 2, "overlaps the donor's folder")
