"""Fresh KV heads, drawn as the donor's own initialisation would; the baseline that keeps nothing."""

from dataclasses import dataclass, replace

import torch

from ..weights.attention_weights import AttentionWeights
from . import MethodContext


@dataclass(frozen=True, slots=True, kw_only=True)
class RandomInit:
    """Source: GQA (Ainslie et al. 2023, arXiv 2305.13245), figure 4, "Random".

    Normal with standard deviation `initializer_range`, zero biases. A layer's draw depends on the seed and the layer
    alone, so that the order of conversion, the device and the shards do not matter.
    """

    kind: str = "reduce"

    def __call__(self, heads: AttentionWeights, layer: MethodContext) -> AttentionWeights:
        generator = torch.Generator().manual_seed((layer.seed * 1_000_003 + layer.layer_idx) % 2**63)

        def draw(like_KDE: torch.Tensor) -> torch.Tensor:
            shape = (layer.num_key_value_heads, *like_KDE.shape[1:])
            return (torch.randn(shape, generator=generator) * layer.initializer_range).to(like_KDE)

        def zeros(like_KD: torch.Tensor | None) -> torch.Tensor | None:
            return None if like_KD is None else like_KD.new_zeros(layer.num_key_value_heads, *like_KD.shape[1:])

        return replace(
            heads,
            key_KDE=draw(heads.key_KDE),
            value_KDE=draw(heads.value_KDE),
            key_bias_KD=zeros(heads.key_bias_KD),
            value_bias_KD=zeros(heads.value_bias_KD),
        )


METHOD = RandomInit()
