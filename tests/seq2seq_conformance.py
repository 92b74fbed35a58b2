"""What the tests of every encoder-decoder share, with an oracle that knows nothing of hf_gqa."""

import re
from collections.abc import Callable

import pytest
import torch
from transformers import PreTrainedModel

from hf_gqa.convert.families import load_family, native_class

from .seq2seq_donors import NUM_ATTENTION_HEADS, logits_of
from .tiny_donors import SEQ2SEQ_TYPES


every_family = pytest.mark.parametrize("model_type", SEQ2SEQ_TYPES)
KEYS_AND_VALUES = re.compile(
    r"(?P<stack>encoder|decoder)\.(?:block|layers)\.\d+\..*?"
    r"(?P<attention>SelfAttention|EncDecAttention|self_attn|encoder_attn)\.(?P<part>k|v)(?:_proj)?\.(?:weight|bias)$"
)


def assert_close(found: torch.Tensor, expected: torch.Tensor) -> None:
    """To 5e-5 of the largest value: T5 does not scale its scores, so attention is sharp and rounding shows more."""
    torch.testing.assert_close(found, expected, rtol=0, atol=5e-5 * max(1.0, expected.abs().max().item()))


def attentions_of(model_type: str) -> tuple[str, ...]:
    """Older releases of transformers know no sdpa for T5 and its like."""
    native = native_class(load_family(model_type).base_class)
    return ("sdpa", "eager") if native._supports_sdpa else ("eager",)


FAMILY_ATTENTIONS = [(name, attention) for name in SEQ2SEQ_TYPES for attention in attentions_of(name)]
every_attention = pytest.mark.parametrize("model_type, attention", FAMILY_ATTENTIONS)


def overwrite_groups(
    donor: PreTrainedModel, groups: int, stacks: tuple[str, ...] = ("decoder",), merge: Callable = torch.mean
) -> None:
    """Overwrite, in place, every KV head of these stacks by what its group becomes."""
    found = 0
    for name, parameter in donor.named_parameters():
        match = KEYS_AND_VALUES.search(name)
        if match is None or match["stack"] not in stacks:
            continue
        found += 1
        members = parameter.data.unflatten(0, (groups, NUM_ATTENTION_HEADS // groups, -1))
        merged = merge(members.double(), dim=1, keepdim=True).to(members)
        parameter.data.copy_(merged.expand_as(members).flatten(0, 2))
    assert found >= 2 * len(stacks) * donor.config.num_hidden_layers


def assert_same_logits(student: PreTrainedModel, oracle: PreTrainedModel, model_type: str) -> None:
    for attention in attentions_of(model_type):
        student.set_attn_implementation(attention)
        oracle.set_attn_implementation(attention)
        for padded in (False, True):
            assert_close(logits_of(student, padded), logits_of(oracle, padded))
