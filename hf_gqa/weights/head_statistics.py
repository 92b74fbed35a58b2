"""Second moments of what one layer's attention reads, gathered over text of any length in the memory of one matrix.

Shapes: N tokens, E hidden, F = E + 1 (the hidden states and a constant one, which stands for biases).
"""

from dataclasses import dataclass

import torch


@dataclass(frozen=True, slots=True, kw_only=True)
class HeadStatistics:
    """What a method may know of the text: queries, keys and values are linear in it, so their moments follow.

    Args:
        moment_FF: mean outer product of the inputs with a one behind them, float64.
        tokens: how many were seen; 0 where nobody looked and all directions count alike.
    """

    moment_FF: torch.Tensor
    tokens: int

    @property
    def covariance_FF(self) -> torch.Tensor:
        """The moment about the mean; constants have none."""
        mean_F = self.moment_FF[:, -1]
        return self.moment_FF - torch.outer(mean_F, mean_F)

    @classmethod
    def unseen(cls, hidden_size: int) -> "HeadStatistics":
        """Inputs without correlations: what is left to assume where there is no text."""
        return cls(moment_FF=torch.eye(hidden_size + 1, dtype=torch.float64), tokens=0)


class MomentSum:
    """The sum that `HeadStatistics` is the mean of, one batch of inputs at a time."""

    def __init__(self, hidden_size: int):
        self.sum_FF = torch.zeros(hidden_size + 1, hidden_size + 1, dtype=torch.float64)

    def add(self, inputs_NE: torch.Tensor) -> None:
        """Sums of a batch in the precision of the inputs, sums of batches in float64."""
        size = inputs_NE.shape[1]
        self.sum_FF[:size, :size] += (inputs_NE.T @ inputs_NE).to(self.sum_FF)
        self.sum_FF[:size, size] += inputs_NE.sum(0).to(self.sum_FF)
        self.sum_FF[size, :size] = self.sum_FF[:size, size]
        self.sum_FF[size, size] += len(inputs_NE)

    def statistics(self) -> HeadStatistics:
        tokens = int(self.sum_FF[-1, -1])
        return HeadStatistics(moment_FF=self.sum_FF / tokens, tokens=tokens)
