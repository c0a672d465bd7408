"""Paired bootstrap: how far a measured drop may be off because the test samples are only a sample.

Percentile interval of Efron and Tibshirani (An Introduction to the Bootstrap, 1993, chapter 13). Both models answer
the same samples, so samples are drawn in pairs: what makes a sample hard for both cancels.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

_DRAWN_AT_ONCE = 2**21  # indices in memory at a time, 16 MB


@dataclass(frozen=True)
class Difference:
    """Means of two models on the same samples. drop: before - after; low, high: its interval."""

    before: float
    after: float
    drop: float
    low: float
    high: float


def paired_bootstrap(
    before: Sequence[float], after: Sequence[float], *, seed: int, resamples: int = 10_000, confidence: float = 0.95
) -> Difference:
    """The drop from `before` to `after` (one score a sample, same order) with its interval.

    Deterministic in `seed`. Raises ValueError when there is nothing to compare or the lengths differ.
    """
    first, second = np.asarray(before, np.float64), np.asarray(after, np.float64)
    if first.shape != second.shape or first.ndim != 1 or not first.size:
        raise ValueError(f"scores must be two lists of the same length, not {first.shape} and {second.shape}")
    drops = first - second
    generator = np.random.default_rng(seed)
    rows = max(1, _DRAWN_AT_ONCE // drops.size)
    means = [
        drops[generator.integers(0, drops.size, (min(rows, resamples - start), drops.size))].mean(axis=1)
        for start in range(0, resamples, rows)
    ]
    tail = (1 - confidence) / 2
    low, high = np.quantile(np.concatenate(means), (tail, 1 - tail))
    return Difference(float(first.mean()), float(second.mean()), float(drops.mean()), float(low), float(high))
