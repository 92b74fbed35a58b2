"""Each group of KV heads becomes its mean."""

from dataclasses import dataclass

from ..weights.attention_weights import AttentionWeights
from . import MethodContext


@dataclass(frozen=True, slots=True, kw_only=True)
class MeanPool:
    """Source: GQA (Ainslie et al. 2023, arXiv 2305.13245), section 2.1.

    Keys, values and their biases alike, in fp32. Norms over head_dim are shared by all heads and stay.
    """

    kind: str = "reduce"

    def __call__(self, heads: AttentionWeights, layer: MethodContext) -> AttentionWeights:
        return heads.mean_per_group(layer.num_key_value_heads)


METHOD = MeanPool()
