"""The donor, in its own class, with a student's heads in place of its own: what any student must compute."""

from collections.abc import Iterator
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
from ..weights.attention_weights import AttentionWeights


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
