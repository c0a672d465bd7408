"""Paired bootstrap: how far a measured drop may be off because the test samples are only a sample.

Percentile interval of Efron and Tibshirani (An Introduction to the Bootstrap, 1993, chapter 13). Both models answer
the same samples, so samples are drawn in pairs: what makes a sample hard for both cancels.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np

RESAMPLES = 10_000
CONFIDENCE = 0.95
POINT = 0.01  # one point of a score from 0 to 1; a CIDEr of 1.20 is 120 points
ASSUMED_SD = math.sqrt(0.1)  # of paired differences before anything is measured: one sample in ten changes by a whole 1
_DRAWN_AT_ONCE = 2**21  # indices in memory at a time, 16 MB


@dataclass(frozen=True)
class Difference:
    """Means of two models on the same samples.

    change: after - before; low, high: its interval. sd: standard deviation of the changes of single samples.
    """

    before: float
    after: float
    change: float
    low: float
    high: float
    sd: float

    @property
    def unchanged(self) -> bool:
        """Whether no sample's score differs: then a bootstrap cannot draw anything but zeros."""
        return self.change == 0 and self.sd == 0

    @property
    def cost(self) -> float:
        """What one changed sample is taken to lose: all of a score from 0 to 1; the mean where that is above 1."""
        return max(1.0, self.before)


def paired_bootstrap(
    before: Sequence[float],
    after: Sequence[float],
    *,
    seed: int,
    resamples: int = RESAMPLES,
    confidence: float = CONFIDENCE,
) -> Difference:
    """The change from `before` to `after` (one score a sample, same order) with its interval.

    Deterministic in `seed`. Raises ValueError when there is nothing to compare or the lengths differ.
    """
    first, second = np.asarray(before, np.float64), np.asarray(after, np.float64)
    if first.shape != second.shape or first.ndim != 1 or not first.size:
        raise ValueError(f"scores must be two lists of the same length, not {first.shape} and {second.shape}")
    changes = second - first
    generator = np.random.default_rng(seed)
    rows = max(1, _DRAWN_AT_ONCE // changes.size)
    drawn = [
        changes[generator.integers(0, changes.size, (min(rows, resamples - start), changes.size))].mean(axis=1)
        for start in range(0, resamples, rows)
    ]
    tail = (1 - confidence) / 2
    low, high = np.quantile(np.concatenate(drawn), (tail, 1 - tail))
    sd = changes.std(ddof=1) if changes.size > 1 else 0.0
    return Difference(
        before=float(first.mean()),
        after=float(second.mean()),
        change=float(changes.mean()),
        low=float(low),
        high=float(high),
        sd=float(sd),
    )


def half_width(sd: float, samples: int, confidence: float = CONFIDENCE) -> float:
    """How far the interval of a change reaches to each side of it, by the normal approximation: z sd / sqrt(samples).

    sd: standard deviation of paired differences, in the unit of the score.
    """
    return _z(confidence) * sd / math.sqrt(samples)


def samples_to_resolve(drop: float, sd: float = ASSUMED_SD, confidence: float = CONFIDENCE) -> int:
    """Samples that make the interval reach at most `drop` to each side, so that a drop of more than it shows.

    The inverse of `half_width`, rounded up and at least 2. Raises ValueError unless drop > 0 and sd >= 0.
    """
    if not (drop > 0 and sd >= 0):
        raise ValueError(f"drop must be above 0 and sd not below, not {drop} and {sd}")
    return max(2, math.ceil((_z(confidence) * sd / drop) ** 2))


def ends(found: Difference, samples: int, confidence: float = CONFIDENCE) -> tuple[float, float]:
    """Both ends of the interval of the change that gates are decided by.

    The bootstrap's, but a bootstrap never draws what no sample showed. Among so many samples a share of up to
    1 - tail**(1 / samples) can lose `Difference.cost` each, all of their score, without being seen once (Clopper and
    Pearson, Biometrika 26, 1934), so the lower end is never nearer to zero than that. Where nothing changed at all, the
    same holds for gains.
    """
    tail = (1 - confidence) / 2
    reach = found.cost * (1 - math.pow(tail, 1 / samples))
    return min(found.low, -reach), reach if found.unchanged else found.high


def samples_to_exclude(drop: float, cost: float = 1.0, confidence: float = CONFIDENCE) -> int:
    """The fewest samples that exclude a larger drop by `ends`. Raises ValueError unless 0 < drop < cost."""
    if not 0 < drop < cost:
        raise ValueError(f"drop must be above 0 and below {cost}, not {drop}")
    return math.ceil(math.log((1 - confidence) / 2) / math.log1p(-drop / cost))


def _z(confidence: float) -> float:
    return NormalDist().inv_cdf((1 + confidence) / 2)
