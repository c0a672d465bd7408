"""Naive twins of optimized code: slow, short, and easy to believe."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor


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


def naive_log_likelihood(model: Any, inputs: Mapping[str, Tensor], first: int) -> float:
    """Mean log-probability of tokens `first`.. of one unpadded text: each token asked for in a pass of its own."""
    tokens = inputs["input_ids"]
    rest = {name: value for name, value in inputs.items() if name not in ("input_ids", "attention_mask")}
    total = 0.0
    for position in range(first, tokens.shape[1]):
        with torch.no_grad():
            scores = model(input_ids=tokens[:, :position], **rest).logits[0, -1].double()
        total += float(scores[tokens[0, position]] - torch.logsumexp(scores, 0))
    return total / (tokens.shape[1] - first)
