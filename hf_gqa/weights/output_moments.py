"""What an output projection reads and what it should say, summed over text of any length.

Shapes: N tokens, H query heads, D head_dim, E hidden, M = H D + 1 (the heads' outputs and a constant one).
"""

from dataclasses import dataclass

import torch


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
