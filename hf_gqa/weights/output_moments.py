"""What an output projection reads and what it should say, summed over text of any length.

Shapes: N tokens, H query heads, D head_dim, E hidden, M = H D + 1 (the heads' outputs and a constant one).
"""

from dataclasses import dataclass, replace

import torch

from .attention_weights import AttentionWeights


@dataclass(frozen=True, slots=True, kw_only=True)
class OutputMoments:
    """Second moments for a least-squares fit of one layer's output projection; float64, means over tokens.

    Args:
        mixed_MM: of what the student's heads put out, with a one behind it.
        target_EM: of what the layer should add to the residual stream, with the same.
        tokens: how many were seen.
    """

    mixed_MM: torch.Tensor
    target_EM: torch.Tensor
    tokens: int


class OutputMomentSum:
    """The sums that `OutputMoments` are the means of, one batch at a time."""

    def __init__(self, mixed_size: int, hidden_size: int):
        self.mixed_MM = torch.zeros(mixed_size + 1, mixed_size + 1, dtype=torch.float64)
        self.target_EM = torch.zeros(hidden_size, mixed_size + 1, dtype=torch.float64)
        self.tokens = 0

    def add(self, mixed_NHD: torch.Tensor, target_NE: torch.Tensor) -> None:
        mixed_NM = torch.cat([mixed_NHD, torch.ones_like(mixed_NHD[:, :1])], dim=1)
        self.mixed_MM += (mixed_NM.T @ mixed_NM).to(self.mixed_MM)
        self.target_EM += (target_NE.T @ mixed_NM).to(self.target_EM)
        self.tokens += len(mixed_NM)

    def moments(self) -> OutputMoments:
        return OutputMoments(
            mixed_MM=self.mixed_MM / self.tokens, target_EM=self.target_EM / self.tokens, tokens=self.tokens
        )


def fitted_output(heads: AttentionWeights, moments: OutputMoments, ridge: float) -> AttentionWeights:
    """`heads` with the output projection, and its bias where there is one, that says best what it should.

    Args:
        ridge: pull towards the projection as it was, as a fraction of the heads' mean power.
    """
    size = heads.output_EHD[0].numel()
    known_EM = heads.output_EHD.flatten(1).to(moments.mixed_MM)
    if heads.output_bias_E is not None:
        known_EM = torch.cat([known_EM, heads.output_bias_E.to(known_EM).unsqueeze(1)], dim=1)
        size += 1
    mixed_MM, target_EM = moments.mixed_MM[:size, :size], moments.target_EM[:, :size]
    # solved for the change, so that what no text says anything about stays as it is
    fitted_EM = known_EM + _solved(mixed_MM, target_EM - known_EM @ mixed_MM, ridge)
    output_EHD = fitted_EM[:, : heads.output_EHD[0].numel()].unflatten(1, heads.output_EHD.shape[1:])
    bias_E = None if heads.output_bias_E is None else fitted_EM[:, -1].to(heads.output_bias_E)
    return replace(heads, output_EHD=output_EHD.to(heads.output_EHD).contiguous(), output_bias_E=bias_E)


def explained_power(moments: OutputMoments, ridge: float) -> float:
    """How much of the target's mean power the best linear map of the heads' outputs says, a constant included."""
    fitted_EM = _solved(moments.mixed_MM, moments.target_EM, ridge)
    return float((2 * fitted_EM * moments.target_EM - fitted_EM * (fitted_EM @ moments.mixed_MM)).sum())


def _solved(mixed_MM: torch.Tensor, target_EM: torch.Tensor, ridge: float) -> torch.Tensor:
    """`fitted_EM` with `fitted_EM @ mixed_MM` near `target_EM`, and small."""
    pull = ridge * mixed_MM.diagonal().mean() + torch.finfo(torch.float64).tiny
    return torch.linalg.solve(mixed_MM + pull * torch.eye(len(mixed_MM), dtype=mixed_MM.dtype), target_EM.T).T
