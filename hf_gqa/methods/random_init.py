"""Fresh KV heads, drawn as the donor's own initialisation would; the baseline that keeps nothing."""

from dataclasses import dataclass, replace

import torch

from ..weights.attention_weights import AttentionWeights
from . import MethodContext


@dataclass(frozen=True, slots=True, kw_only=True)
class RandomInit:
    """Source: GQA (Ainslie et al. 2023, arXiv 2305.13245), figure 4, "Random".

    Normal with standard deviation `initializer_range`, zero biases, norms of one. A layer's draw depends on the seed and the layer
    alone, so that the order of conversion, the device and the shards do not matter.
    """

    kind: str = "reduce"

    def __call__(self, heads: AttentionWeights, layer: MethodContext) -> AttentionWeights:
        generator = torch.Generator().manual_seed((layer.seed * 1_000_003 + layer.layer_idx) % 2**63)

        def draw(like_KDE: torch.Tensor) -> torch.Tensor:
            shape = (layer.num_key_value_heads, *like_KDE.shape[1:])
            return (torch.randn(shape, generator=generator) * layer.initializer_range).to(like_KDE)

        def full(like_KD: torch.Tensor | None, value: float) -> torch.Tensor | None:
            shape = (layer.num_key_value_heads, heads.key_KDE.shape[1])
            return None if like_KD is None else like_KD.new_full(shape, value)

        return replace(
            heads,
            key_KDE=draw(heads.key_KDE),
            value_KDE=draw(heads.value_KDE),
            key_bias_KD=full(heads.key_bias_KD, 0.0),
            value_bias_KD=full(heads.value_bias_KD, 0.0),
            key_norm_KD=full(heads.key_norm_KD, 1.0),
        )


METHOD = RandomInit()
