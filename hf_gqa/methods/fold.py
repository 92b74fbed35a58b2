"""Each group of KV heads becomes its principal component; query and output projections absorb the rest."""

from dataclasses import dataclass

import torch

from ..weights.attention_weights import AttentionWeights
from ..weights.head_spaces import (
    HeadSpace,
    key_spaces,
    principal_maps,
    value_space,
    with_shared_keys,
    with_shared_values,
)
from . import MethodContext


@dataclass(frozen=True, slots=True, kw_only=True)
class Fold:
    """Least-squares best shared head for what the layer's queries and output projection do with it, in closed form.

    Source: ours; nearest are TransMLA (Meng et al. 2025, arXiv 2502.07864) and Yu et al. 2024 (arXiv 2406.07056).
    Under a rotary embedding, keys are mixed by one complex number per rotary pair, which commutes with it, and freely where they
    do not rotate.
    """

    kind: str = "reduce"
    needs_linear_scores: bool = True

    def __call__(self, heads: AttentionWeights, layer: MethodContext) -> AttentionWeights:
        statistics = layer.statistics_for(heads)
        groups = layer.groups(heads)

        def maps(space: HeadSpace) -> tuple[torch.Tensor, torch.Tensor]:
            read, write = zip(*(principal_maps(space.of(members)) for members in groups), strict=True)
            return torch.cat(read), torch.cat(write)

        values = maps(value_space(heads, statistics))
        keys = [maps(space) for space in key_spaces(heads, statistics, layer.rotation)]
        folded = with_shared_values(heads, *values, len(groups), statistics.moment_FF[:, -1])
        return with_shared_keys(folded, keys, len(groups), layer.rotation)


METHOD = Fold()
