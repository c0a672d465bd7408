"""Paired bootstrap: confidence interval of a measured change, and sample sizes for a given precision.

Percentile interval of Efron and Tibshirani (An Introduction to the Bootstrap, 1993, chapter 13). Both models answer
the same samples, so the bootstrap resamples pairs; the difficulty of a sample for both models cancels.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np

RESAMPLES = 10_000
CONFIDENCE = 0.95
POINT = 0.01  # one point of a score from 0 to 1; a CIDEr of 1.20 is 120 points
ASSUMED_SD = math.sqrt(0.1)  # of paired differences before a measurement: one sample in ten changes by 1
_DRAWN_AT_ONCE = 2**21  # indices in memory at a time, 16 MB


@dataclass(frozen=True)
class Difference:
    """Means of two models on the same samples.

    change: after - before. low, high: its interval. sd: standard deviation of the changes per sample.
    """

    before: float
    after: float
    change: float
    low: float
    high: float
    sd: float

    @property
    def unchanged(self) -> bool:
        """Whether no sample's score differs; every bootstrap resample is then 0."""
        return self.change == 0 and self.sd == 0

    @property
    def cost(self) -> float:
        """Assumed loss of one changed sample: 1, or the mean of `before` where it is above 1 (CIDEr)."""
        return max(1.0, self.before)


def paired_bootstrap(
    before: Sequence[float],
    after: Sequence[float],
    *,
    seed: int,
    resamples: int = RESAMPLES,
    confidence: float = CONFIDENCE,
) -> Difference:
    """Change from `before` to `after` (one score per sample, same order) with its percentile interval.

    Deterministic in `seed`. Raises ValueError when the lists are empty or their lengths differ.
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
    """Half width of the interval of a change by the normal approximation: z sd / sqrt(samples).

    sd: standard deviation of paired differences, in units of the score.
    """
    return _z(confidence) * sd / math.sqrt(samples)


def samples_to_resolve(drop: float, sd: float = ASSUMED_SD, confidence: float = CONFIDENCE) -> int:
    """Number of samples for an interval with a half width of at most `drop`, so that a larger drop is significant.

    Inverse of `half_width`, rounded up and at least 2. Raises ValueError unless drop > 0 and sd >= 0.
    """
    if not (drop > 0 and sd >= 0):
        raise ValueError(f"drop must be above 0 and sd at least 0, not {drop} and {sd}")
    return max(2, math.ceil((_z(confidence) * sd / drop) ** 2))


def gate_interval(
    difference: Difference, samples: int, highest: float = math.inf, confidence: float = CONFIDENCE
) -> tuple[float, float]:
    """Both ends of the interval of the change that decides gates.

    This is the bootstrap interval, widened because a bootstrap never draws a change that no sample showed. A fraction
    of up to 1 - tail**(1 / samples) of all samples may lose `Difference.cost` each and still be absent from the test
    samples (Clopper and Pearson, Biometrika 26, 1934), so the lower end is at most minus that loss. When no score
    differs, the upper end is widened in the same way. highest: the highest score that is possible; no interval ends
    above it.
    """
    tail = (1 - confidence) / 2
    reach = difference.cost * (1 - math.pow(tail, 1 / samples))
    high = reach if difference.unchanged else difference.high
    return min(difference.low, -reach), max(difference.change, min(high, highest - difference.before))


def samples_to_exclude(drop: float, cost: float = 1.0, confidence: float = CONFIDENCE) -> int:
    """Smallest number of samples with which `gate_interval` excludes a larger drop when no score differs.

    Raises ValueError unless 0 < drop < cost.
    """
    if not 0 < drop < cost:
        raise ValueError(f"drop must be above 0 and below {cost}, not {drop}")
    return math.ceil(math.log((1 - confidence) / 2) / math.log1p(-drop / cost))


def _z(confidence: float) -> float:
    return NormalDist().inv_cdf((1 + confidence) / 2)
