"""How much each component's bits decide the score, in three ways: shares of a forest, a line, and marginal drops.

The shares follow Das et al. (arXiv 2601.15287): a random forest predicts the score from the bits; its impurity
importance, the permutation importance (Breiman 2001, doi 10.1023/A:1010933404324) and the mean absolute SHAP value
(TreeExplainer, Lundberg et al., arXiv 1905.04610) are each scaled to 100 and averaged. Such shares say as much of which
bits were in the grid as of what matters: settings that destroy the model carry most of the variance. So the same is
given for the usable region, and for it the better answer: what bits cost one component, the others held fixed.
"""

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from exporter.distribution import install_extra
from exporter.errors import DataError
from exporter.study.table import Floats, Table

TREES = 100
REPEATS = 30  # shuffles of each column
USABLE = 0.8  # bits are usable when some setting with them keeps this share of the full score
LEAST_ROWS = 8  # fewer rows than this say nothing
FEW_ROWS = 20  # fewer rows than this say little: one setting more or less moves shares by many points


@dataclass(frozen=True)
class Shares:
    """Component -> percent, by each way and their mean; r2_forest and r2_linear: share of the variance explained."""

    consensus: dict[str, float]
    forest: dict[str, float]
    permutation: dict[str, float]
    shap: dict[str, float]
    r2_forest: float
    r2_linear: float
    rows: int


@dataclass(frozen=True)
class Drop:
    """What `bits` cost one component: share of the full score, mean over `pairs` settings of the others, its error."""

    bits: float
    drop: float
    error: float
    pairs: int


@dataclass(frozen=True)
class Importance:
    """All that is said of one table.

    usable: component -> the bits of the usable region. inside: the shares there, None when too little is left.
    marginal: component -> the drop of each of its usable bits against its most bits.
    notes: why the figures should be read with care.
    """

    metric: str
    full_score: float
    shares: Shares
    usable: dict[str, tuple[float, ...]]
    inside: Shares | None
    marginal: dict[str, tuple[Drop, ...]]
    notes: tuple[str, ...] = ()

    def as_json(self) -> dict[str, Any]:
        """Plain data; `consensus` comes first."""
        inside = asdict(self.inside) if self.inside else None
        region = {"bits": self.usable, "shares": inside, "marginal_drop": _plain(self.marginal)}
        more = {"metric": self.metric, "full_score": self.full_score, "usable": region, "notes": list(self.notes)}
        return {**asdict(self.shares), **more}


def _plain(marginal: dict[str, tuple[Drop, ...]]) -> dict[str, list[dict[str, Any]]]:
    return {name: [asdict(drop) for drop in drops] for name, drops in marginal.items()}


def importance(table: Table, seed: int = 0, usable: float = USABLE) -> Importance:
    """Shares and marginal drops of a table. DataError when it has too few rows, or the extra `study` is missing."""
    if len(table.scores) < LEAST_ROWS or not np.ptp(table.scores):
        raise DataError(
            f"{len(table.scores)} rows with {len(np.unique(table.scores))} different scores are too few for importance",
            f"measure at least {LEAST_ROWS} settings whose scores differ",
        )
    kept = usable_bits(table, usable)
    rows = np.all([np.isin(table.bits[:, i], kept[name]) for i, name in enumerate(table.components)], axis=0)
    region = table.where(rows)
    varied = bool((np.ptp(region.bits, 0) > 0).all()) if rows.any() else False
    enough = len(region.scores) >= LEAST_ROWS and varied and np.ptp(region.scores) > 0
    return Importance(
        metric=table.metric,
        full_score=table.full_score(),
        shares=shares(table, seed),
        usable=kept,
        inside=shares(region, seed) if enough else None,
        marginal=marginal_drops(region, table.full_score()) if rows.any() else {},
        notes=_few(len(table.scores)) + table.notes,
    )


def _few(rows: int) -> tuple[str, ...]:
    return (f"{rows} settings are few: shares of under {FEW_ROWS} move much with each one",) if rows < FEW_ROWS else ()


def need_forest() -> None:
    """DataError when a library of the extra `study` that importance needs is missing."""
    try:
        import shap  # noqa: F401
        import sklearn  # noqa: F401
    except ImportError:
        raise DataError("importance needs scikit-learn and shap", install_extra("study")) from None


def shares(table: Table, seed: int) -> Shares:
    """The paper's consensus and what it is made of."""
    need_forest()
    import shap
    from sklearn.ensemble import RandomForestRegressor
    from sklearn.inspection import permutation_importance

    forest = RandomForestRegressor(n_estimators=TREES, random_state=seed).fit(table.bits, table.scores)
    shuffled = permutation_importance(forest, table.bits, table.scores, n_repeats=REPEATS, random_state=seed)
    explained = np.abs(np.asarray(shap.TreeExplainer(forest).shap_values(table.bits))).mean(0)
    ways = [_percent(np.asarray(way)) for way in (forest.feature_importances_, shuffled.importances_mean, explained)]
    consensus, *named = [_named(table, way) for way in (np.mean(ways, axis=0), *ways)]
    found = float(forest.score(table.bits, table.scores))
    return Shares(consensus, named[0], named[1], named[2], found, linear_r2(table), len(table.scores))


def _percent(values: Floats) -> Floats:
    """Scaled to 100 in all; a shuffled column that happened to help counts as 0."""
    positive: Floats = np.clip(values, 0, None)
    return 100 * positive / max(float(positive.sum()), 1e-30)


def _named(table: Table, values: Floats) -> dict[str, float]:
    return {name: round(float(value), 2) for name, value in zip(table.components, values, strict=True)}


def linear_r2(table: Table) -> float:
    """R^2 of the least-squares plane through score over bits."""
    inputs = np.column_stack([table.bits, np.ones(len(table.bits))])
    solution = np.linalg.lstsq(inputs, table.scores, rcond=None)[0]
    lost = float(np.square(table.scores - inputs @ solution).sum())
    return 1 - lost / float(np.square(table.scores - table.scores.mean()).sum())


def usable_bits(table: Table, share: float) -> dict[str, tuple[float, ...]]:
    """Component -> the bits with which some setting keeps `share` of the full score."""
    least = share * table.full_score()
    found = {}
    for i, name in enumerate(table.components):
        column = table.bits[:, i]
        found[name] = tuple(float(b) for b in np.unique(column) if table.scores[column == b].max() >= least)
    return found


def marginal_drops(table: Table, full: float) -> dict[str, tuple[Drop, ...]]:
    """Component -> for each of its bits, the mean loss against its most bits with everything else the same.

    full: the score that losses are shares of. error: standard error of that mean, 0 for a single pair.
    """
    found = {}
    for i, name in enumerate(table.components):
        groups = _by_others(table, i)
        top = float(table.bits[:, i].max())
        drops = []
        for bits in sorted({float(b) for b in table.bits[:, i]} - {top}):
            lost = np.array([(g[top] - g[bits]) / full for g in groups if top in g and bits in g])
            if len(lost):
                error = float(lost.std(ddof=1) / len(lost) ** 0.5) if len(lost) > 1 else 0.0
                drops.append(Drop(bits, float(lost.mean()), error, len(lost)))
        found[name] = tuple(drops)
    return found


def _by_others(table: Table, i: int) -> list[dict[float, float]]:
    """One dictionary, bits of component `i` -> mean score, for every setting of the other components."""
    gathered: dict[tuple[float, ...], dict[float, list[float]]] = {}
    for bits, score in zip(table.bits, table.scores, strict=True):
        others = tuple(float(b) for b in np.delete(bits, i))
        gathered.setdefault(others, {}).setdefault(float(bits[i]), []).append(float(score))
    return [{bits: float(np.mean(found)) for bits, found in group.items()} for group in gathered.values()]
