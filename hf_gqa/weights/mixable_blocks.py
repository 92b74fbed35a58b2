"""Which dimensions of a head one linear map may mix so that what reads the head can undo it.

Without a rotary embedding: any with any. A map of rotated queries and keys must commute with the rotation, and what does
is one complex number per rotary pair, and any map of the dimensions that do not rotate. Blocks say all of this at once: a
part of a head is B blocks of d numbers, and a map is a `[d, d]` matrix per block; B = 1 without rotation, d = 1 and complex
numbers with it.

Shapes: N heads, D head_dim, E hidden, F = E + 1, B blocks, d numbers in a block.
"""

import torch

from .rotation import Rotation


def to_blocks(heads_NDF: torch.Tensor, rotation: Rotation | None) -> list[torch.Tensor]:
    """`[N, B, d, F]` for each part of what lies as `[N, D, F]`: the rotary pairs, then what does not rotate."""
    if rotation is None:
        return [heads_NDF.unsqueeze(1)]
    pairs_NBF, still_NdF = rotation.split(heads_NDF, 1)
    return [pairs_NBF.unsqueeze(2), still_NdF.unsqueeze(1)][: 2 if still_NdF.shape[1] else 1]


def from_blocks(parts_NBdF: list[torch.Tensor], rotation: Rotation | None) -> torch.Tensor:
    """The inverse of `to_blocks`."""
    if rotation is None:
        return parts_NBdF[0].squeeze(1)
    pairs_NBF, still = parts_NBdF[0].squeeze(2), parts_NBdF[1:]
    still_NdF = still[0].squeeze(1) if still else pairs_NBF.real[:, :0]
    return rotation.join(pairs_NBF, still_NdF, 1)


def with_bias(weight_NDE: torch.Tensor, bias_ND: torch.Tensor | None) -> torch.Tensor:
    """Weight and bias as one map of the inputs with a one behind them, `[N, D, F]`, float64."""
    bias_ND = weight_NDE.new_zeros(weight_NDE.shape[:2]) if bias_ND is None else bias_ND
    return torch.cat([weight_NDE, bias_ND.unsqueeze(2)], dim=2).double()


def without_bias(
    heads_NDF: torch.Tensor, like_NDE: torch.Tensor, bias_like_ND: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The inverse of `with_bias`, rounded once to the dtype of what it was made from."""
    bias_ND = None if bias_like_ND is None else heads_NDF[:, :, -1].to(bias_like_ND).contiguous()
    return heads_NDF[:, :, :-1].to(like_NDE).contiguous(), bias_ND
