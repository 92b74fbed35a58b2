"""What layer sharing changes in a conversion: tensors that borrowers no longer have, and what their lenders start from."""

import copy
import re
from collections.abc import Callable
from dataclasses import fields, replace

import torch
from transformers import PreTrainedModel

from ..refusal import Refusal
from ..runtime.attention_layout import AttentionLayout
from ..runtime.layer_plan import STATES, LayerPlan
from ..runtime.planned_attention import borrowed_modules
from ..weights.attention_weights import AttentionWeights
from .plan import ConversionPlan
from .target import Target


Rows = tuple[LayerPlan, ...]


def borrowed_pattern(rows: Rows, layout: AttentionLayout) -> re.Pattern:
    """Matches names, below the base model, of tensors of what layers borrow instead of computing it."""
    gone = [
        re.escape(f"{layout.mixing_module(layer_idx)}.{module}.")
        for layer_idx, row in enumerate(rows)
        for module in borrowed_modules(row, layout)
    ]
    return re.compile("|".join(gone) or r"(?!)")


def tied_parameters(target: Target) -> dict[str, str]:
    """Names, below the base model, of parameters that are another layer's -> names of that layer's."""
    if all(row.parameters_from is None for row in target.rows):
        return {}
    return _without_values(target, target.config.layer_plan).base_model.tied_layers


def removed_parameters(target: Target) -> int:
    """Numbers that the student has fewer than one whose layers, with the same KV heads, own all."""
    if not any(row.borrows for row in target.rows):
        return 0
    alone = [{"num_key_value_heads": row.num_key_value_heads} for row in target.rows]
    owning, student = (_without_values(target, rows) for rows in (alone, target.config.layer_plan))
    return sum(p.numel() for p in owning.parameters()) - sum(p.numel() for p in student.parameters())


def _without_values(target: Target, rows: list[dict]) -> PreTrainedModel:
    config = copy.deepcopy(target.config)
    config.layer_plan, config._attn_implementation = rows, "eager"  # which every native class has
    with torch.device("meta"):
        return target.model_class(config)


def borrowers(rows: Rows, layer_idx: int, column: str) -> list[int]:
    return [other for other, row in enumerate(rows) if getattr(row, column) == layer_idx]


def lent_heads(
    heads_of: Callable[[int], AttentionWeights], rows: Rows, layer_idx: int, shared_init: str
) -> AttentionWeights:
    """A layer's heads as the donor has them, or the mean of what it lends over all layers that use it.

    Source: MLKV (Zuhri et al. 2024, arXiv 2406.09297) pools over layers too, pair by pair.
    """
    heads = heads_of(layer_idx)
    if shared_init != "mean":
        return heads
    tied = [n for n in borrowers(rows, layer_idx, "parameters_from") if rows[n].tied != "feed_forward"]
    columns = {column: borrowers(rows, layer_idx, column) for column in ("key_from", "value_from")}
    using = {
        **{field.name: tied for field in fields(AttentionWeights)},
        **{
            f"{name}{part}": sorted({*tied, *(n for n in columns[f"{name}_from"] if rows[n].query_from is None)})
            for name, parts in (("key", ("_KDE", "_bias_KD", "_norm_KD")), ("value", ("_KDE", "_bias_KD")))
            for part in parts
        },
    }
    members = {n: heads_of(n) for n in sorted({n for layers in using.values() for n in layers})}
    changed = {
        name: mean([getattr(heads, name), *(getattr(members[n], name) for n in layers)])
        for name, layers in using.items()
        if layers and getattr(heads, name) is not None
    }
    return replace(heads, **changed)


def mean(tensors: list[torch.Tensor]) -> torch.Tensor:
    return torch.stack([tensor.float() for tensor in tensors]).mean(0).to(tensors[0])


def check_readers(
    plan: ConversionPlan, rows: Rows, layer_idx: int, before: AttentionWeights, after: AttentionWeights
) -> None:
    """Refuse methods that changed how a layer reads keys and values that other layers read, or that it reads of others."""
    row = rows[layer_idx]
    shares = row.borrows_states or any(borrowers(rows, layer_idx, column) for column in STATES)
    same_readers = after.query_HDE is before.query_HDE and after.output_EHD is before.output_EHD
    if shares and not same_readers:
        raise Refusal(
            f"method = {','.join(plan.method)}: changes queries or output projections to fit new KV heads, layer by layer, "
            f"and layer {layer_idx} shares with others. Use a method that leaves them alone, such as mean_pool or first."
        )
