"""Intervals of paired differences by resampling groups of samples that belong together.

`W` groups, `R` resamples.
"""

from collections.abc import Callable
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np

from ..report import Interval


FEWEST_GROUPS = 8
DRAWN_AT_ONCE = 1 << 22


@dataclass(frozen=True, slots=True, kw_only=True)
class Bootstrap:
    """Percentile intervals of ratios of sums, over resampled groups.

    Tokens of one window depend on each other, so whole windows are drawn; donor and student are drawn together, so what both
    find hard cancels. The percentiles are widened for small W, without which few groups give too narrow an interval.

    Source: Hesterberg, What Teachers Should Know about the Bootstrap (1411.5279), section 5.3 (expanded percentiles).

    Args:
        seed: the same seed gives the same interval.
        resamples: how many are drawn.
        confidence_fraction: such as 0.95.
    """

    seed: int = 0
    resamples: int = 2000
    confidence_fraction: float = 0.95

    def interval(
        self, sums_W: np.ndarray, counts_W: np.ndarray, transform: Callable[[np.ndarray], np.ndarray] = np.asarray
    ) -> Interval | None:
        """Of `transform(sum of sums / sum of counts)`; None for too few groups to say.

        Args:
            sums_W: what each group adds to the numerator.
            counts_W: what it adds to the denominator.
            transform: monotonic.
        """
        groups = len(sums_W)
        if groups < FEWEST_GROUPS:
            return None
        value = transform(np.float64(np.sum(sums_W) / np.sum(counts_W)))
        low, high = transform(np.quantile(self._ratios(sums_W, counts_W), self._tails(groups)))
        return Interval(value=float(value), low=float(low), high=float(high))

    def difference(
        self,
        ours_W: np.ndarray,
        theirs_W: np.ndarray,
        counts_W: np.ndarray,
        transform: Callable[[np.ndarray], np.ndarray] = np.asarray,
    ) -> Interval | None:
        """Of `transform(ours / counts) - transform(theirs / counts)`, each a ratio of sums; None for too few groups."""
        groups = len(counts_W)
        if groups < FEWEST_GROUPS:
            return None
        ours, theirs = (transform(np.float64(np.sum(sums_W) / np.sum(counts_W))) for sums_W in (ours_W, theirs_W))
        ours_R, theirs_R = (transform(self._ratios(sums_W, counts_W)) for sums_W in (ours_W, theirs_W))
        low, high = np.quantile(ours_R - theirs_R, self._tails(groups))
        return Interval(value=float(ours - theirs), low=float(low), high=float(high))

    def _tails(self, groups: int) -> list[float]:
        tail = expanded_tail((1 - self.confidence_fraction) / 2, groups)
        return [tail, 1 - tail]

    def _ratios(self, sums_W: np.ndarray, counts_W: np.ndarray) -> np.ndarray:
        """Of each resample, the same groups in each call; drawn in parts, for R x W may be large."""
        random, groups = np.random.default_rng(self.seed), len(sums_W)
        both_W2, found = np.stack([sums_W, counts_W], axis=1).astype(np.float64), []
        part = max(1, DRAWN_AT_ONCE // groups)
        for begin in range(0, self.resamples, part):
            rows = min(part, self.resamples - begin)
            times_RW = random.multinomial(groups, np.full(groups, 1 / groups), size=rows)
            totals_R2 = times_RW @ both_W2
            found.append(totals_R2[:, 0] / totals_R2[:, 1])
        return np.concatenate(found)


def expanded_tail(tail: float, groups: int) -> float:
    """The percentile to read in place of `tail`, so that a mean of `groups` samples has the interval that t would give."""
    return NormalDist().cdf(-np.sqrt(groups / (groups - 1)) * student_t_quantile(1 - tail, groups - 1))


def student_t_quantile(probability: float, degrees: int) -> float:
    """Within 0.01 of the quantile of Student's t from 7 degrees of freedom on.

    Source: Abramowitz and Stegun, Handbook of Mathematical Functions, 26.7.5.
    """
    z = NormalDist().inv_cdf(probability)
    terms = (
        z,
        (z**3 + z) / 4,
        (5 * z**5 + 16 * z**3 + 3 * z) / 96,
        (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384,
    )
    return sum(term / degrees**power for power, term in enumerate(terms))
