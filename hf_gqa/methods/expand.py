"""Each KV head is repeated: grouped-query back to multi-head, or to as many heads as a tensor-parallel group needs."""

from dataclasses import dataclass

from ..weights.attention_weights import AttentionWeights
from . import MethodContext


@dataclass(frozen=True, slots=True, kw_only=True)
class Expand:
    """The exact inverse of `mean_pool` and `first`: the layer computes what it did. Source: none, an identity."""

    kind: str = "expand"

    def __call__(self, heads: AttentionWeights, layer: MethodContext) -> AttentionWeights:
        copies = layer.num_key_value_heads // heads.num_key_value_heads
        return heads.map_key_value(lambda tensor_K: tensor_K.repeat_interleave(copies, dim=0))


METHOD = Expand()
