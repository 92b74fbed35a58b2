"""Queries for keys that another layer lends: as far as a head's own keys are a linear map of the lent ones, its query absorbs it.

Shapes: N tokens, H query heads, K lent KV heads, G = H/K, E hidden, F = E + 1 (a constant one last), B blocks, d numbers in
a block (see mixable_blocks).
"""

from dataclasses import dataclass, replace

import torch

from .attention_weights import AttentionWeights
from .mixable_blocks import from_blocks, to_blocks, with_bias, without_bias
from .rotation import Rotation


@dataclass(frozen=True, slots=True, kw_only=True)
class LentMoments:
    """Second moments of what own and lent keys are projected from, at the same tokens; float64, means over tokens.

    Args:
        lent_FF: of the lender's inputs. cross_FF: of the layer's own inputs with them.
    """

    lent_FF: torch.Tensor
    cross_FF: torch.Tensor

    @classmethod
    def of(cls, own_NE: torch.Tensor, lent_NE: torch.Tensor) -> "LentMoments":
        own_NF, lent_NF = (torch.nn.functional.pad(inputs, (0, 1), value=1.0).double() for inputs in (own_NE, lent_NE))
        return cls(lent_FF=lent_NF.T @ lent_NF / len(lent_NF), cross_FF=own_NF.T @ lent_NF / len(lent_NF))

    def centred(self) -> "LentMoments":
        lent_F, own_F = self.lent_FF[-1], self.cross_FF[:, -1]
        return LentMoments(
            lent_FF=self.lent_FF - torch.outer(lent_F, lent_F), cross_FF=self.cross_FF - torch.outer(own_F, lent_F)
        )


class LentKeys:
    """Least-squares maps from each lent key to each query head's own.

    A constant in every key moves no softmax, unless it is rotated.

    Args:
        own: of the layer, with its own keys. lender: of the layer that lends, with as many query heads.
        rotation: of both; None for none.
        ridge: as a fraction of a lent key's mean power; keeps maps finite.
    """

    def __init__(
        self,
        own: AttentionWeights,
        lender: AttentionWeights,
        moments: LentMoments,
        rotation: Rotation | None,
        ridge: float = 1e-6,
    ):
        self.own, self.rotation = own, rotation
        self.members = own.num_attention_heads // lender.num_key_value_heads
        copies = own.num_attention_heads // own.num_key_value_heads
        own_HDF = with_bias(own.key_KDE, own.key_bias_KD).repeat_interleave(copies, dim=0)
        parts = zip(
            to_blocks(own_HDF, rotation),
            to_blocks(with_bias(lender.key_KDE, lender.key_bias_KD), rotation),
            strict=True,
        )
        self.maps = [_maps(own_HBdF, lent_KBdF, moments, ridge) for own_HBdF, lent_KBdF in parts]

    def queries_for(self, heads: AttentionWeights, order: list[int]) -> AttentionWeights:
        """`heads`, of which group `order[place]` stands at each place, with queries for the key that is lent there."""
        places = torch.arange(len(order)).repeat_interleave(self.members)
        whose = torch.tensor(order).repeat_interleave(self.members) * self.members
        whose += torch.arange(self.members).repeat(len(order))
        query_parts = to_blocks(with_bias(self.own.query_HDE, self.own.query_bias_HD)[whose], self.rotation)
        reading = [
            map_HKBdd[whose, places].mH @ query_HBdF
            for map_HKBdd, query_HBdF in zip(self.maps, query_parts, strict=True)
        ]
        joined_HDF = from_blocks(reading, self.rotation)
        query_HDE, query_bias_HD = without_bias(joined_HDF, heads.query_HDE, heads.query_bias_HD)
        return replace(heads, query_HDE=query_HDE, query_bias_HD=query_bias_HD)


def _maps(own_HBdF: torch.Tensor, lent_KBdF: torch.Tensor, moments: LentMoments, ridge: float) -> torch.Tensor:
    """`[H, K, B, d, d]`."""
    moments = moments if own_HBdF.is_complex() else moments.centred()
    lent_FF, cross_FF = moments.lent_FF.to(own_HBdF), moments.cross_FF.to(own_HBdF)
    cross = torch.einsum("hbif,fe,kbje->hkbij", own_HBdF, cross_FF, lent_KBdF.conj())
    power = torch.einsum("kbif,fe,kbje->kbij", lent_KBdF, lent_FF, lent_KBdF.conj())
    size = power.shape[-1]
    pull = ridge * power.diagonal(dim1=-2, dim2=-1).real.mean((-2, -1)) + torch.finfo(torch.float64).tiny
    power = power + pull[:, None, None, None] * torch.eye(size).to(power)
    return torch.linalg.solve(power.mH, cross.mH).mH  # cross @ inverse(power)
