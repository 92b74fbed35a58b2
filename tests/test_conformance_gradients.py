"""Every family: gradients of the student are those of native attention, with and without gradient checkpointing."""

import pytest
import torch
from transformers import PreTrainedModel

from hf_gqa import convert
from hf_gqa.convert.families import load_family

from .conformance import (
    ATTENTIONS,
    DROPOUTS,
    EXPORTS,
    assert_close_for_float32,
    every_attention,
    every_model,
    has_native_gqa,
)
from .covering import each_value
from .gradients import enable_checkpointing, gradients
from .oracle import head_dim, key_norm_views, key_value_views
from .tiny_donors import ALL_MODEL_TYPES, MODEL_TYPES, tiny_donor, use_attention


def key_value_gradients(model: PreTrainedModel) -> dict[tuple[int, str, str], torch.Tensor]:
    found = gradients(model, use_cache=False)
    norms = key_norm_views(found, model.config.model_type, head_dim(model))
    return key_value_views(found, head_dim(model)) | {key: torch.stack(rows) for key, rows in norms.items()}


@pytest.mark.parametrize("model_type", [name for name in MODEL_TYPES if has_native_gqa(name)])
@every_attention
@pytest.mark.parametrize("num_key_value_heads", [2, 1])
def test_bundle_has_the_gradients_of_the_native_student(model_type, attention, num_key_value_heads):
    donor = tiny_donor(model_type)
    use_attention(donor, attention)
    native, bundle = (convert(donor, num_key_value_heads=num_key_value_heads, export=e) for e in ("native", "bundle"))
    expected, found = gradients(native, use_cache=False), gradients(bundle, use_cache=False)
    if load_family(model_type).donor_layout.fused is None:
        assert found.keys() == expected.keys()
    else:  # the same parameters, apart from query, key and value
        found |= key_value_views(found, head_dim(bundle))
        expected |= key_value_views(expected, head_dim(native))
    for name in expected.keys() & found.keys():
        assert_close_for_float32(found[name], expected[name])


@each_value(model_type=ALL_MODEL_TYPES, export=EXPORTS, attention=ATTENTIONS, num_key_value_heads=[2, 1])
def test_gradient_of_a_head_is_the_sum_over_its_copies(model_type, export, attention, num_key_value_heads):
    """The slow reference: a native donor-sized model, in which every query head has its own copy of its KV head."""
    donor = tiny_donor(model_type)
    use_attention(donor, attention)
    student = convert(donor, num_key_value_heads=num_key_value_heads, export="bundle")
    copies = convert(student, num_key_value_heads=donor.config.num_attention_heads, method="expand", export=export)
    found, expected = key_value_gradients(student), key_value_gradients(copies)
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        assert_close_for_float32(found[name], gradient.unflatten(0, (num_key_value_heads, -1)).sum(1))


@each_value(model_type=ALL_MODEL_TYPES, export=EXPORTS, attention=ATTENTIONS, dropout=[0.0, 0.2])
def test_gradient_checkpointing_changes_no_gradient(model_type, export, attention, dropout):
    donor = tiny_donor(model_type, **dict.fromkeys(DROPOUTS, dropout))
    use_attention(donor, attention)
    student = convert(donor, num_key_value_heads=2, export=export).train()
    if not donor.supports_gradient_checkpointing:
        pytest.skip(f"a native {model_type} has none")
    torch.manual_seed(0)
    expected = gradients(student, use_cache=False)  # checkpointing has none, and a cache lays keys out in another order
    enable_checkpointing(student)
    torch.manual_seed(0)
    found = gradients(student, use_cache=False)
    for name, gradient in expected.items():
        assert torch.equal(found[name], gradient), name


@every_model
def test_bundle_gradients_are_those_of_eager_attention(model_type):
    student = convert(tiny_donor(model_type), num_key_value_heads=2, export="bundle")
    found = []
    for attention in ATTENTIONS:
        use_attention(student, attention)
        found.append(gradients(student))
    for name, gradient in found[0].items():
        assert_close_for_float32(found[1][name], gradient)
