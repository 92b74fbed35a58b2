"""Query projections are fitted again, so that attention goes where the donor's went."""

from dataclasses import dataclass, replace

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
        Refusal: no calibration text.
    """

    kind: str = "repair"
    observes: bool = True
    needs_linear_scores: bool = True
    computes_scores: bool = True
    iterations: int = 8
    ridge: float = 1e-4

    def __call__(self, heads: AttentionWeights, layer: MethodContext) -> AttentionWeights:
        rows = layer.known_text("refit_queries").attention_rows()
        query_HDE, query_bias_HD = fitted_queries(heads, layer.before, rows, self.iterations, self.ridge)
        return replace(heads, query_HDE=query_HDE, query_bias_HD=query_bias_HD)


METHOD = RefitQueries()
