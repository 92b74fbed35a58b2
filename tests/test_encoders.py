"""What is different about encoders: no cache, nothing that comes after a token hidden from it, other tasks."""

import pytest
import torch
from safetensors.torch import load_file, save_file

from hf_gqa import ConversionPlan, Refusal, convert, convert_checkpoint, open_donor, verify
from hf_gqa.convert.cache_bytes import cache_bytes_per_token_computed
from hf_gqa.convert.donor import donor_from_model
from hf_gqa.convert.layer_run import LayerRun
from hf_gqa.convert.target import choose_target
from hf_gqa.export.explanation import explain
from hf_gqa.workflow.head_budget import check_budget_bytes

from .command_line import run_cli
from .conformance import assert_close_for_float32, logits_of
from .oracle import assert_same_logits
from .tiny_donors import ENCODERS, NUM_LAYERS, UNTIED_ENCODERS, tiny_donor, tokens_and_mask


every_encoder = pytest.mark.parametrize("model_type", ENCODERS)
every_untied_encoder = pytest.mark.parametrize("model_type", UNTIED_ENCODERS)
ROWS = torch.randint(3, 99, (24, 32), generator=torch.Generator().manual_seed(2))


@every_encoder
def test_no_saving_of_a_cache_is_claimed(model_type):
    donor, plan = donor_from_model(tiny_donor(model_type)), ConversionPlan(num_key_value_heads=1)
    explained = explain(donor, plan, choose_target(donor, plan))
    for side in (explained.before, explained.after):
        assert side["cache_bytes_per_token"] == side["cache_bytes_per_token_beyond_window"] == 0
    assert explained.before["key_value_bytes_per_token"] == 4 * explained.after["key_value_bytes_per_token"]
    assert explained.before["parameters"] > explained.after["parameters"]
    assert any(note.startswith("An encoder keeps no cache. What changes is parameters, ") for note in explained.notes)
    bundle = convert(tiny_donor(model_type), num_key_value_heads=2)
    assert cache_bytes_per_token_computed(bundle.config, [2, 2], torch.float32) == 0


def test_inspect_says_what_is_saved_instead(tmp_path):
    tiny_donor("bert").save_pretrained(tmp_path)
    printed = run_cli("inspect", tmp_path).stdout
    assert "cache/token    none (an encoder)" in printed
    assert "keys, values/token" in printed and "0.25" in printed


@pytest.mark.parametrize("changes", [{"is_decoder": True}, {"is_decoder": True, "add_cross_attention": True}])
def test_bert_as_a_decoder_is_refused(changes):
    donor = tiny_donor("bert", auto_class="AutoModelForCausalLM", **changes)
    with pytest.raises(Refusal) as refused:
        convert(donor, num_key_value_heads=2)
    assert str(refused.value) == (
        "BertLMHeadModel: is_decoder or add_cross_attention is set, and hf_gqa converts 'bert' as the encoder that it is by "
        "default, without a cache and without attention to another model. Use a family of decoders."
    )


def test_language_model_head_of_an_encoder_is_refused_with_those_that_are_known():
    donor = tiny_donor("bert", auto_class="AutoModelForCausalLM")
    with pytest.raises(
        Refusal, match=r"BertLMHeadModel cannot become a bundle.* Use a donor of class BertForMaskedLM, "
    ):
        convert(donor, num_key_value_heads=2)


@pytest.mark.usefixtures("warm_verification")
@pytest.mark.parametrize(("model_type", "heads"), [(name, (2, 4)[turn % 2]) for turn, name in enumerate(ENCODERS)])
def test_student_on_disk_is_verified(model_type, heads, tmp_path):
    tiny_donor(model_type, auto_class="AutoModelForSequenceClassification").save_pretrained(tmp_path / "donor")
    convert_checkpoint(tmp_path / "donor", tmp_path / "student", num_key_value_heads=heads)
    checks = verify(tmp_path / "student", open_donor(tmp_path / "donor"))
    assert all(check.passed for check in checks), checks
    seen = next(check for check in checks if check.name.startswith("KV heads per layer, seen in the weights"))
    assert seen.detail == f"{[heads] * NUM_LAYERS}, planned {[heads] * NUM_LAYERS}"


@torch.no_grad()
@every_encoder
def test_layers_run_one_at_a_time_as_in_the_model(model_type):
    model = tiny_donor(model_type)
    run = LayerRun(model, donor_from_model(model).layout, ROWS)
    hidden = run.embedded
    for layer_idx in range(NUM_LAYERS):
        hidden = run.outputs(layer_idx, run.layer(layer_idx), hidden)
    found = torch.cat(hidden)
    if model_type == "modernbert":
        found = model.base_model.final_norm(found)
    assert torch.equal(found, model.base_model(ROWS).last_hidden_state)


@torch.no_grad()
@pytest.mark.parametrize(
    "model_type", [name for name in UNTIED_ENCODERS if name != "modernbert"]
)  # rotates: less can be done
def test_methods_that_look_at_text_come_closer(model_type):
    donor = tiny_donor(model_type)
    expected, distance = donor(ROWS).logits, {}
    for method, calibration in (("mean_pool", None), ("fold", None), ("fold", ROWS), ("fold,refit", ROWS)):
        student = convert(donor, num_key_value_heads=2, method=method, calibration=calibration)
        distance[method, calibration is not None] = (student(ROWS).logits - expected).norm().item()
    assert distance["fold", False] < distance["mean_pool", False]
    assert distance["fold", True] < 0.6 * distance["fold", False]
    assert distance["fold,refit", True] < distance["fold", True]


@every_encoder
def test_fit_of_queries_sees_what_comes_after_a_token(model_type):
    """A sliding layer of ModernBERT hides what is far, on both sides."""
    model = tiny_donor(model_type)
    run = LayerRun(model, donor_from_model(model).layout, ROWS)
    arguments = [run.attention_arguments(layer_idx, run.layer(layer_idx), 0, None) for layer_idx in range(NUM_LAYERS)]
    assert not arguments[0]["mask_BHLS"].any()
    hidden = arguments[1]["mask_BHLS"][0, 0] == -torch.inf
    assert torch.equal(hidden, hidden.T) and hidden.any() == (model_type == "modernbert")
    assert arguments[0]["scaling"] == pytest.approx(8**-0.5)


@torch.no_grad()
@every_untied_encoder
def test_tied_layers_equal_the_donor_whose_layers_are_overwritten(model_type):
    changes = {"layer_types": ["full_attention"] * 2} if model_type == "modernbert" else {}
    donor = tiny_donor(model_type, **changes)
    student = convert(donor, num_key_value_heads=4, sharing="albert", shared_layers=[1])
    parameters = dict(donor.named_parameters())
    for name, parameter in parameters.items():
        if ".1." in name and name.replace(".1.", ".0.") in parameters:  # ModernBERT's first layer lacks a norm
            parameter.copy_(parameters[name.replace(".1.", ".0.")])
    assert sum(p.numel() for p in student.parameters()) < sum(p.numel() for p in donor.parameters())
    assert_same_logits(student, donor)


@torch.no_grad()
@every_untied_encoder
@pytest.mark.parametrize("sharing", ["cross_layer_kv", "echo"])
def test_layers_that_share_states_compute_the_same_in_every_implementation(model_type, sharing):
    changes = {"layer_types": ["full_attention"] * 2} if model_type == "modernbert" else {}
    student = convert(tiny_donor(model_type, **changes), num_key_value_heads=2, sharing=sharing, shared_layers=[1])
    real, found = tokens_and_mask()[1].bool(), []
    for attention in ("eager", "sdpa", "grouped_sdpa"):
        student.set_attn_implementation(attention)
        found.append(logits_of(student, padded=True)[real])
    assert_close_for_float32(found[1], found[0])
    assert_close_for_float32(found[2], found[0])


def test_budget_of_a_cache_is_refused():
    with pytest.raises(Refusal, match=r"^cache budget: 'BertForMaskedLM' is an encoder, which keeps no cache\. "):
        check_budget_bytes(donor_from_model(tiny_donor("bert")), 100)


def test_positions_that_older_checkpoints_store_are_left_out(tmp_path):
    donor = tiny_donor("bert")
    donor.save_pretrained(tmp_path / "donor")
    tensors = load_file(tmp_path / "donor/model.safetensors")
    tensors["bert.embeddings.position_ids"] = torch.arange(64)[None]
    save_file(tensors, tmp_path / "donor/model.safetensors", metadata={"format": "pt"})
    convert_checkpoint(tmp_path / "donor", tmp_path / "student", num_key_value_heads=2)
    assert not any("position_ids" in name for name in load_file(tmp_path / "student/model.safetensors"))
