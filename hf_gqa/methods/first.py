"""Each group of KV heads becomes its first member."""

from dataclasses import dataclass

from ..weights.attention_weights import AttentionWeights
from . import MethodContext


@dataclass(frozen=True, slots=True, kw_only=True)
class First:
    """Source: GQA (Ainslie et al. 2023, arXiv 2305.13245), figure 4, "First"."""

    kind: str = "reduce"

    def __call__(self, heads: AttentionWeights, layer: MethodContext) -> AttentionWeights:
        members = heads.num_key_value_heads // layer.num_key_value_heads
        return heads.map_key_value(lambda tensor_K: tensor_K[::members])


METHOD = First()
