"""Fit query projections to attention scores, by ridge least squares that conjugate gradients solve.

What a score error costs is what it does to the softmax: errors count by the attention that the donor pays there, about
their mean (the Fisher metric of the softmax, half of the KL divergence for small errors). Large errors draw attention to
tokens that the donor pays none, which that metric does not see; there, a part counts all tokens alike.

Shapes: B rows, L and S tokens, H query heads, K KV heads, G = H/K, D head_dim, P rotary pairs, E hidden, F = E + 1 (a
constant one last).
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from .attention_weights import AttentionWeights
from .mixable_blocks import with_bias, without_bias
from .rotation import Rotation


@dataclass(frozen=True, slots=True, kw_only=True)
class AttentionRows:
    """What donor and student read in one layer, of the same rows.

    Args:
        donor_BLE, student_BLE: inputs of the attention.
        lender_BLE: what the student's keys are projected from, where that is not `student_BLE`.
        mask_BHLS: added to scores, minus infinity for tokens that are not seen; broadcasts.
        scaling: of the scores.
        rotation: of queries and keys; None for none.
        turn_BLP: what multiplies each complex pair; None for no rotation.
    """

    donor_BLE: torch.Tensor
    student_BLE: torch.Tensor
    mask_BHLS: torch.Tensor
    scaling: float
    rotation: Rotation | None = None
    turn_BLP: torch.Tensor | None = None
    lender_BLE: torch.Tensor | None = None


def fitted_queries(
    heads: AttentionWeights,
    donor: AttentionWeights,
    rows: Sequence[AttentionRows],
    iterations: int,
    ridge: float,
    alike_fraction: float = 0.0,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """`query_HDE` and `query_bias_HD` with which `heads` score as `donor` does, whose query heads are in their order.

    Args:
        iterations: of conjugate gradients, preconditioned by the inputs' covariance.
        ridge: pull towards the queries as they are, as a fraction of what a mean direction of the inputs weighs.
        alike_fraction: of the weights on errors, what is the same for all tokens that are seen.
    """
    width = heads.query_HDE.shape[2] + (heads.query_bias_HD is not None)
    query_HDF = with_bias(heads.query_HDE, heads.query_bias_HD).float()
    batches = [_Batch(heads, donor, part, width, alike_fraction) for part in rows]
    tokens = sum(batch.inputs_BLF[..., 0].numel() for batch in batches)
    moment_FF = sum(torch.einsum("blf,ble->fe", batch.inputs_BLF, batch.inputs_BLF) for batch in batches) / tokens
    mean_power = moment_FF.diagonal().mean()
    inverse_FF = torch.linalg.inv(moment_FF + ridge * mean_power * torch.eye(width, device=moment_FF.device))
    wrong_HDF = sum(
        batch.back(batch.weighted(batch.target - batch.scores(query_HDF[..., :width]))) for batch in batches
    )

    def curvature(change_HDF: torch.Tensor) -> torch.Tensor:
        return sum(batch.back(batch.weighted(batch.scores(change_HDF))) for batch in batches)

    trial_HDF = wrong_HDF @ inverse_FF
    stiffness = (trial_HDF * curvature(trial_HDF)).sum() / (trial_HDF * (trial_HDF @ moment_FF)).sum().clamp_min(1e-30)
    pull = ridge * stiffness * mean_power
    change_HDF = _conjugate_gradients(
        lambda x: curvature(x) + pull * x, wrong_HDF, lambda r: r @ inverse_FF, iterations
    )
    query_HDF[..., :width] += change_HDF
    return without_bias(query_HDF, heads.query_HDE, heads.query_bias_HD)


class _Batch:
    """Scores of one batch as a linear map of query projections `[H, D, F]`, and its adjoint."""

    def __init__(
        self, heads: AttentionWeights, donor: AttentionWeights, rows: AttentionRows, width: int, alike_fraction: float
    ):
        self.rows, self.copies = rows, heads.num_attention_heads // heads.num_key_value_heads
        theirs, ours = _with_one(rows.donor_BLE), _with_one(rows.student_BLE)
        query = self._rotated(_projected(donor.query_HDE, donor.query_bias_HD, theirs))
        key = self._rotated(_projected(donor.key_KDE, donor.key_bias_KD, theirs))
        copies = donor.num_attention_heads // donor.num_key_value_heads
        self.target = query @ key.repeat_interleave(copies, dim=1).mT * rows.scaling
        self.attention = (self.target + rows.mask_BHLS).softmax(-1)
        if alike_fraction:
            alike = (torch.zeros_like(self.target) + rows.mask_BHLS).softmax(-1)
            self.attention = torch.lerp(self.attention, alike, alike_fraction)
        keyed = ours if rows.lender_BLE is None else _with_one(rows.lender_BLE)
        key = self._rotated(_projected(heads.key_KDE, heads.key_bias_KD, keyed))
        self.key = key.repeat_interleave(self.copies, dim=1) * rows.scaling
        self.inputs_BLF = ours[..., :width]

    def scores(self, query_HDF: torch.Tensor) -> torch.Tensor:
        return self._rotated(torch.einsum("blf,hdf->bhld", self.inputs_BLF, query_HDF)) @ self.key.mT

    def weighted(self, scores_BHLS: torch.Tensor) -> torch.Tensor:
        mean = (self.attention * scores_BHLS).sum(-1, keepdim=True)
        return self.attention * (scores_BHLS - mean)

    def back(self, scores_BHLS: torch.Tensor) -> torch.Tensor:
        """The adjoint of `scores`."""
        return torch.einsum("bhld,blf->hdf", self._rotated(scores_BHLS @ self.key, back=True), self.inputs_BLF)

    def _rotated(self, heads_BHLD: torch.Tensor, back: bool = False) -> torch.Tensor:
        if self.rows.rotation is None:
            return heads_BHLD
        turn_B1LP = self.rows.turn_BLP.unsqueeze(1)
        pairs_BHLP, still = self.rows.rotation.split(heads_BHLD, -1)
        return self.rows.rotation.join(pairs_BHLP * (turn_B1LP.conj() if back else turn_B1LP), still, -1)


def _with_one(inputs_BLE: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.pad(inputs_BLE, (0, 1), value=1.0)


def _projected(weight_NDE: torch.Tensor, bias_ND: torch.Tensor | None, inputs_BLF: torch.Tensor) -> torch.Tensor:
    return torch.einsum("blf,ndf->bnld", inputs_BLF, with_bias(weight_NDE, bias_ND).to(inputs_BLF))


def _conjugate_gradients(matrix, wanted: torch.Tensor, precondition, iterations: int) -> torch.Tensor:
    found, residual = torch.zeros_like(wanted), wanted.clone()
    direction = towards = precondition(residual)
    length = first_length = (residual * towards).sum()
    for _ in range(iterations):
        if length <= 1e-10 * first_length or length <= 0:
            break
        image = matrix(direction)
        step = length / (direction * image).sum()
        found += step * direction
        residual -= step * image
        towards = precondition(residual)
        length, before = (residual * towards).sum(), length
        direction = towards + length / before * direction
    return found
