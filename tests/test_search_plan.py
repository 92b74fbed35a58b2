"""Plans that are found by looking at the donor: budgets for layers, and methods by trial."""

import copy

import pytest
import torch

from hf_gqa import ConversionPlan, Refusal, convert
from hf_gqa.convert.cache_bytes import cache_bytes_per_token_measured
from hf_gqa.convert.calibration import Calibration, calibrate
from hf_gqa.convert.donor import donor_from_model
from hf_gqa.convert.surgery import layer_heads
from hf_gqa.evaluate.quality.token_scores import score
from hf_gqa.workflow.choose_method import CANDIDATES, choose_method
from hf_gqa.workflow.head_budget import allot_heads
from hf_gqa.workflow.rows_as_windows import rows_as_windows
from hf_gqa.workflow.search_plan import search_plan

from .alike_donors import alike_donor, put, rows
from .tiny_donors import tiny_donor


def known(donor) -> Calibration:
    return calibrate(donor_from_model(donor), donor, rows())


def half_alike(layer_idx: int, model_type: str = "llama"):
    """A donor of which one layer can lose half its heads for nothing."""
    donor, alike = tiny_donor(model_type), alike_donor(model_type, 2)
    put(donor, layer_idx, dict(layer_heads(donor_from_model(alike)))[layer_idx])
    return donor


@pytest.mark.parametrize("model_type", ["llama", "gpt2"])
@pytest.mark.parametrize("layer_idx", [0, 1])
def test_the_budget_goes_where_heads_are_needed(model_type, layer_idx):
    donor = half_alike(layer_idx, model_type)
    before = copy.deepcopy(donor.state_dict())
    opened, whole = donor_from_model(donor), int(cache_bytes_per_token_measured(donor))
    found = allot_heads(opened, donor, known(donor), whole * 3 // 4)
    wanted = [4, 4]
    wanted[layer_idx] = 2
    assert list(found.num_key_value_heads) == wanted
    assert found.damages[layer_idx][2] < 1e-6 < found.damages[1 - layer_idx][2] < found.damages[1 - layer_idx][1]
    assert found.spent_bytes == found.budget_bytes == whole * 3 // 4
    assert all(torch.equal(tensor, before[name]) for name, tensor in donor.state_dict().items())
    student = convert(donor, method="group,fold", calibration=rows(), **found.plan_fields)
    assert cache_bytes_per_token_measured(student) == found.spent_bytes
    uniform = convert(donor, num_key_value_heads=2, method="group,fold", calibration=rows())
    windows = rows_as_windows(rows(seed=5))
    per_layer, all_alike = (float(score(donor, each, windows, 8).kl_N.mean()) for each in (student, uniform))
    assert per_layer < 1e-6 < all_alike


def test_damages_are_what_each_layer_alone_does():
    donor = tiny_donor("llama")
    found = allot_heads(donor_from_model(donor), donor, known(donor), 512, "group,fold,refit")
    assert found.method == ("group", "fold"), "what must see the student is not part of it"
    assert [sorted(damage) for damage in found.damages] == [[1, 2, 4]] * 2
    alone = ConversionPlan(layer_plan=({"num_key_value_heads": 4}, {"num_key_value_heads": 1}), method="group,fold")
    student = convert(donor, alone, calibration=rows())
    expected = score(donor, student, rows_as_windows(rows()), 8).kl_N.mean()
    assert found.damages[1][1] == pytest.approx(float(expected), rel=1e-3)


def test_a_budget_that_all_layers_share_alike_is_one_number():
    donor = tiny_donor("llama")
    found = allot_heads(donor_from_model(donor), donor, known(donor), 2 * 2 * 8 * 4)
    assert found.num_key_value_heads == (1, 1)
    assert found.plan_fields == {"num_key_value_heads": 1}


@pytest.mark.parametrize("budget_bytes", [127, 513])
def test_a_budget_that_cannot_be_met_is_refused_with_what_is_possible(budget_bytes):
    donor = tiny_donor("llama")
    with pytest.raises(Refusal) as refused:
        allot_heads(donor_from_model(donor), donor, known(donor), budget_bytes)
    assert str(refused.value) == (
        f"cache budget: {budget_bytes} bytes per token ({budget_bytes / 512:.1%} of donor 'LlamaForCausalLM'). With one KV head "
        f"in each of 2 layers it is 128 (25.0%), and the donor's is 512. Use a budget from 128 to 512 bytes."
    )


def test_the_method_that_measures_best_comes_first():
    donor = alike_donor("llama", 2)
    trials = choose_method(donor, rows(), ("mean_pool", "random_init", "fold"), num_key_value_heads=2)
    assert trials[0].method == ("fold",) and trials[0].kl < 1e-4
    kls = [trial.kl for trial in trials]
    assert kls == sorted(kls) and kls[1] > 1e-2
    assert all(trial.seconds > 0 and trial.loss > 0 and trial.refused is None for trial in trials)


def test_what_is_measured_on_was_not_calibrated_on(monkeypatch):
    donor, read = tiny_donor("llama"), []
    monkeypatch.setattr(
        "hf_gqa.workflow.choose_method.calibrate",
        lambda opened, model, tokens_NL: read.append(tokens_NL) or calibrate(opened, model, tokens_NL),
    )
    monkeypatch.setattr(
        "hf_gqa.workflow.choose_method.score",
        lambda model, student, windows, batch_size: read.append(windows) or score(model, student, windows, batch_size),
    )
    choose_method(donor, rows(), ("fold",), num_key_value_heads=2)
    calibrated, measured = {tuple(row) for row in read[0].tolist()}, {window.tokens for window in read[1]}
    assert len(calibrated) == 14 and len(measured) == 2 and not calibrated & measured


def test_methods_that_a_family_defeats_are_skipped_and_named():
    donor = tiny_donor("qwen3")
    found = search_plan(donor_from_model(donor), donor, known(donor), num_key_value_heads=2)
    assert {trial.method for trial in found.trials} == {tuple(candidate.split(",")) for candidate in CANDIDATES}
    refused = [trial for trial in found.trials if trial.refused]
    assert refused and all("fold" in trial.method and trial.kl is None for trial in refused)
    assert found.plan == ConversionPlan(num_key_value_heads=2, method=found.trials[0].method)
    with pytest.raises(Refusal, match=r"^method = auto: nothing that was tried fits this donor \(method = fold: "):
        choose_method(donor, rows(), ("fold",), num_key_value_heads=2)


def test_budget_and_method_are_searched_together():
    donor = half_alike(1)
    found = search_plan(
        donor_from_model(donor), donor, known(donor), budget_bytes=384, candidates=("mean_pool", "group,fold")
    )
    assert found.plan.method == ("group", "fold")
    assert [row["num_key_value_heads"] for row in found.plan.layer_plan] == [4, 2]
    kept = found.to_dict()
    assert kept["allotment"]["num_key_value_heads"] == [4, 2] and len(kept["trials"]) == 2


def test_one_row_is_too_little_to_try_on():
    with pytest.raises(Refusal) as refused:
        choose_method(tiny_donor("llama"), rows()[:1], num_key_value_heads=2)
    assert str(refused.value) == (
        "method = auto: 1 row of calibration text cannot be calibrated on and measured on. Give more text."
    )
