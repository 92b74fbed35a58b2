"""Every family: a plan that changes nothing changes no bit, and expansion is undone exactly by pooling."""

import pytest
import torch

from hf_gqa import convert

from .conformance import (
    ATTENTIONS,
    DROPOUTS,
    EXPORTS,
    HEAD_COUNT_METHODS,
    assert_close_for_float32,
    assert_same_tensors,
    cached_head_counts,
    every_attention,
    every_export,
    every_model,
    grouped_donor,
    has_native_gqa,
    in_bfloat16,
    logits_of,
)
from .covering import each_pair, each_value
from .tiny_donors import (
    ALL_MODEL_TYPES,
    NUM_ATTENTION_HEADS,
    of_each_storage,
    tiny_donor,
    tokens_and_mask,
    use_attention,
)


DTYPES = (torch.float32, torch.bfloat16)
FEW_AND_MANY = ((2, 4), (1, 4), (1, 2))
NO_DROPOUT = ("mpt",)  # its configuration takes whole numbers only


@each_pair(model_type=ALL_MODEL_TYPES, export=EXPORTS, attention=ATTENTIONS, dtype=DTYPES, num_key_value_heads=[4, 2])
def test_identity_plan_changes_no_bit(model_type, export, attention, dtype, num_key_value_heads):
    donor = grouped_donor(model_type, 2) if num_key_value_heads == 2 else tiny_donor(model_type)
    if dtype == torch.bfloat16:
        donor = in_bfloat16(donor)
    use_attention(donor, attention)
    student = convert(donor, num_key_value_heads=num_key_value_heads, export=export)
    assert student.config._attn_implementation == donor.config._attn_implementation
    assert student.dtype == dtype
    if hasattr(donor.config, "_experts_implementation"):  # which transformers 5.4 chooses otherwise for other classes
        donor.config._experts_implementation = student.config._experts_implementation
    for padded in (False, True):
        assert torch.equal(logits_of(student, padded), logits_of(donor, padded))


@each_value(model_type=of_each_storage(ALL_MODEL_TYPES), export=EXPORTS, method=HEAD_COUNT_METHODS)
def test_identity_plan_is_identity_for_every_method(model_type, export, method):
    donor = tiny_donor(model_type)
    student = convert(donor, num_key_value_heads=NUM_ATTENTION_HEADS, export=export, method=method, seed=3)
    assert torch.equal(logits_of(student, padded=True), logits_of(donor, padded=True))


@every_model
@every_export
def test_identity_plan_keeps_attention_weights_and_hidden_states(model_type, export):
    donor = tiny_donor(model_type)
    use_attention(donor, "eager")
    student = convert(donor, num_key_value_heads=NUM_ATTENTION_HEADS, export=export)
    tokens, mask = tokens_and_mask()
    found, expected = (
        model(tokens, attention_mask=mask, output_attentions=True, output_hidden_states=True)
        for model in (student, donor)
    )
    assert len(found.attentions) == len(expected.attentions) == donor.config.num_hidden_layers
    assert all(map(torch.equal, found.attentions, expected.attentions))
    assert all(map(torch.equal, found.hidden_states, expected.hidden_states))


@each_value(model_type=ALL_MODEL_TYPES, export=EXPORTS, attention=ATTENTIONS)
def test_identity_plan_drops_out_as_the_donor_does(model_type, export, attention):
    donor = tiny_donor(model_type, **dict.fromkeys(DROPOUTS, 0.3))
    use_attention(donor, attention)
    student = convert(donor, num_key_value_heads=NUM_ATTENTION_HEADS, export=export).train()
    donor.train()
    if model_type in NO_DROPOUT:
        pytest.skip(f"a native {model_type} drops nothing out")
    outputs = []
    for model in (student, donor):
        torch.manual_seed(5)
        outputs.append(logits_of(model))
    assert torch.equal(*outputs)
    assert not torch.equal(outputs[0], logits_of(donor.eval())), "no dropout happened"


@every_model
@every_attention
def test_bundle_becomes_native_again_bit_for_bit(model_type, attention):
    donor = tiny_donor(model_type)
    use_attention(donor, attention)
    bundle = convert(donor, num_key_value_heads=NUM_ATTENTION_HEADS, export="bundle")
    native = convert(bundle, num_key_value_heads=NUM_ATTENTION_HEADS)
    assert type(native) is type(donor)
    assert_same_tensors(native.state_dict(), donor.state_dict())
    assert torch.equal(logits_of(native, padded=True), logits_of(donor, padded=True))


@each_value(model_type=ALL_MODEL_TYPES, export=EXPORTS, heads=FEW_AND_MANY, dtype=DTYPES)
def test_mean_pool_undoes_expand_bit_for_bit(model_type, export, heads, dtype):
    few, many = heads
    donor = grouped_donor(model_type, few)
    if dtype == torch.bfloat16:
        donor = in_bfloat16(donor)
    expanded = convert(donor, num_key_value_heads=many, method="expand", export=export)
    pooled = convert(
        expanded, num_key_value_heads=few, export="auto" if has_native_gqa(model_type) else "bundle", method="mean_pool"
    )
    assert_same_tensors(pooled.state_dict(), donor.state_dict())


@each_value(model_type=ALL_MODEL_TYPES, export=EXPORTS, attention=ATTENTIONS, heads=FEW_AND_MANY)
def test_expand_keeps_logits(model_type, export, attention, heads):
    few, many = heads
    donor = grouped_donor(model_type, few)
    use_attention(donor, attention)
    expanded = convert(donor, num_key_value_heads=many, method="expand", export=export)
    assert cached_head_counts(expanded) == [many] * donor.config.num_hidden_layers
    _, mask = tokens_and_mask()
    real = mask.bool()  # what a padding token attends to is undefined, and differs between implementations
    assert_close_for_float32(logits_of(expanded, padded=True)[real], logits_of(donor, padded=True)[real])


@every_model
@every_export
def test_tied_embeddings_stay_tied(model_type, export):
    donor = tiny_donor(model_type, tie_word_embeddings=True)
    student = convert(donor, num_key_value_heads=2, export=export)
    assert student.get_output_embeddings().weight is student.get_input_embeddings().weight


@every_model
@every_export
def test_untied_embeddings_stay_untied(model_type, export):
    donor = tiny_donor(model_type, tie_word_embeddings=False)
    student = convert(donor, num_key_value_heads=NUM_ATTENTION_HEADS, export=export)
    assert student.get_output_embeddings().weight is not student.get_input_embeddings().weight
    assert torch.equal(logits_of(student), logits_of(donor))
