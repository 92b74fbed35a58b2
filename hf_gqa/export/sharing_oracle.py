"""The donor, in its own class, made to compute what its student with shared layers computes: the slow reference."""

from collections.abc import Sequence

import torch
from transformers import PreTrainedModel

from ..runtime.attention_layout import AttentionLayout
from ..runtime.layer_plan import LayerPlan
from ..runtime.planned_model import tied_names
from ..weights.head_tensors import split_heads


STATES = ("query", "key", "value")


@torch.no_grad()
def share_layers(
    model: PreTrainedModel, layout: AttentionLayout, rows: Sequence[LayerPlan], head_dim: int, shared_init: str = "own"
) -> None:
    """In place: borrowers keep all their modules, but what their projections give is overwritten by the lender's.

    Nothing is skipped and nothing is cached for others. Rotation comes after the projections, for the same positions.

    Args:
        model: with as many KV heads as it had; merged ones are repeated.
    """
    base = model.base_model
    donor = {name: parameter.clone() for name, parameter in base.named_parameters()}
    attention = [base.get_submodule(layout.attention.format(layer_idx=layer_idx)) for layer_idx in range(len(rows))]
    for layer_idx in range(len(rows)):
        _tie(base, donor, layout, rows, layer_idx, shared_init)
        if shared_init == "mean":
            _average(
                attention, donor, layout, rows, layer_idx, base.config.get_text_config().num_attention_heads, head_dim
            )
    given = [{} for _ in rows]
    for layer_idx, row in enumerate(rows):
        _borrow(base, attention, layout, row, layer_idx, given, head_dim)


def _tie(base, donor, layout: AttentionLayout, rows, layer_idx: int, shared_init: str) -> None:
    row = rows[layer_idx]
    if row.parameters_from is None:
        return
    before, _, attention = layout.attention.partition("{layer_idx}.")
    users = [n for n, other in enumerate(rows) if other.parameters_from == row.parameters_from]
    for name in tied_names(base.get_submodule(f"{before}{layer_idx}"), attention, row.tied):
        if f"{before}{row.parameters_from}.{name}" not in donor:  # the first ModernBERT layer lacks a norm
            continue
        members = [donor[f"{before}{n}.{name}"] for n in (row.parameters_from, *users)]
        shared = torch.stack([m.float() for m in members]).mean(0) if shared_init == "mean" else members[0]
        for n in (row.parameters_from, layer_idx):
            base.get_parameter(f"{before}{n}.{name}").copy_(shared)


def _average(
    attention, donor, layout: AttentionLayout, rows, layer_idx: int, num_attention_heads: int, head_dim: int
) -> None:
    """Keys and values that other queries read become the mean over the layers that read them."""
    for number, state in ((1, "key"), (2, "value")):
        users = [n for n, r in enumerate(rows) if getattr(r, f"{state}_from") == layer_idx and r.query_from is None]
        module = layout.fused or getattr(layout, state)
        for kind in ("weight", "bias") if users else ():
            names = [f"{layout.attention.format(layer_idx=n)}.{module}.{kind}" for n in (layer_idx, *users)]
            if names[0] not in donor:
                continue
            mean = torch.stack([donor[name].float() for name in names]).mean(0)
            own = attention[layer_idx].get_submodule(module).get_parameter(kind)
            axis = own.dim() - 1 if module in layout.transposed else 0
            part = _part(layout, own.shape[axis], number, num_attention_heads, head_dim).to(own.device)
            own.index_copy_(axis, part, mean.index_select(axis, part).to(own))


def _borrow(
    base, attention, layout: AttentionLayout, row: LayerPlan, layer_idx: int, given: list[dict], head_dim: int
) -> None:
    own = attention[layer_idx]
    if row.query_from is not None:
        mixing = [base.get_submodule(layout.mixing_module(n)) for n in (layer_idx, row.query_from)]
        if hasattr(mixing[1], "scaling"):  # which ModernBERT writes out
            mixing[0].scaling = mixing[1].scaling
    for number, state in enumerate(STATES):
        lender = getattr(row, f"{state}_from")
        norm = getattr(layout, f"{state}_norm", None)
        if lender is not None and norm is not None and hasattr(own, norm):  # norms may be switched off
            own.get_submodule(norm).load_state_dict(attention[lender].get_submodule(norm).state_dict())

        def hook(module, args, output, number=number, lender=lender):
            heads = base.config.get_text_config().num_attention_heads
            part = _part(layout, output.shape[-1], number, heads, head_dim).to(output.device)
            if lender is None:
                given[layer_idx][number] = output[..., part]
                return output
            return output.index_copy(-1, part, given[lender][number])

        own.get_submodule(layout.fused or getattr(layout, state)).register_forward_hook(hook)


def _part(layout: AttentionLayout, size: int, number: int, num_attention_heads: int, head_dim: int) -> torch.Tensor:
    """Which rows of what a projection gives are query (0), key (1) or value (2)."""
    rows = torch.arange(size)
    if layout.fused is None:
        return rows
    return split_heads(layout, rows.unflatten(0, (-1, head_dim)), num_attention_heads)[number].flatten()
