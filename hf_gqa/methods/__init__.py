"""Floor 2: conversion methods, one file each; the file's name is the method's name.

A method file defines `METHOD`, an instance of a frozen dataclass with a `kind` and a
`__call__(heads: AttentionWeights, layer: MethodContext) -> AttentionWeights`:

- `rearrange` keeps what the layer computes and its number of KV heads;
- `reduce` lowers the number of KV heads to `layer.num_key_value_heads`;
- `expand` raises it, and keeps what the layer computes.
"""

from dataclasses import dataclass

from ..registry import Registry


METHODS = Registry(__name__, "conversion method", "METHOD")
KINDS = ("rearrange", "reduce", "expand")


@dataclass(frozen=True, slots=True, kw_only=True)
class MethodContext:
    """What a method may know besides the heads.

    Args:
        layer_idx: the layer, from 0.
        num_key_value_heads: KV heads the layer shall have.
        seed: the plan's seed.
        initializer_range: standard deviation of the donor's own initialisation.
    """

    layer_idx: int
    num_key_value_heads: int
    seed: int
    initializer_range: float


def method_kind(name: str) -> str:
    """Raises Refusal for an unknown method, TypeError for one whose `kind` is not a kind."""
    kind = METHODS.get(name).kind
    if kind not in KINDS:
        raise TypeError(f"conversion method '{name}': kind = {kind!r}. Use one of {', '.join(KINDS)}.")
    return kind
