"""Figures of `bench/peers.py` from the divergences of test samples, and its table."""

from collections.abc import Mapping, Sequence
from math import sqrt
from statistics import mean, variance
from typing import Any


def divergences(by_task: Sequence[Sequence[float]]) -> dict[str, float]:
    """`kl`, the mean of the tasks' means; `kl_error`, its standard error over samples; `kl_99`, without outliers.

    by_task: KL of each sample, for each task. Some samples weigh as much as all others, because an answer changes:
    `kl_99` leaves out the 1 % of each task with the largest values, at least one sample.
    """
    kept = [sorted(values)[: len(values) - max(1, len(values) // 100)] for values in by_task]
    squares = [variance(values) / len(values) for values in by_task]
    return {
        "kl": mean(map(mean, by_task)),
        "kl_error": sqrt(sum(squares)) / len(by_task),
        "kl_99": mean(map(mean, kept)),
    }


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """One line per bits and method: means over the draws, with the range of KL and the standard error of its mean.

    The error is that of test samples; draws are judged by the same ones, so it does not fall with their number.
    """
    lines = [
        "| bits | method | draws | KL | ± | range of draws | without outliers | exact captions | seconds |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for bits, name in dict.fromkeys((row["bits"], row["method"]) for row in rows):
        same = [row for row in rows if (row["bits"], row["method"]) == (bits, name)]
        kls = [row["kl"] for row in same]
        captions, seconds = mean(row["captions"] for row in same), mean(row["seconds"] for row in same)
        spread = f"{min(kls):.5f} to {max(kls):.5f}"
        error, most = (mean(row[key] for row in same) for key in ("kl_error", "kl_99"))
        lines.append(
            f"| {bits} | {name} | {len(same)} | {mean(kls):.5f} | {error:.5f} | {spread} | {most:.5f} | "
            f"{100 * captions:.1f} % | {seconds:.1f} |"
        )
    return "\n".join(lines)
