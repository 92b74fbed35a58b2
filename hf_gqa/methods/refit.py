"""The output projection is fitted again to what the merged heads really put out."""

from dataclasses import dataclass, replace

import torch

from ..weights.attention_weights import AttentionWeights
from . import MethodContext


@dataclass(frozen=True, slots=True, kw_only=True)
class Refit:
    """Ridge least squares on the converted model's own inputs, layer by layer: errors from below are made up for too.

    Source: ours; layer-by-layer reconstruction is that of post-training pruning, as in SparseGPT (Frantar and Alistarh
    2023, arXiv 2301.00774).

    Args:
        ridge: pull towards the projection as it was, as a fraction of the heads' mean power.

    Raises:
        Refusal: no calibration text.
    """

    kind: str = "repair"
    observes: bool = True
    ridge: float = 1e-3

    def __call__(self, heads: AttentionWeights, layer: MethodContext) -> AttentionWeights:
        moments = layer.known_text("refit").output_moments(heads)
        size = heads.output_EHD[0].numel()
        known_EM = heads.output_EHD.flatten(1).to(moments.mixed_MM)
        if heads.output_bias_E is not None:
            known_EM = torch.cat([known_EM, heads.output_bias_E.to(known_EM).unsqueeze(1)], dim=1)
            size += 1
        mixed_MM, target_EM = moments.mixed_MM[:size, :size], moments.target_EM[:, :size]
        pull = self.ridge * mixed_MM.diagonal().mean() + torch.finfo(torch.float64).tiny
        # solved for the change, so that what no text says anything about stays as it is
        change_EM = torch.linalg.solve(
            mixed_MM + pull * torch.eye(size, dtype=mixed_MM.dtype), (target_EM - known_EM @ mixed_MM).T
        ).T
        fitted_EM = known_EM + change_EM
        output_EHD = fitted_EM[:, : heads.output_EHD[0].numel()].unflatten(1, heads.output_EHD.shape[1:])
        bias_E = None if heads.output_bias_E is None else fitted_EM[:, -1].to(heads.output_bias_E)
        return replace(heads, output_EHD=output_EHD.to(heads.output_EHD).contiguous(), output_bias_E=bias_E)


METHOD = Refit()
