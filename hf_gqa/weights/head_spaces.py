"""Keys and values of a layer with what reads them: how much an error in each direction of a head costs.

A query absorbs any map of its key, an output block any map of its value. So heads may be described in another basis, or
by fewer numbers, as long as `write` brings them back to what the readers expect.

Shapes: K KV heads, H query heads, G = H/K, D head_dim, E hidden, F = E + 1, B blocks, d numbers in a block (see
mixable_blocks).
"""

from dataclasses import dataclass, replace

import torch

from .attention_weights import AttentionWeights
from .head_statistics import HeadStatistics
from .mixable_blocks import from_blocks, to_blocks, with_bias, without_bias
from .rotation import Rotation


@dataclass(frozen=True, slots=True, kw_only=True)
class HeadSpace:
    """The keys of one layer, a part of them that mixes (see mixable_blocks), or the values; float64 or complex128.

    Args:
        heads_KBdF: the projections with their biases.
        moment_BKdKd: second moment of all heads together.
        root_KBdd: Hermitian; `|root @ error|^2` is what an error costs the readers.
    """

    heads_KBdF: torch.Tensor
    moment_BKdKd: torch.Tensor
    root_KBdd: torch.Tensor

    def of(self, members: slice) -> "HeadSpace":
        """Of some of the heads."""
        return HeadSpace(
            heads_KBdF=self.heads_KBdF[members],
            moment_BKdKd=self.moment_BKdKd[:, members, :, members],
            root_KBdd=self.root_KBdd[members],
        )

    @property
    def weighted_BKdKd(self) -> torch.Tensor:
        """Second moment of `root @ head`: its trace is all there is to keep."""
        return torch.einsum("hbij,bhjgk,gblk->bhigl", self.root_KBdd, self.moment_BKdKd, self.root_KBdd.conj())


def key_spaces(heads: AttentionWeights, statistics: HeadStatistics, rotation: Rotation | None) -> list[HeadSpace]:
    """Of each part of the keys; errors cost by the queries' second moment.

    A constant in every key moves no softmax, unless it is rotated.
    """
    query_parts = to_blocks(with_bias(heads.query_HDE, heads.query_bias_HD), rotation)
    key_parts = to_blocks(with_bias(heads.key_KDE, heads.key_bias_KD), rotation)
    spaces = []
    for query_HBdF, key_KBdF in zip(query_parts, key_parts, strict=True):
        power_HBdd = _moment_of_each(query_HBdF, statistics.moment_FF)
        spaces.append(
            HeadSpace(
                heads_KBdF=key_KBdF,
                moment_BKdKd=_moment(
                    key_KBdF, statistics.moment_FF if key_KBdF.is_complex() else statistics.covariance_FF
                ),
                root_KBdd=_hermitian_power(power_HBdd.unflatten(0, (heads.num_key_value_heads, -1)).sum(1), 0.5),
            )
        )
    return spaces


def value_space(heads: AttentionWeights, statistics: HeadStatistics) -> HeadSpace:
    """Errors cost by the output projection. Attention weights sum to one: a constant may move to the output's bias."""
    moment_FF = statistics.moment_FF if heads.output_bias_E is None else statistics.covariance_FF
    (value_KBdF,) = to_blocks(with_bias(heads.value_KDE, heads.value_bias_KD), None)
    output_EKGD = heads.output_EHD.double().unflatten(1, (heads.num_key_value_heads, -1))
    power_KBdd = torch.einsum("ekgi,ekgj->kij", output_EKGD, output_EKGD).unsqueeze(1)
    return HeadSpace(
        heads_KBdF=value_KBdF, moment_BKdKd=_moment(value_KBdF, moment_FF), root_KBdd=_hermitian_power(power_KBdd, 0.5)
    )


def principal_maps(group: HeadSpace) -> tuple[torch.Tensor, torch.Tensor]:
    """Of one group: `read` and `write`, each `[K, B, d, d]`.

    `sum_h read_h @ head_h` is the shared head, `write_h @ shared` the least-squares stand-in for `head_h`. The shared
    head is as large as its members are on average, block by block, so that it trains as they did. Members that are
    the same to the bit are left as they are.
    """
    heads_KBdF, root_KBdd = group.heads_KBdF, group.root_KBdd
    size, blocks, width = root_KBdd.shape[:3]
    if (heads_KBdF == heads_KBdF[:1]).all():
        write_KBdd = torch.eye(width).to(root_KBdd).expand_as(root_KBdd)
        return torch.cat([write_KBdd[:1], torch.zeros_like(write_KBdd[1:])]), write_KBdd
    weighted = group.weighted_BKdKd.reshape(blocks, size * width, size * width)
    top_BKdd = torch.linalg.eigh(weighted).eigenvectors[:, :, -width:].unflatten(1, (size, width))
    top_KBdd = top_BKdd.transpose(0, 1)
    read_KBdd = top_KBdd.mH @ root_KBdd
    write_KBdd = _hermitian_power(root_KBdd, -1.0) @ top_KBdd
    shared_B = torch.einsum("hbij,bhjgk,gbik->b", read_KBdd, group.moment_BKdKd, read_KBdd.conj()).real
    average_B = torch.einsum("bhihi->b", group.moment_BKdKd).real / size
    scale_B11 = torch.where(shared_B > 0, (average_B / shared_B).sqrt(), 1.0)[:, None, None]
    return read_KBdd * scale_B11, write_KBdd / scale_B11


def aligning_maps(group: HeadSpace, sweeps: int = 30) -> torch.Tensor:
    """Of one group: unitary `[K, B, d, d]` after which the members agree best in the mean square.

    Source: generalised Procrustes analysis (Gower 1975); of one member against the mean of the others, in turn.
    """
    size, blocks, width = group.root_KBdd.shape[:3]
    read_KBdd = torch.eye(width).to(group.root_KBdd).repeat(size, blocks, 1, 1)
    for sweep in range(sweeps):
        for member in range(1, size):
            others = [other for other in range(size if sweep else member) if other != member]
            agreement_Bdd = torch.einsum("kbij,bkjl->bil", read_KBdd[others], group.moment_BKdKd[:, others, :, member])
            left, _, right = torch.linalg.svd(agreement_Bdd)
            read_KBdd[member] = left @ right
    return read_KBdd


def with_shared_keys(
    heads: AttentionWeights, maps: list[tuple[torch.Tensor, torch.Tensor]], groups: int, rotation: Rotation | None
) -> AttentionWeights:
    """Each group's keys become `sum_h read_h @ key_h`, and queries read `write_h @` that.

    Args:
        maps: `read_KBdd` and `write_KBdd` of each part of the keys.
    """
    members = heads.num_attention_heads // heads.num_key_value_heads
    key_parts = to_blocks(with_bias(heads.key_KDE, heads.key_bias_KD), rotation)
    query_parts = to_blocks(with_bias(heads.query_HDE, heads.query_bias_HD), rotation)
    shared = [
        (read_KBdd @ key_KBdF).unflatten(0, (groups, -1)).sum(1)
        for (read_KBdd, _), key_KBdF in zip(maps, key_parts, strict=True)
    ]
    reading = [
        write_KBdd.mH.repeat_interleave(members, dim=0) @ query_HBdF
        for (_, write_KBdd), query_HBdF in zip(maps, query_parts, strict=True)
    ]
    key_KDE, key_bias_KD = without_bias(from_blocks(shared, rotation), heads.key_KDE, heads.key_bias_KD)
    query_HDE, query_bias_HD = without_bias(from_blocks(reading, rotation), heads.query_HDE, heads.query_bias_HD)
    return replace(heads, query_HDE=query_HDE, query_bias_HD=query_bias_HD, key_KDE=key_KDE, key_bias_KD=key_bias_KD)


def with_shared_values(
    heads: AttentionWeights, read_KBdd: torch.Tensor, write_KBdd: torch.Tensor, groups: int, mean_F: torch.Tensor
) -> AttentionWeights:
    """Each group's values become `sum_h read_h @ value_h`, and the output projection reads `write_h @` that.

    Args:
        mean_F: of the inputs; what the shared values get wrong there goes to the output's bias, where there is one.
    """
    value_KDF = with_bias(heads.value_KDE, heads.value_bias_KD)
    mean_F = mean_F.to(value_KDF)
    shared_NDF = (read_KBdd.squeeze(1) @ value_KDF).unflatten(0, (groups, -1)).sum(1)
    each = heads.num_key_value_heads // groups
    members = heads.num_attention_heads // heads.num_key_value_heads
    write_HDD = write_KBdd.squeeze(1).repeat_interleave(members, dim=0)
    output_EHD = heads.output_EHD.double()
    new_output_EHD = torch.einsum("ehi,hij->ehj", output_EHD, write_HDD)
    bias_E = heads.output_bias_E
    if bias_E is not None:
        before_HD, after_HD = (
            (values @ mean_F).repeat_interleave(times, dim=0)
            for values, times in ((value_KDF, members), (shared_NDF, members * each))
        )
        lost_E = torch.einsum("ehd,hd->e", output_EHD, before_HD) - torch.einsum("ehd,hd->e", new_output_EHD, after_HD)
        bias_E = (bias_E.double() + lost_E).to(bias_E)
    value_KDE, value_bias_KD = without_bias(shared_NDF, heads.value_KDE, heads.value_bias_KD)
    return replace(
        heads,
        value_KDE=value_KDE,
        value_bias_KD=value_bias_KD,
        output_EHD=new_output_EHD.to(heads.output_EHD),
        output_bias_E=bias_E,
    )


def _moment(heads_KBdF: torch.Tensor, moment_FF: torch.Tensor) -> torch.Tensor:
    return torch.einsum("hbif,fe,gbje->bhigj", *_of_one_type(heads_KBdF, moment_FF, heads_KBdF.conj()))


def _moment_of_each(heads_HBdF: torch.Tensor, moment_FF: torch.Tensor) -> torch.Tensor:
    return torch.einsum("hbif,fe,hbje->hbij", *_of_one_type(heads_HBdF, moment_FF, heads_HBdF.conj()))


def _of_one_type(*tensors: torch.Tensor) -> list[torch.Tensor]:
    return [tensor.to(tensors[0]) for tensor in tensors]


def _hermitian_power(matrix: torch.Tensor, power: float) -> torch.Tensor:
    """Of positive semidefinite matrices; directions without weight stay without."""
    values, vectors = torch.linalg.eigh(matrix)
    kept = values > 1e-12 * values[..., -1:].clamp_min(torch.finfo(values.dtype).tiny)
    powered = torch.where(kept, values.clamp_min(torch.finfo(values.dtype).tiny) ** power, 0.0)
    return (vectors * powered.unsqueeze(-2).to(vectors.dtype)) @ vectors.mH
