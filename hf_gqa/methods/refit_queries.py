"""Query projections are fitted again, so that attention goes where the donor's went."""

from dataclasses import dataclass, replace

from ..refusal import Refusal
from ..weights.attention_weights import AttentionWeights
from ..weights.query_fit import fitted_queries
from . import MethodContext


@dataclass(frozen=True, slots=True, kw_only=True)
class RefitQueries:
    """Ridge least squares of attention scores on the converted model's own inputs, keys as the merge left them.

    Source: ours. The shared key says less than the donor's did, and on inputs that errors below have moved; the query
    that does best with both is not the one that did best with the donor's.

    Args:
        iterations: of the solver.
        ridge: pull towards the queries as they were.

    Raises:
        Refusal: no calibration text, or norms after the projections, through which a score is not linear in them.
    """

    kind: str = "repair"
    observes: bool = True
    iterations: int = 8
    ridge: float = 1e-4

    def __call__(self, heads: AttentionWeights, layer: MethodContext) -> AttentionWeights:
        if layer.head_norms:
            raise Refusal(
                f"method = refit_queries: queries and keys of layer {layer.layer_idx} are normed after their projections, "
                f"so scores are not linear in them. Leave it out."
            )
        rows = layer.known_text("refit_queries").attention_rows()
        query_HDE, query_bias_HD = fitted_queries(heads, layer.before, rows, self.iterations, self.ridge)
        return replace(heads, query_HDE=query_HDE, query_bias_HD=query_bias_HD)


METHOD = RefitQueries()
