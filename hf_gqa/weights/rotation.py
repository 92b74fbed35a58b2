"""Which dimensions of a head a rotary embedding turns, and how they pair up.

Shapes: B rows, L tokens, P rotary pairs, D head_dim.
"""

from dataclasses import dataclass

import torch
from transformers import PretrainedConfig

from ..runtime.attention_layout import AttentionLayout


PAIRINGS = ("halves", "interleaved")


@dataclass(frozen=True, slots=True, kw_only=True)
class Rotation:
    """The first `dims` dimensions of every query and key turn in pairs; those behind them never do.

    Args:
        pairs: "halves" (i with i + dims/2) or "interleaved" (2i with 2i + 1).
    """

    pairs: str
    dims: int

    def __post_init__(self):
        if self.pairs not in PAIRINGS or self.dims < 2 or self.dims % 2:
            raise TypeError(f"rotation: {self.dims} dimensions in {self.pairs!r}. Use an even number in {PAIRINGS}.")

    def split(self, heads: torch.Tensor, dim: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Rotary pairs as complex numbers along `dim`, and the dimensions behind them."""
        turning, still = heads.split((self.dims, heads.shape[dim] - self.dims), dim)
        if self.pairs == "halves":
            real, imag = turning.chunk(2, dim)
        else:
            real, imag = turning.unflatten(dim, (-1, 2)).unbind(dim % heads.dim() + 1)
        return torch.complex(real, imag), still

    def join(self, pairs: torch.Tensor, still: torch.Tensor, dim: int) -> torch.Tensor:
        """The inverse of `split`."""
        if self.pairs == "halves":
            turning = torch.cat([pairs.real, pairs.imag], dim)
        else:
            dim = dim % pairs.dim()
            turning = torch.stack([pairs.real, pairs.imag], dim + 1).flatten(dim, dim + 1)
        return torch.cat([turning, still], dim)


def rotation_of(layout: AttentionLayout, config: PretrainedConfig, head_dim: int, layer_idx: int) -> Rotation | None:
    """Of one layer's queries and keys; None where nothing rotates.

    Args:
        config: gives `rotary_dim` (GPT-J), else `partial_rotary_factor` in its `rope_parameters` (also one set for each
            of its `layer_types`) or by itself; all of `head_dim` rotates where it says nothing.
    """
    layer_types, used = getattr(config, "layer_types", None), getattr(config, "no_rope_layers", None)
    kind = layer_types[layer_idx] if layer_types else None
    if getattr(config, "alibi", False):  # a Falcon has linear biases instead
        return None
    if layout.rotary is None or kind in layout.unrotated_layer_types or (used and not used[layer_idx]):
        return None
    parameters = getattr(config, "rope_parameters", None) or {}
    if kind in parameters:
        parameters = parameters[kind]
    factor = parameters.get("partial_rotary_factor", getattr(config, "partial_rotary_factor", None))
    if parameters.get("rope_type") == "proportional" or factor is None:  # the former turns the others by no angle
        factor = 1.0
    dims = getattr(config, "rotary_dim", None) or int(head_dim * factor)
    return Rotation(pairs=layout.rotary, dims=min(dims, head_dim) // 2 * 2) if dims > 1 else None


def turns(cos: torch.Tensor, sin: torch.Tensor, pairs: int) -> torch.Tensor:
    """What multiplies each complex pair at each token, `[B, L, P]`, from the cosines and sines that a model computes.

    Args:
        cos, sin: `[B, L, P]`, or `[B, L, 2P]` with every angle twice, side by side or a half apart.
    """
    if cos.shape[-1] == 2 * pairs:
        beside = torch.equal(cos[..., ::2], cos[..., 1::2]) and torch.equal(sin[..., ::2], sin[..., 1::2])
        apart = torch.equal(cos[..., :pairs], cos[..., pairs:]) and torch.equal(sin[..., :pairs], sin[..., pairs:])
        assert beside or apart, "a pair turns by two angles"
        cos, sin = (part[..., :pairs] if apart else part[..., ::2] for part in (cos, sin))
    assert cos.shape[-1] == pairs, (cos.shape, pairs)
    return torch.complex(cos.float(), sin.float())
