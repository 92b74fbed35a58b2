"""Each group of KV heads becomes its mean."""

from dataclasses import dataclass

import torch

from ..weights.attention_weights import AttentionWeights
from . import MethodContext


@dataclass(frozen=True, slots=True, kw_only=True)
class MeanPool:
    """Source: GQA (Ainslie et al. 2023, arXiv 2305.13245), section 2.1.

    Keys, values and their biases alike, in at least fp32. Norms over head_dim are shared by all heads and stay.
    """

    kind: str = "reduce"

    def __call__(self, heads: AttentionWeights, layer: MethodContext) -> AttentionWeights:
        def mean(tensor_K: torch.Tensor) -> torch.Tensor:
            members = tensor_K.unflatten(0, (layer.num_key_value_heads, -1))
            if tensor_K.dtype.itemsize == 2:
                return members.mean(1, dtype=torch.float32).to(tensor_K.dtype)
            first = members[:, :1]  # the mean of what differs from it: exact where the members agree, however many
            return first[:, 0] + (members - first).mean(1)

        return heads.map_key_value(mean)


METHOD = MeanPool()
