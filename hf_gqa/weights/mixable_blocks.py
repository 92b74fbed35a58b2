"""Which dimensions of a head one linear map may mix so that what reads the head can undo it.

Without a rotary embedding: any with any. A map of rotated queries and keys must commute with the rotation, and what does
is one complex number per rotary pair. Blocks say both at once: a head is B blocks of d numbers, and a map is a `[d, d]`
matrix per block; B = 1, d = D without rotation, B = D/2, d = 1 and complex numbers with it.

Shapes: N heads, D head_dim, E hidden, F = E + 1, B blocks, d numbers in a block.
"""

import torch


def to_blocks(heads_NDF: torch.Tensor, rotary: str | None) -> torch.Tensor:
    """`[N, B, d, F]` of what lies as `[N, D, F]`.

    Args:
        rotary: how rotary pairs lie in head_dim, as `AttentionLayout` says it; None for no rotation.
    """
    if rotary is None:
        return heads_NDF.unsqueeze(1)
    assert rotary == "halves", rotary
    return torch.complex(*heads_NDF.chunk(2, dim=1)).unsqueeze(2)


def from_blocks(heads_NBdF: torch.Tensor, rotary: str | None) -> torch.Tensor:
    """The inverse of `to_blocks`."""
    if rotary is None:
        return heads_NBdF.squeeze(1)
    pairs_NBF = heads_NBdF.squeeze(2)
    return torch.cat([pairs_NBF.real, pairs_NBF.imag], dim=1)


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
