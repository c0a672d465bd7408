"""Bootstrap intervals: coverage, symmetry, constants, and sample sizes."""

import numpy as np
import pytest

from exporter.evaluation import bootstrap
from exporter.evaluation.bootstrap import (
    ASSUMED_SD,
    Difference,
    gate_interval,
    half_width,
    paired_bootstrap,
    samples_to_exclude,
    samples_to_resolve,
)
from tests.oracles import naive_paired_bootstrap


def scores(n: int, seed: int) -> tuple[list[float], list[float]]:
    """Correlated scores of 0 and 1: the models differ on about a fifth of the samples."""
    rng = np.random.default_rng(seed)
    first = rng.random(n) < 0.7
    second = np.where(rng.random(n) < 0.2, rng.random(n) < 0.5, first)
    return first.astype(float).tolist(), second.astype(float).tolist()


def test_interval_is_near_that_of_the_naive_loop() -> None:
    before, after = scores(200, seed=1)
    interval = paired_bootstrap(before, after, seed=0, resamples=4000)
    low, high = naive_paired_bootstrap(before, after, seed=5, resamples=4000)
    assert interval.change == pytest.approx(interval.after - interval.before)
    assert interval.before == pytest.approx(sum(before) / 200)
    assert (interval.low, interval.high) == pytest.approx((low, high), abs=0.006)
    assert interval.low < interval.change < interval.high


def test_the_interval_covers_the_true_change_at_its_confidence() -> None:
    """400 experiments with a known change of -0.1: 95 % intervals should hold it in 380, give or take 13 (3 sigma)."""
    rng = np.random.default_rng(7)
    covered = 0
    for i in range(400):
        after = rng.normal(0.5, 1.0, 120)
        before = after + rng.normal(0.1, 0.5, 120)
        interval = paired_bootstrap(before, after, seed=i, resamples=800)
        covered += interval.low <= -0.1 <= interval.high
    assert 0.95 - 0.035 <= covered / 400 <= 0.95 + 0.035


def test_confidence_widens_the_interval() -> None:
    before, after = scores(300, seed=3)
    narrow, wide = (paired_bootstrap(before, after, seed=0, confidence=c) for c in (0.5, 0.99))
    assert wide.low < narrow.low < narrow.high < wide.high


def test_swapping_the_models_mirrors_the_interval() -> None:
    before, after = scores(150, seed=2)
    forth, back = paired_bootstrap(before, after, seed=4), paired_bootstrap(after, before, seed=4)
    assert (back.change, back.low, back.high) == pytest.approx((-forth.change, -forth.high, -forth.low), abs=1e-12)


def test_a_constant_difference_gives_an_interval_of_width_zero() -> None:
    interval = paired_bootstrap([1.0, 0.75, 0.5], [0.75, 0.5, 0.25], seed=0)
    assert (interval.change, interval.low, interval.high) == (-0.25, -0.25, -0.25)


def test_same_seed_same_interval_and_memory_bound_does_not_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    before, after = scores(90, seed=8)
    whole = paired_bootstrap(before, after, seed=1, resamples=1001)
    assert paired_bootstrap(before, after, seed=1, resamples=1001) == whole
    assert paired_bootstrap(before, after, seed=2, resamples=1001) != whole
    monkeypatch.setattr(bootstrap, "_DRAWN_AT_ONCE", 90 * 64)  # 16 parts, the last one short
    parts = paired_bootstrap(before, after, seed=1, resamples=1001)
    assert (parts.low, parts.high) == pytest.approx((whole.low, whole.high), abs=1e-12)


@pytest.mark.parametrize(("before", "after"), [([], []), ([1.0], [1.0, 0.0])])
def test_empty_or_unequal_lists_are_refused(before: list[float], after: list[float]) -> None:
    with pytest.raises(ValueError, match="same length"):
        paired_bootstrap(before, after, seed=0)


def test_half_width_is_that_of_the_bootstrap() -> None:
    before, after = scores(2000, seed=6)
    interval = paired_bootstrap(before, after, seed=0)
    assert interval.sd == pytest.approx(np.std(np.subtract(before, after), ddof=1))
    assert half_width(interval.sd, 2000) == pytest.approx((interval.high - interval.low) / 2, rel=0.05)


def test_the_advised_number_of_samples_resolves_the_drop() -> None:
    """The advised number of samples gives the requested half width; a tenth fewer gives a larger one."""
    needed = samples_to_resolve(0.01)
    assert needed == 3842  # (1.96 * sqrt(0.1) / 0.01)**2
    assert half_width(ASSUMED_SD, needed) <= 0.01 < half_width(ASSUMED_SD, needed * 9 // 10)
    rng = np.random.default_rng(1)
    changes = rng.permutation(np.r_[np.ones(needed // 20), -np.ones(needed // 20), np.zeros(needed - needed // 10)])
    interval = paired_bootstrap(changes.tolist(), [0.0] * len(changes), seed=0, resamples=4000)
    assert (interval.high - interval.low) / 2 == pytest.approx(0.01, rel=0.05)


def test_zero_deviation_needs_the_minimum_and_zero_drop_is_refused() -> None:
    assert samples_to_resolve(0.01, sd=0.0) == 2
    with pytest.raises(ValueError, match="above 0"):
        samples_to_resolve(0.0)


@pytest.mark.parametrize("n", [1, 2, 50, 500])
def test_samples_without_a_change_have_a_binomial_interval(n: int) -> None:
    """At either end of the interval, the probability of no change in n samples is 2.5 %."""
    interval = paired_bootstrap([1.0, 0.0] * n, [1.0, 0.0] * n, seed=0, resamples=50)
    assert (interval.low, interval.high) == (0.0, 0.0)
    low, high = gate_interval(interval, 2 * n)
    assert (1 - high) ** (2 * n) == pytest.approx(0.025)
    assert low == -high


def test_the_bootstrap_interval_decides_when_losses_were_observed() -> None:
    before, after = [1.0] * 40, [0.0] * 4 + [1.0] * 36
    interval = paired_bootstrap(before, after, seed=0)
    assert gate_interval(interval, 40) == (interval.low, interval.high)
    assert interval.low < -0.15


def test_few_samples_do_not_exclude_an_unobserved_total_loss() -> None:
    """One of eight samples changed slightly; the bootstrap cannot show samples that lose their whole score."""
    for change in (0.001, -0.001):
        interval = paired_bootstrap([1.0] * 8, [1.0 + change] + [1.0] * 7, seed=0)
        assert interval.low > -0.01
        low, high = gate_interval(interval, 8)
        assert low == pytest.approx(0.025 ** (1 / 8) - 1)  # 37 of 100
        assert high == interval.high


def test_a_score_above_one_is_assumed_to_lose_its_mean() -> None:
    interval = paired_bootstrap([4.0, 8.0], [4.0, 8.0], seed=0)
    assert gate_interval(interval, 2)[0] == pytest.approx(-6 * (1 - 0.025**0.5))


@pytest.mark.parametrize(("drop", "cost"), [(0.01, 1.0), (0.006, 1.0), (0.03, 6.0)])
def test_the_computed_number_of_unchanged_samples_excludes_the_drop(drop: float, cost: float) -> None:
    interval = paired_bootstrap([cost, cost], [cost, cost], seed=0, resamples=50)
    needed = samples_to_exclude(drop, cost)
    assert gate_interval(interval, needed)[0] >= -drop > gate_interval(interval, needed - 1)[0]
    assert samples_to_exclude(0.01) == 368
    for impossible in (0.0, cost, cost + 1):
        with pytest.raises(ValueError, match="above 0 and below"):
            samples_to_exclude(impossible, cost)


def test_no_interval_ends_above_the_highest_score() -> None:
    full = Difference(before=0.95, after=0.95, change=0.0, low=0.0, high=0.0, sd=0.0)
    low, high = gate_interval(full, 20, 1.0)
    assert (low, high) == pytest.approx((-0.1684, 0.05), abs=1e-4)
    assert gate_interval(full, 20)[1] == pytest.approx(-low)
    better = Difference(before=0.9, after=0.96, change=0.06, low=-0.01, high=0.13, sd=0.3)
    assert gate_interval(better, 20, 1.0)[1] == pytest.approx(0.1)
    assert gate_interval(better, 20, 10.0)[1] == 0.13
