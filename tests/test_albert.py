"""ALBERT: one attention computes in every layer of its group, so there is a row for each group."""

import pytest
import torch

from hf_gqa import ConversionPlan, Refusal, convert, convert_checkpoint, open_donor, verify
from hf_gqa.convert.cache_bytes import key_value_heads
from hf_gqa.convert.donor import donor_from_model
from hf_gqa.convert.target import choose_target
from hf_gqa.export.explanation import explain
from hf_gqa.uptrain.layer_matching import LayerOutputs

from .conformance import assert_same_tensors, logits_of
from .oracle import assert_same_logits
from .tiny_donors import tiny_donor, use_attention


every_grouping = pytest.mark.parametrize("groups", [1, 2])


def tiny_albert(groups: int = 1, **changes):
    return tiny_donor("albert", num_hidden_layers=5, num_hidden_groups=groups, **changes)


@every_grouping
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_identity_of_tied_layers_changes_no_bit(groups, attention):
    donor = tiny_albert(groups)
    use_attention(donor, attention)
    bundle = convert(donor, num_key_value_heads=4, export="bundle")
    assert len(bundle.config.layer_plan) == groups
    assert torch.equal(logits_of(bundle, padded=True), logits_of(donor, padded=True))
    native = convert(bundle, num_key_value_heads=4)
    assert type(native) is type(donor)
    assert_same_tensors(native.state_dict(), donor.state_dict())


@every_grouping
def test_student_of_tied_layers_equals_oracle(groups):
    donor = tiny_albert(groups)
    student = convert(donor, num_key_value_heads=2)
    assert logits_of(student).sub(logits_of(donor)).abs().max() > 0.1
    for group in donor.base_model.encoder.albert_layer_groups:  # the shared oracle wants an attention for every layer
        attention = group.albert_layers[0].attention
        for projection in (attention.key, attention.value):
            for parameter in projection.parameters():
                heads = parameter.data.view(2, 2, 8, -1)
                heads.copy_(heads.mean(1, keepdim=True).expand_as(heads))
    assert_same_logits(student, donor)


def test_groups_may_have_different_heads():
    plan = ({"num_key_value_heads": 4}, {"num_key_value_heads": 1})
    student = convert(tiny_albert(2), layer_plan=plan)
    assert [
        group.albert_layers[0].attention.k_proj.out_features for group in student.base_model.encoder.albert_layer_groups
    ] == [32, 8]
    assert key_value_heads(student.config) == [4, 4, 4, 1, 1]


@pytest.mark.usefixtures("warm_verification")
@pytest.mark.parametrize("auto_class", ["AutoModelForSequenceClassification", "AutoModelForPreTraining"])
def test_student_on_disk_is_verified(auto_class, tmp_path):
    tiny_albert(auto_class=auto_class).save_pretrained(tmp_path / "donor")
    convert_checkpoint(tmp_path / "donor", tmp_path / "student", num_key_value_heads=2)
    checks = verify(tmp_path / "student", open_donor(tmp_path / "donor"))
    assert all(check.passed for check in checks), checks


def test_numbers_are_of_layers():
    donor, plan = donor_from_model(tiny_albert()), ConversionPlan(num_key_value_heads=1)
    explained = explain(donor, plan, choose_target(donor, plan))
    assert explained.before["num_key_value_heads"] == [4] * 5 and explained.after["num_key_value_heads"] == [1] * 5
    assert explained.before["key_value_bytes_per_token"] == 5 * 2 * 32 * 4
    assert explained.before["parameters"] - explained.after["parameters"] == 2 * (32 + 1) * 24  # of one attention


@pytest.mark.parametrize(
    "plan, message",
    [
        (
            {"num_key_value_heads": 2, "sharing": "albert", "share_every": 2},
            "sharing = albert: the 5 layers of 'AlbertForMaskedLM' compute with the weights of 2 already, so there is nothing left "
            "to share. Give num_key_value_heads alone.",
        ),
        (
            {"num_key_value_heads": 2, "method": "mean_pool,refit"},
            "method = mean_pool,refit: 'refit' fits one layer after the other, and here layers share. Leave it out.",
        ),
        (
            {"num_key_value_heads": 2, "method": "fold", "calibration": torch.ones(1, 8, dtype=torch.long)},
            "calibration: the layers of 'AlbertForMaskedLM' compute with the weights of 2, and a calibration is of one layer "
            "after the other. Leave it out: methods such as mean_pool, group, align and fold go by the weights alone.",
        ),
    ],
    ids=["sharing", "observing", "calibration"],
)
def test_what_needs_layers_of_their_own_is_refused(plan, message):
    with pytest.raises(Refusal) as refused:
        convert(tiny_albert(2), **plan)
    assert str(refused.value) == message


def test_groups_of_several_attentions_are_refused():
    with pytest.raises(Refusal) as refused:
        convert(tiny_albert(inner_group_num=2), num_key_value_heads=2)
    assert str(refused.value) == (
        "AlbertForMaskedLM: inner_group_num = 2, and hf_gqa knows groups of one attention (inner_group_num = 1). Such donors "
        "cannot be converted."
    )


def test_layer_matching_is_refused():
    with pytest.raises(
        Refusal, match=r"^layer matching: the blocks of a albert call their attention at several depths, "
    ):
        LayerOutputs(tiny_albert())
