"""Donors whose heads in a group are alike, and rows of tokens to look at them with."""

import torch

from hf_gqa.convert.donor import donor_from_model
from hf_gqa.convert.surgery import layer_heads
from hf_gqa.weights.attention_weights import AttentionWeights
from hf_gqa.weights.head_tensors import write_heads
from hf_gqa.weights.mixable_blocks import from_blocks, to_blocks
from hf_gqa.weights.rotation import rotation_of

from .tiny_donors import VOCAB_SIZE, tiny_donor


def rows(seed: int = 1) -> torch.Tensor:
    return torch.randint(3, VOCAB_SIZE, (16, 24), generator=torch.Generator().manual_seed(seed))


def put(model, layer_idx: int, heads: AttentionWeights) -> None:
    layout = donor_from_model(model).layout
    attention = model.base_model.get_submodule(layout.attention.format(layer_idx=layer_idx))
    for name, tensor in write_heads(layout, heads).items():
        attention.get_parameter(name).data.copy_(tensor)


def alike_donor(model_type: str, groups: int, seed: int = 0, order: tuple[int, ...] = (0, 1, 2, 3)):
    """A donor whose heads in a group differ by maps that a fold can undo: `order` says which heads are neighbours."""
    donor = tiny_donor(model_type, seed=seed)
    opened = donor_from_model(donor)
    generator = torch.Generator().manual_seed(seed)
    for layer_idx, heads in layer_heads(opened):
        keys, values = heads.key_KDE.clone(), heads.value_KDE.clone()
        size, rotation = len(keys) // groups, rotation_of(opened.layout, opened.config, opened.head_dim, layer_idx)
        for place, head in enumerate(order):
            first = order[place - place % size]
            width = keys.shape[1]
            mix = torch.randn(width, width, generator=generator) / width**0.5 + torch.eye(width)
            values[head] = mix @ values[first]
            parts = to_blocks(keys[first].unsqueeze(0), rotation)
            for number, part in enumerate(parts):
                scaling = torch.randn(*part.shape[1:3], 1, dtype=part.dtype, generator=generator)
                if not part.is_complex():
                    parts[number] = mix[: part.shape[2], : part.shape[2]].T @ part
                elif head != first:
                    parts[number] = part * scaling
            keys[head] = from_blocks(parts, rotation)[0]
        zero = {name: torch.zeros_like(getattr(heads, name)) for name in ("key_bias_KD", "value_bias_KD")
                if getattr(heads, name) is not None}  # fmt: skip
        put(donor, layer_idx, AttentionWeights(**{f: getattr(heads, f) for f in heads.__dataclass_fields__}
            | {"key_KDE": keys, "value_KDE": values} | zero))  # fmt: skip
    return donor
