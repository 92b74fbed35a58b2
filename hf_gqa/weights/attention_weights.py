"""One layer's attention in canonical form.

Shapes: H query heads, K KV heads, D head_dim, E hidden.
"""

from dataclasses import dataclass, replace

import torch


@dataclass(frozen=True, slots=True, kw_only=True)
class AttentionWeights:
    """The tensors of one layer's attention; query head h reads KV head h // (H / K).

    Args:
        query_HDE, key_KDE, value_KDE: projections, one `[D, E]` matrix per head.
        output_EHD: the output projection.
        query_bias_HD, key_bias_KD, value_bias_KD, output_bias_E: biases, or None where the family has none.
        query_norm_HD, key_norm_KD: weights of the norms on queries and keys where each head has its own, or None; one
            weight for all heads is no matter of heads.
    """

    query_HDE: torch.Tensor
    key_KDE: torch.Tensor
    value_KDE: torch.Tensor
    output_EHD: torch.Tensor
    query_bias_HD: torch.Tensor | None = None
    key_bias_KD: torch.Tensor | None = None
    value_bias_KD: torch.Tensor | None = None
    output_bias_E: torch.Tensor | None = None
    query_norm_HD: torch.Tensor | None = None
    key_norm_KD: torch.Tensor | None = None

    @property
    def num_attention_heads(self) -> int:
        return self.query_HDE.shape[0]

    @property
    def num_key_value_heads(self) -> int:
        return self.key_KDE.shape[0]

    def map_key_value(self, change) -> "AttentionWeights":
        """Apply `change` to keys, values, their biases and norms alike; KV heads are the first axis of each."""
        names = ("key_KDE", "value_KDE", "key_bias_KD", "value_bias_KD", "key_norm_KD")
        present = {name: getattr(self, name) for name in names if getattr(self, name) is not None}
        return replace(self, **{name: change(tensor) for name, tensor in present.items()})

    def reordered(self, order: list[int]) -> "AttentionWeights":
        """KV heads in a new order, each with the query heads and output blocks that belong to it; it computes the same."""
        members = self.num_attention_heads // self.num_key_value_heads
        queries = [head * members + member for head in order for member in range(members)]
        own = {name: getattr(self, name) for name in ("query_HDE", "query_bias_HD", "query_norm_HD")}
        return replace(
            self.map_key_value(lambda tensor_K: tensor_K[order]),
            **{name: tensor_H[queries] for name, tensor_H in own.items() if tensor_H is not None},
            output_EHD=self.output_EHD[:, queries],
        )
