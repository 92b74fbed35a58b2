"""The heads of one layer at random."""

from dataclasses import fields

import torch

from hf_gqa.weights.attention_weights import AttentionWeights


def random_heads(H=4, K=4, D=6, E=10, bias=True, dtype=torch.float32, seed=0) -> AttentionWeights:
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)

    biases = {"query_bias_HD": (H, D), "key_bias_KD": (K, D), "value_bias_KD": (K, D), "output_bias_E": (E,)}
    return AttentionWeights(
        query_HDE=draw(H, D, E),
        key_KDE=draw(K, D, E),
        value_KDE=draw(K, D, E),
        output_EHD=draw(E, H, D),
        **({name: draw(*shape) for name, shape in biases.items()} if bias else {}),
    )


def tensors_of(heads: AttentionWeights) -> dict[str, torch.Tensor | None]:
    return {field.name: getattr(heads, field.name) for field in fields(heads)}
