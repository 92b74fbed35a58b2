"""What benchmarks/conversion.py converts besides plain plans: budgets per layer, and what no class of transformers holds.

Such students are donors with other heads in place: what they compute is what a class that holds fewer would.
"""

import copy
from dataclasses import dataclass, replace

import torch

from hf_gqa import convert
from hf_gqa.convert.cache_bytes import cache_bytes_per_token_computed
from hf_gqa.convert.calibration import Calibration
from hf_gqa.convert.donor import Donor, donor_from_model
from hf_gqa.convert.layer_conversion import converted_layer
from hf_gqa.convert.layer_run import put_heads
from hf_gqa.convert.plan import ConversionPlan
from hf_gqa.convert.surgery import layer_heads
from hf_gqa.workflow.head_budget import allot_heads
from hf_gqa.workflow.layer_budget import best_assignment, greedy_assignment


@dataclass(frozen=True)
class Known:
    """The donor, what was seen of it, KV heads of a layer on average, and damages by method that were measured already."""

    model: torch.nn.Module
    calibration: Calibration
    heads: int
    damages: dict

    @property
    def donor(self) -> Donor:
        return donor_from_model(self.model)

    @property
    def divides(self) -> bool:
        return all(count % self.heads == 0 for count in self.donor.num_key_value_heads)


def plain(method: str, known: Known, calibrated: bool = True):
    if not known.divides or known.heads >= max(known.donor.num_key_value_heads):
        return None, {}
    calibration = known.calibration if calibrated else None
    if method == "whole projections of low rank":
        return whole_projections(known), {}
    return convert(known.model, num_key_value_heads=known.heads, method=method, calibration=calibration), {}


def per_layer(method: str, known: Known, greedy: bool = False):
    """The same cache as `heads` in every layer."""
    donor = known.donor
    layers = donor.config.num_hidden_layers
    if known.heads == 1 or known.heads >= max(donor.num_key_value_heads):
        return None, {}
    closed_form = method.replace(",refit_queries", "").replace(",refit", "")
    if closed_form not in known.damages:
        least_bytes = cache_bytes_per_token_computed(donor.config, [1] * layers, known.model.dtype)
        allotment = allot_heads(donor, known.model, known.calibration, least_bytes, closed_form)
        known.damages[closed_form] = allotment
    allotment, assign = known.damages[closed_form], greedy_assignment if greedy else best_assignment
    fields = replace(allotment, num_key_value_heads=assign(allotment.damages, known.heads * layers)).plan_fields
    student = convert(known.model, method=method, calibration=known.calibration, **fields)
    return student, {"plan": {name: list(v) if isinstance(v, tuple) else v for name, v in fields.items()}}


def keys_and_values(method: str, known: Known, keys: int, values: int):
    """Keys of one conversion, values of another; which of the heads are neighbours is the donor's."""
    if keys + values != 2 * known.heads or max(keys, values) > min(known.donor.num_key_value_heads):
        return None, {}
    donor, made = known.donor, copy.deepcopy(known.model)
    for layer_idx, own in layer_heads(donor):
        statistics = known.calibration.statistics[layer_idx]
        attention = made.base_model.get_submodule(donor.layout.attention.format(layer_idx=layer_idx))
        for_keys, for_values = (
            converted_layer(donor, ConversionPlan(num_key_value_heads=n, method=method), own, layer_idx, n, statistics)
            for n in (keys, values)
        )
        copies = own.num_key_value_heads // torch.tensor([keys, values])
        key_value = {
            name: None if tensor is None else tensor.repeat_interleave(int(times), dim=0)
            for times, found, names in (
                (copies[0], for_keys, ("key_KDE", "key_bias_KD")),
                (copies[1], for_values, ("value_KDE", "value_bias_KD")),
            )
            for name, tensor in ((name, getattr(found, name)) for name in names)
        }
        put_heads(donor.layout, attention, replace(
            for_values, query_HDE=for_keys.query_HDE, query_bias_HD=for_keys.query_bias_HD, **key_value
        ))  # fmt: skip
    return made, {}


def whole_projections(known: Known):
    """Keys and values of all heads together by as many numbers as `heads` KV heads have: truncated SVD, biases kept."""
    donor, made = known.donor, copy.deepcopy(known.model)
    rank = known.heads * donor.head_dim
    for layer_idx, own in layer_heads(donor):
        attention = made.base_model.get_submodule(donor.layout.attention.format(layer_idx=layer_idx))
        changed = {}
        for name in ("key_KDE", "value_KDE"):
            left, values, right = torch.linalg.svd(getattr(own, name).flatten(0, 1).double(), full_matrices=False)
            kept = (left[:, :rank] * values[:rank]) @ right[:rank]
            changed[name] = kept.unflatten(0, (-1, donor.head_dim)).to(own.key_KDE)
        put_heads(donor.layout, attention, replace(own, **changed))
    return made


VARIANTS = {
    "": plain,
    "no stock class": plain,
    "weights alone": lambda method, known: plain(method, known, calibrated=False),
    "per layer": per_layer,
    "per layer, greedy": lambda method, known: per_layer(method, known, greedy=True),
    "keys 4, values 2": lambda method, known: keys_and_values(method, known, 4, 2),
    "keys 2, values 4": lambda method, known: keys_and_values(method, known, 2, 4),
}
