"""Each KV head is turned towards the others of its group, so that a mean of them loses less."""

from dataclasses import dataclass

import torch

from ..weights.attention_weights import AttentionWeights
from ..weights.head_spaces import (
    HeadSpace,
    aligning_maps,
    key_spaces,
    value_space,
    with_shared_keys,
    with_shared_values,
)
from . import MethodContext


@dataclass(frozen=True, slots=True, kw_only=True)
class Align:
    """Values turn by any orthogonal matrix; keys too, or where they rotate by one angle per rotary pair.

    Source: Align Attention Heads Before Merging Them (Jin et al. 2024, arXiv 2412.20677). Keys that are normed stay as
    they are: the norm's weight tells their dimensions apart.
    """

    kind: str = "rearrange"

    def __call__(self, heads: AttentionWeights, layer: MethodContext) -> AttentionWeights:
        groups = layer.groups(heads)
        count = heads.num_key_value_heads
        if len(groups) == count:
            return heads
        statistics = layer.statistics_for(heads)

        def maps(space: HeadSpace) -> tuple[torch.Tensor, torch.Tensor]:
            turn = torch.cat([aligning_maps(space.of(members)) for members in groups])
            return turn, turn.mH

        values = maps(value_space(heads, statistics))
        aligned = with_shared_values(heads, *values, count, statistics.moment_FF[:, -1])
        if layer.head_norms:
            return aligned
        keys = [maps(space) for space in key_spaces(heads, statistics, layer.rotation)]
        return with_shared_keys(aligned, keys, count, layer.rotation)


METHOD = Align()
