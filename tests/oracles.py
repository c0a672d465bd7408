"""Naive twins of optimized code: slow, short, and easy to believe."""

from collections.abc import Sequence

import numpy as np


def naive_paired_bootstrap(
    before: Sequence[float], after: Sequence[float], seed: int, resamples: int
) -> tuple[float, float]:
    """95 % percentile interval of the mean of before - after, one drawn sample at a time."""
    generator = np.random.default_rng(seed)
    means = []
    for _ in range(resamples):
        drawn = generator.choice(len(before), len(before), replace=True)
        means.append(sum(before[i] - after[i] for i in drawn) / len(before))
    means.sort()
    return means[round(0.025 * resamples)], means[round(0.975 * resamples) - 1]
