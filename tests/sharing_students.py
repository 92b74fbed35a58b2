"""Students whose layers share, of every family, and the donor that is made to compute the same: by hooks, in its own class."""

import copy
import functools

import pytest
import torch
from transformers import PreTrainedModel

from hf_gqa import convert
from hf_gqa.convert.donor import donor_from_model
from hf_gqa.convert.families import load_family
from hf_gqa.export.sharing_oracle import share_layers
from hf_gqa.runtime.layer_plan import read_rows

from .conformance import logits_of
from .tiny_donors import (
    MODEL_TYPES,
    NUM_ATTENTION_HEADS,
    NUM_LAYERS,
    SPECIAL,
    of_each_storage,
    tiny_donor,
    use_attention,
)


DEPTH = 6  # of two attention types in turn, where the family has two
MIXED = [
    {},
    {},
    {"query_from": 0, "key_from": 0},  # the attention matrix
    {"key_from": 1, "value_from": 1, "parameters_from": 1, "tied": "feed_forward"},
    {"key_from": 0},  # keys alone
    {"value_from": 1},  # values alone
]
PLANS = {
    "echo": {"sharing": "echo", "shared_layers": [2, 3, 5]},
    "echo of two heads": {"sharing": "echo", "share_every": 2, "num_key_value_heads": 2},
    "cross-layer": {"sharing": "cross_layer_kv", "share_every": 2},
    "trailing mean": {"sharing": "cross_layer_kv", "shared_layers": [2, 3, 4, 5], "shared_init": "mean"},
    "cross-layer of one head": {"sharing": "cross_layer_kv", "shared_layers": [2, 3], "num_key_value_heads": 1},
    "albert": {"sharing": "albert", "share_every": 3},
    "albert attention mean": {"sharing": "albert_attention", "share_every": 2, "shared_init": "mean"},
    "albert feed-forward": {"sharing": "albert_feed_forward", "shared_layers": [4, 5], "num_key_value_heads": 2},
    "mixed": {"layer_plan": [{"num_key_value_heads": 2, **row} for row in MIXED]},
}
WHOLE = ("llama", "gemma3_text", "gpt2")  # one norm and type, two types with norms, fused without rotation
FAMILIES = [m for m in MODEL_TYPES if load_family(m).donor_layout.passes_keywords]
CASES = [(m, plan) for m in FAMILIES for plan in PLANS if m in WHOLE or plan in ("mixed", "albert")]
CASES += [(m, "albert") for m in MODEL_TYPES if m not in FAMILIES]
every_family = pytest.mark.parametrize("model_type", FAMILIES)
of_each_storage_a_case = pytest.mark.parametrize(
    ("model_type", "plan"), [(m, plan) for m, plan in CASES if m in (*WHOLE, *of_each_storage(MODEL_TYPES))]
)


def deep_donor(model_type: str, **changes) -> PreTrainedModel:
    """With `DEPTH` layers, their types repeating those of the tiny donor."""
    per_layer = {
        name: value * (DEPTH // NUM_LAYERS)
        for name, value in SPECIAL.get(model_type, {}).items()
        if isinstance(value, list) and len(value) == NUM_LAYERS
    }
    return tiny_donor(model_type, **{"num_hidden_layers": DEPTH} | per_layer | changes)


def sharing_student(model_type: str, plan: str, attention: str = "sdpa", **changes) -> PreTrainedModel:
    student = _student(model_type, plan, **changes)
    use_attention(student, attention)
    student.zero_grad()
    return student.eval()


@functools.cache
def _student(model_type: str, plan: str, **changes) -> PreTrainedModel:
    return convert(deep_donor(model_type, **changes), **PLANS[plan])


def oracle_of(model_type: str, plan: str, attention: str = "sdpa", **changes) -> PreTrainedModel:
    """The donor whose borrowers' projections are overwritten; merged heads are repeated until it has as many as before."""
    rows = read_rows(sharing_student(model_type, plan, attention, **changes).config)
    donor = copy.deepcopy(_donor_of_merged_heads(model_type, rows[0].num_key_value_heads, **changes))
    opened = donor_from_model(donor)
    share_layers(donor, opened.layout, rows, opened.head_dim, PLANS[plan].get("shared_init", "own"))
    use_attention(donor, attention)
    return donor


@functools.cache
def _donor_of_merged_heads(model_type: str, num_key_value_heads: int, **changes) -> PreTrainedModel:
    donor = deep_donor(model_type, **changes)
    if num_key_value_heads == NUM_ATTENTION_HEADS:
        return donor
    merged = convert(donor, num_key_value_heads=num_key_value_heads, export="bundle")
    return convert(merged, num_key_value_heads=NUM_ATTENTION_HEADS, method="expand")


@functools.cache
def plain_logits(model_type: str) -> torch.Tensor:
    """Of the donor whose layers do not share."""
    return logits_of(deep_donor(model_type), padded=True)
