"""Between a checkpoint's tensors and canonical heads, as the family's layout says.

Shapes: H query heads, K KV heads, D head_dim, E hidden.
"""

from collections.abc import Callable

import torch

from ..runtime.attention_layout import AttentionLayout
from .attention_weights import AttentionWeights


def projection_names(layout: AttentionLayout) -> tuple[str, ...]:
    """The projections of one layer that exist as tensors, in the order they are written."""
    inputs = (layout.fused,) if layout.fused else (layout.query, layout.key, layout.value)
    return (*inputs, layout.output)


def head_tensor_names(layout: AttentionLayout) -> tuple[str, ...]:
    """Names below the layer's attention of every tensor that can hold heads; `{head}` stands for a number."""
    projections = tuple(f"{name}.{kind}" for name in projection_names(layout) for kind in ("weight", "bias"))
    return projections + tuple(_norm_tensor(layout, norm) for norm in head_norms(layout))


def head_norms(layout: AttentionLayout) -> tuple[str, ...]:
    """The norms on queries and keys, if each head has weights of its own."""
    if layout.query_norm is None or layout.norm_weights == "shared":
        return ()
    return layout.query_norm, layout.key_norm


def _norm_tensor(layout: AttentionLayout, norm: str) -> str:
    return f"{norm}.weight" if layout.norm_list is None else f"{norm}.{layout.norm_list}.{{head}}.weight"


def read_heads(
    layout: AttentionLayout, get: Callable[[str], torch.Tensor | None], num_attention_heads: int, head_dim: int
) -> AttentionWeights:
    """Read one layer; views of the stored tensors wherever the layout allows.

    Args:
        get: name below the layer's attention (`k_proj.weight`) -> tensor, None if there is none.
        num_attention_heads: H.
        head_dim: D.
    """

    def stored(name: str) -> tuple[torch.Tensor, torch.Tensor | None]:
        weight = get(f"{name}.weight")
        return (weight.t() if name in layout.transposed else weight), get(f"{name}.bias")

    if layout.fused:
        weight, bias = stored(layout.fused)
        query_rows = num_attention_heads * head_dim
        key_value_rows = (weight.shape[0] - query_rows) // 2
        sizes = (query_rows, key_value_rows, key_value_rows)
        weights = weight.split(sizes)
        biases = bias.split(sizes) if bias is not None else (None,) * 3
    else:
        weights, biases = zip(*(stored(name) for name in (layout.query, layout.key, layout.value)), strict=True)
    output, output_bias = stored(layout.output)
    query_HDE, key_KDE, value_KDE = (weight.unflatten(0, (-1, head_dim)) for weight in weights)
    query_bias, key_bias, value_bias = (b.unflatten(0, (-1, head_dim)) if b is not None else None for b in biases)
    norms = [_read_norm(layout, get, norm, head_dim) for norm in head_norms(layout)] or [None, None]
    return AttentionWeights(
        query_HDE=query_HDE,
        key_KDE=key_KDE,
        value_KDE=value_KDE,
        output_EHD=output.unflatten(1, (num_attention_heads, head_dim)),
        query_bias_HD=query_bias,
        key_bias_KD=key_bias,
        value_bias_KD=value_bias,
        output_bias_E=output_bias,
        query_norm_HD=norms[0],
        key_norm_KD=norms[1],
    )


def _read_norm(layout: AttentionLayout, get: Callable, norm: str, head_dim: int) -> torch.Tensor | None:
    """`[heads, D]`; None where the configuration has switched the norm off."""
    name = _norm_tensor(layout, norm)
    if layout.norm_list is None:
        weight = get(name)
        return None if weight is None else weight.reshape(-1, head_dim)
    weights = []
    while (weight := get(name.format(head=len(weights)))) is not None:
        weights.append(weight)
    return torch.stack(weights) if weights else None


def write_heads(layout: AttentionLayout, heads: AttentionWeights) -> dict[str, torch.Tensor]:
    """The inverse of `read_heads`: name below the layer's attention -> contiguous tensor."""
    weights = [w.flatten(0, 1) for w in (heads.query_HDE, heads.key_KDE, heads.value_KDE)]
    biases = [None if b is None else b.flatten() for b in (heads.query_bias_HD, heads.key_bias_KD, heads.value_bias_KD)]
    if layout.fused:
        weights, biases = [torch.cat(weights)], [None if biases[0] is None else torch.cat(biases)]
    weights.append(heads.output_EHD.flatten(1))
    biases.append(heads.output_bias_E)
    tensors = {}
    for name, weight, bias in zip(projection_names(layout), weights, biases, strict=True):
        tensors[f"{name}.weight"] = (weight.t() if name in layout.transposed else weight).contiguous()
        if bias is not None:
            tensors[f"{name}.bias"] = bias.contiguous()
    for norm, weight in zip(head_norms(layout), (heads.query_norm_HD, heads.key_norm_KD), strict=False):
        if weight is not None:
            tensors.update(_written_norm(layout, _norm_tensor(layout, norm), weight))
    return tensors


def _written_norm(layout: AttentionLayout, name: str, weight: torch.Tensor) -> dict[str, torch.Tensor]:
    if layout.norm_list is not None:
        return {name.format(head=head): row.contiguous() for head, row in enumerate(weight)}
    return {name: (weight.flatten() if layout.norm_weights == "joint" else weight).contiguous()}
