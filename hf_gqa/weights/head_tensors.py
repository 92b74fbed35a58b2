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
        weight, bias = (t if t is None else t.unflatten(0, (-1, head_dim)) for t in stored(layout.fused))
        weights = split_heads(layout, weight, num_attention_heads)
        biases = (None,) * 3 if bias is None else split_heads(layout, bias, num_attention_heads)
    else:
        separate = (stored(name) for name in (layout.query, layout.key, layout.value))
        heads = [[t if t is None else t.unflatten(0, (-1, head_dim)) for t in pair] for pair in separate]
        weights, biases = zip(*heads, strict=True)
    output, output_bias = stored(layout.output)
    query_HDE, key_KDE, value_KDE = weights
    query_bias, key_bias, value_bias = biases
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


def split_heads(layout: AttentionLayout, heads_ND: torch.Tensor, num_attention_heads: int) -> tuple[torch.Tensor, ...]:
    """Query, key and value heads of a fused projection's `[H + 2K, D, ...]`; views where a block's heads are adjacent."""
    key_value_heads = (len(heads_ND) - num_attention_heads) // 2
    blocks = layout.fused_blocks or key_value_heads
    each = {
        "query": num_attention_heads // blocks,
        "key": key_value_heads // blocks,
        "value": key_value_heads // blocks,
    }
    parts = heads_ND.unflatten(0, (blocks, -1)).split([each[part] for part in layout.fused_order], dim=1)
    by_name = dict(zip(layout.fused_order, parts, strict=True))
    return tuple(by_name[part].flatten(0, 1) for part in ("query", "key", "value"))


def joined_heads(layout: AttentionLayout, heads: list[torch.Tensor]) -> torch.Tensor:
    """The inverse of `split_heads`, of query, key and value heads."""
    blocks = layout.fused_blocks or len(heads[1])
    by_name = dict(zip(("query", "key", "value"), (part.unflatten(0, (blocks, -1)) for part in heads), strict=True))
    return torch.cat([by_name[part] for part in layout.fused_order], dim=1).flatten(0, 1)


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
    weights = [heads.query_HDE, heads.key_KDE, heads.value_KDE]
    biases = [heads.query_bias_HD, heads.key_bias_KD, heads.value_bias_KD]
    if layout.fused:
        weights = [joined_heads(layout, weights)]
        biases = [None if biases[0] is None else joined_heads(layout, biases)]
    weights = [weight.flatten(0, 1) for weight in weights]
    biases = [None if bias is None else bias.flatten() for bias in biases]
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
