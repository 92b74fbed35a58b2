"""The donor, in its own class, with a student's heads in place of its own: what any student must compute."""

from collections.abc import Iterator, Sequence
from dataclasses import fields, replace
from pathlib import Path

import torch
from transformers import PreTrainedModel

from ..convert.donor import Donor, open_donor
from ..convert.layer_conversion import converted_layer
from ..convert.layer_run import put_heads
from ..convert.manifest import Manifest
from ..convert.plan import ConversionPlan
from ..convert.surgery import layer_heads
from ..methods import METHODS
from ..runtime.layer_plan import LayerPlan
from ..weights.attention_weights import AttentionWeights
from ..weights.head_tensors import read_heads


def is_repeatable(manifest: Manifest, plan: ConversionPlan) -> bool:
    """Whether the heads follow from the donor alone, as no text was looked at."""
    observes = any(getattr(METHODS.get(name), "observes", False) for name in plan.method)
    return manifest.calibration is None and not observes


@torch.no_grad()
def put_converted_heads(model: PreTrainedModel, donor: Donor, folder: Path, manifest: Manifest) -> str:
    """In place: each layer's heads become the student's, KV heads repeated until there are as many as before.

    Args:
        model: the donor, loaded.
        folder: of the student.

    Returns:
        Where the heads are from, in words.

    Raises:
        Refusal: a student whose heads cannot be read.
    """
    plan = ConversionPlan.from_dict(manifest.plan)
    repeated = is_repeatable(manifest, plan)
    for layer_idx, heads in _converted_again(donor, plan, manifest) if repeated else _of_student(folder):
        path = donor.sites[layer_idx].path
        put_heads(donor.layout, model.base_model.get_submodule(path), heads)
    return "heads merged again" if repeated else "the student's own heads, for its methods looked at text"


def _converted_again(donor: Donor, plan: ConversionPlan, manifest: Manifest) -> Iterator[tuple[int, AttentionWeights]]:
    for layer_idx, heads in layer_heads(donor):
        wanted = manifest.layer_plan[layer_idx]["num_key_value_heads"]
        yield layer_idx, converted_layer(donor, plan, heads, layer_idx, wanted)


def _of_student(folder: Path) -> Iterator[tuple[int, AttentionWeights]]:
    return layer_heads(open_donor(folder, weights_only=True))


@torch.no_grad()
def put_fitted_borrowers(model: PreTrainedModel, donor: Donor, folder: Path, rows: Sequence[LayerPlan]) -> None:
    """In place: what borrowers own in the student, in the donor's layers; what they borrow is left as it was.

    Args:
        model: the donor, loaded, its merged heads repeated.
    """
    for layer_idx, theirs in _of_student(folder):
        if not rows[layer_idx].borrows_states:
            continue
        attention = model.base_model.get_submodule(donor.sites[layer_idx].path)
        own = read_heads(donor.layout, dict(attention.named_parameters()).get, *theirs.output_EHD.shape[1:])
        copies = own.num_key_value_heads // rows[layer_idx].num_key_value_heads
        found = {part.name: getattr(theirs, part.name) for part in fields(theirs)}
        owned = {name: tensor for name, tensor in found.items() if tensor is not None}
        put_heads(donor.layout, attention, replace(own.map_key_value(lambda t, n=copies: t[::n].clone()), **owned))
