"""The verdict on a study in one sentence: the smallest setting whose change the samples cannot tell from none."""

import math
from collections.abc import Sequence

from exporter.amounts import size
from exporter.study.setting_rows import SettingRow

KEPT = 0.99  # share of the full-precision score that a setting must keep to be named if no interval is known
RESOLVED = 0.05  # with a loss of this share of the score not excluded, the samples cannot tell


def smallest_that_holds(rows: Sequence[SettingRow]) -> SettingRow | None:
    """The smallest quantized setting whose interval contains the full-precision score; None if none does."""
    return next(
        (row for row in sorted(rows, key=lambda row: (row.bytes, -row.score)) if row.holds and not row.full), None
    )


def verdict(rows: Sequence[SettingRow]) -> str:
    """The first sentence of the page; empty without quantized settings or without a full-precision score."""
    settings = [row for row in rows if not row.full and row.change is not None]
    if not settings:
        return ""
    counts = sorted({row.samples for row in settings if row.samples})
    samples = f" with {' or '.join(f'{count:,}' for count in counts)} samples" if counts else ""
    studied = f"{len(settings)} setting{'s were' if len(settings) > 1 else ' was'} measured{samples}"
    if not any(row.change_interval for row in settings):
        kept = [row for row in settings if (row.change or 0) >= KEPT - 1]
        if kept:
            return f"{studied}; the smallest that keeps 99 % of the score is {_described(kept[0])}."
        return f"{studied}; none keeps 99 % of the score, and the best is {_described(_best(settings))}."
    smallest = smallest_that_holds(settings)
    if smallest is None:
        loses = "each loses score beyond its 95 % interval, the least" if len(settings) > 1 else "it loses score:"
        return f"{studied}; {loses} {_described(_best(settings))}."
    missing = _times_as_many(smallest)
    if missing > 1:
        return (
            f"{studied}, which cannot tell how small the model may become: the smallest setting whose 95 % interval "
            f"holds the full-precision score is {_described(smallest)}; {missing} times the samples would narrow it "
            "to 5 %."
        )
    return f"{studied}; the smallest whose 95 % interval holds the full-precision score is {_described(smallest)}."


def _best(settings: Sequence[SettingRow]) -> SettingRow:
    return max(settings, key=lambda row: row.score)


def _times_as_many(row: SettingRow) -> int:
    """How many times as many samples exclude a loss of RESOLVED, if the change is 0; 1: these do.

    The error of the mean falls with the root of their number, the share of losses that no sample shows with the number.
    """
    low, high = row.change_interval or (0.0, 0.0)
    if low >= -RESOLVED:
        return 1
    unseen_only = high == -low  # no sample's score differs
    error = 0.0 if unseen_only else (high - (row.change or 0.0)) / RESOLVED
    return max(2, math.ceil(max(error**2, -low / RESOLVED)))


def _described(row: SettingRow) -> str:
    """A setting with its size and its change, in words."""
    method = f" by {row.method}" if row.method else ""
    interval = f" ({share(row.change_interval)})" if row.change_interval else ""
    change = f"change {percent(row.change)}{interval}"
    return f"{row.name}{method}: {size(row.bytes)}, {row.bits_per_weight:.2f} bits per weight, {change}"


def percent(value: float | None) -> str:
    """A change as a share of a score, with its sign: `-1.2 %`."""
    return "" if value is None else f"{100 * value:+z.1f} %"


def share(interval: tuple[float, float]) -> str:
    """An interval of changes: `-3.0 to +1.2 %`."""
    return f"{100 * interval[0]:+z.1f} to {100 * interval[1]:+z.1f} %"
