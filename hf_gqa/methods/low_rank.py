"""Each group of KV heads becomes the truncated singular value decomposition of its stacked projections."""

from dataclasses import dataclass, replace

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
from ..weights.head_statistics import HeadStatistics
from . import MethodContext


@dataclass(frozen=True, slots=True, kw_only=True)
class LowRank:
    """The best stand-in for the weights themselves, whatever text and readers do with them; no text is looked at.

    Source: truncated SVD of weights is the baseline of SVD-LLM (Wang et al. 2024, arXiv 2403.07378); of a group of heads,
    Palu (Chang et al. 2024, arXiv 2407.21118). Query and output projections absorb one factor, so that what is left is an
    ordinary KV head; keys that rotate are decomposed pair by pair.
    """

    kind: str = "reduce"
    needs_linear_scores: bool = True

    def __call__(self, heads: AttentionWeights, layer: MethodContext) -> AttentionWeights:
        unseen = HeadStatistics.unseen(heads.key_KDE.shape[2])
        groups = layer.groups(heads)

        def maps(space: HeadSpace) -> tuple[torch.Tensor, torch.Tensor]:
            same = torch.eye(space.root_KBdd.shape[-1]).to(space.root_KBdd).expand_as(space.root_KBdd)
            plain = replace(space, root_KBdd=same)
            read, write = zip(*(principal_maps(plain.of(members)) for members in groups), strict=True)
            return torch.cat(read), torch.cat(write)

        values = maps(value_space(heads, unseen))
        keys = [maps(space) for space in key_spaces(heads, unseen, layer.rotation)]
        reduced = with_shared_values(heads, *values, len(groups), unseen.moment_FF[:, -1])
        return with_shared_keys(reduced, keys, len(groups), layer.rotation)


METHOD = LowRank()
