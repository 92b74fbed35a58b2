"""What layer sharing changes in a conversion: tensors that borrowers no longer have, and what their lenders start from."""

import re
from collections.abc import Callable
from dataclasses import replace

import torch

from ..refusal import Refusal
from ..runtime.attention_layout import AttentionLayout
from ..runtime.layer_plan import STATES, LayerPlan
from ..runtime.planned_attention import borrowed_modules
from ..weights.attention_weights import AttentionWeights
from .plan import ConversionPlan


Rows = tuple[LayerPlan, ...]


def borrowed_pattern(rows: Rows, layout: AttentionLayout, base_model_prefix: str) -> re.Pattern:
    """Matches the beginning of the names of tensors that layers have no longer, because they borrow what they computed."""
    gone = [
        re.escape(f"{layout.attention.format(layer_idx=layer_idx)}.{module}.")
        for layer_idx, row in enumerate(rows)
        for module in borrowed_modules(row, layout)
    ]
    return re.compile(rf"(?:{re.escape(base_model_prefix)}\.)?(?:{'|'.join(gone)})" if gone else r"(?!)")


def borrowers(rows: Rows, layer_idx: int, column: str) -> list[int]:
    return [other for other, row in enumerate(rows) if getattr(row, column) == layer_idx]


def lent_heads(
    heads_of: Callable[[int], AttentionWeights], rows: Rows, layer_idx: int, shared_init: str
) -> AttentionWeights:
    """A layer's heads as the donor has them, or where it lends keys or values, their mean over all that use them.

    Source: MLKV (Zuhri et al. 2024, arXiv 2406.09297) pools over layers too, pair by pair.
    """
    heads = heads_of(layer_idx)
    if shared_init != "mean":
        return heads
    for column, names in (("key_from", ("key_KDE", "key_bias_KD")), ("value_from", ("value_KDE", "value_bias_KD"))):
        using = [other for other in borrowers(rows, layer_idx, column) if rows[other].query_from is None]
        members = [heads, *map(heads_of, using)]
        for name in names if using else ():
            tensors = [getattr(member, name) for member in members]
            if tensors[0] is not None:
                heads = replace(heads, **{name: torch.stack([t.float() for t in tensors]).mean(0).to(tensors[0])})
    return heads


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
