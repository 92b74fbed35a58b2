"""Every encoder-decoder: gradients of the student are those of copied heads, with and without checkpointing."""

import pytest
import torch
from transformers import PreTrainedModel

from hf_gqa import convert

from .gradients import enable_checkpointing
from .seq2seq_conformance import KEYS_AND_VALUES, assert_close, every_attention
from .seq2seq_donors import decoder_tokens, encoder_inputs, seq2seq_donor


def gradients(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    """Of the loss, by parameter name; every parameter must have one, but for tables of sines."""
    model.zero_grad()
    model(**encoder_inputs(model), labels=decoder_tokens(), use_cache=False).loss.backward()
    found = {name: parameter.grad for name, parameter in model.named_parameters()}
    assert all("embed_positions" in name for name, gradient in found.items() if gradient is None)
    found = {name: gradient.clone() for name, gradient in found.items() if gradient is not None}
    assert all(gradient.abs().max() > 0 for gradient in found.values())
    return found


@every_attention
def test_gradient_of_a_head_is_the_sum_over_its_copies(model_type, attention):
    """The slow reference: a native model, in which every query head has its own copy of its KV head."""
    donor = seq2seq_donor(model_type)
    donor.set_attn_implementation(attention)
    student = convert(donor, num_key_value_heads=2, convert_encoder=True)
    copies = convert(student, num_key_value_heads=4, method="expand", convert_encoder=True)
    assert type(copies) is type(donor)
    found, expected = gradients(student), gradients(copies)
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        if KEYS_AND_VALUES.search(name):
            gradient = gradient.unflatten(0, (2, 2, -1)).sum(1).flatten(0, 1)
        assert_close(found[name], gradient)


@every_attention
@pytest.mark.parametrize("dropout", [0.0, 0.2])
def test_gradient_checkpointing_changes_no_gradient(model_type, attention, dropout):
    donor = seq2seq_donor(model_type, dropout_rate=dropout, attention_dropout=dropout, dropout=dropout)
    donor.set_attn_implementation(attention)
    student = convert(donor, num_key_value_heads=2).train()
    torch.manual_seed(0)
    expected = gradients(student)
    enable_checkpointing(student)
    torch.manual_seed(0)
    found = gradients(student)
    for name, gradient in expected.items():
        assert_close(found[name], gradient)
