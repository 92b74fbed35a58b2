"""Each group of KV heads becomes its principal component; query and output projections absorb the rest."""

from dataclasses import dataclass

import torch

from ..weights.attention_weights import AttentionWeights
from ..weights.head_spaces import key_space, principal_maps, value_space, with_shared_keys, with_shared_values
from . import MethodContext


@dataclass(frozen=True, slots=True, kw_only=True)
class Fold:
    """Least-squares best shared head for what the layer's queries and output projection do with it, in closed form.

    Source: ours; nearest are TransMLA (Meng et al. 2025, arXiv 2502.07864) and Yu et al. 2024 (arXiv 2406.07056).
    Under a rotary embedding, keys are mixed by one complex number per rotary pair, which commutes with it.
    """

    kind: str = "reduce"
    needs_linear_scores: bool = True

    def __call__(self, heads: AttentionWeights, layer: MethodContext) -> AttentionWeights:
        statistics = layer.statistics_for(heads)
        groups = layer.groups(heads)
        maps = []
        for space in (key_space(heads, statistics, layer.rotary), value_space(heads, statistics)):
            read, write = zip(*(principal_maps(space.of(members)) for members in groups), strict=True)
            maps.append((torch.cat(read), torch.cat(write)))
        (key_read, key_write), (value_read, value_write) = maps
        folded = with_shared_values(heads, value_read, value_write, len(groups), statistics.moment_FF[:, -1])
        return with_shared_keys(folded, key_read, key_write, len(groups), layer.rotary)


METHOD = Fold()
