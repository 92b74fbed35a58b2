"""The output projection is fitted again to what the merged heads really put out."""

from dataclasses import dataclass

from ..weights.attention_weights import AttentionWeights
from ..weights.output_moments import fitted_output
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
        return fitted_output(heads, layer.known_text("refit").output_moments(heads), self.ridge)


METHOD = Refit()
