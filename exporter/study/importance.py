"""Importance of each component's bits for the score: consensus of three forest methods, linear fit, marginal changes.

The consensus follows Das et al. (arXiv 2601.15287): a random forest predicts the score from the bits; its impurity
importance, the permutation importance (Breiman 2001, doi 10.1023/A:1010933404324) and the mean absolute SHAP value
(TreeExplainer, Lundberg et al., arXiv 1905.04610) are each scaled to a sum of 100 and averaged. The result depends on
the bits in the grid, because settings that destroy the model cause most of the variance. The module therefore also
computes it within the usable region, and there the marginal changes: the change of score per bit width of one component
with all others fixed, which does not depend on the grid.
"""

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from exporter.distribution import install_extra
from exporter.errors import DataError
from exporter.study.score_table import Floats, Table

TREES = 100
REPEATS = 30  # permutations of each column
USABLE = 0.8  # a bit width is usable if some setting with it keeps this share of the full score
LEAST_ROWS = 8  # minimal number of rows
FEW_ROWS = 20  # below this number of rows, one more setting changes shares by many points


@dataclass(frozen=True)
class Shares:
    """Component -> percent, per method and as their mean (`consensus`). r2_*: share of the variance explained."""

    consensus: dict[str, float]
    forest: dict[str, float]
    permutation: dict[str, float]
    shap: dict[str, float]
    r2_forest: float
    r2_linear: float
    rows: int


@dataclass(frozen=True)
class MarginalChange:
    """Change of the score with one component at `bits`, as a share of the full score; negative for a loss.

    change, error: mean and standard error over `pairs` settings of the other components.
    """

    bits: float
    change: float
    error: float
    pairs: int


@dataclass(frozen=True)
class Importance:
    """Importance of the components of one table.

    usable: component -> bit widths of the usable region. inside: shares within it, None if it has too few settings.
    marginal: component -> the change at each usable bit width against its largest one.
    notes: limits of these figures.
    """

    metric: str
    full_score: float
    shares: Shares
    usable: dict[str, tuple[float, ...]]
    inside: Shares | None
    marginal: dict[str, tuple[MarginalChange, ...]]
    notes: tuple[str, ...] = ()

    def as_json(self) -> dict[str, Any]:
        """JSON-compatible data; `consensus` is the first key."""
        inside = asdict(self.inside) if self.inside else None
        region = {"bits": self.usable, "shares": inside, "marginal_change": _changes_as_json(self.marginal)}
        fields = {"metric": self.metric, "full_score": self.full_score, "usable": region, "notes": list(self.notes)}
        return {**asdict(self.shares), **fields}


def _changes_as_json(marginal: dict[str, tuple[MarginalChange, ...]]) -> dict[str, list[dict[str, Any]]]:
    return {name: [asdict(change) for change in changes] for name, changes in marginal.items()}


def importance(table: Table, seed: int = 0, usable: float = USABLE) -> Importance:
    """Shares and marginal changes of a table. Raises DataError for too few rows or without the extra `study`."""
    if len(table.scores) < LEAST_ROWS or not np.ptp(table.scores):
        raise DataError(
            f"{len(table.scores)} rows with {len(np.unique(table.scores))} different scores are too few for importance",
            f"measure at least {LEAST_ROWS} settings whose scores differ",
        )
    usable_by_component = usable_bits(table, usable)
    rows = np.all(
        [np.isin(table.bits[:, i], usable_by_component[name]) for i, name in enumerate(table.components)], axis=0
    )
    region = table.where(rows)
    varied = bool((np.ptp(region.bits, 0) > 0).all()) if rows.any() else False
    enough = len(region.scores) >= LEAST_ROWS and varied and np.ptp(region.scores) > 0
    return Importance(
        metric=table.metric,
        full_score=table.full_score(),
        shares=shares(table, seed),
        usable=usable_by_component,
        inside=shares(region, seed) if enough else None,
        marginal=marginal_changes(region, table.full_score()) if rows.any() else {},
        notes=_few_rows_note(len(table.scores)) + table.notes,
    )


def _few_rows_note(rows: int) -> tuple[str, ...]:
    return (
        (f"only {rows} settings: with fewer than {FEW_ROWS}, each setting changes the shares by many points",)
        if rows < FEW_ROWS
        else ()
    )


def need_forest() -> None:
    """Raise DataError if scikit-learn or shap is missing."""
    try:
        import shap  # noqa: F401
        import sklearn  # noqa: F401
    except ImportError:
        raise DataError("importance needs scikit-learn and shap", install_extra("study")) from None


def shares(table: Table, seed: int) -> Shares:
    """The consensus of the paper and its three components. seed: seed of the forest and the permutations."""
    need_forest()
    import shap
    from sklearn.ensemble import RandomForestRegressor
    from sklearn.inspection import permutation_importance

    forest = RandomForestRegressor(n_estimators=TREES, random_state=seed).fit(table.bits, table.scores)
    shuffled = permutation_importance(forest, table.bits, table.scores, n_repeats=REPEATS, random_state=seed)
    shap_means = np.abs(np.asarray(shap.TreeExplainer(forest).shap_values(table.bits))).mean(0)
    importances = [
        _percent(np.asarray(values)) for values in (forest.feature_importances_, shuffled.importances_mean, shap_means)
    ]
    consensus, *by_method = [_by_component(table, values) for values in (np.mean(importances, axis=0), *importances)]
    r2 = float(forest.score(table.bits, table.scores))
    return Shares(consensus, by_method[0], by_method[1], by_method[2], r2, linear_r2(table), len(table.scores))


def _percent(values: Floats) -> Floats:
    """Values scaled to a sum of 100; negative values, from permutations that improved the score, count as 0."""
    positive: Floats = np.clip(values, 0, None)
    return 100 * positive / max(float(positive.sum()), 1e-30)


def _by_component(table: Table, values: Floats) -> dict[str, float]:
    return {name: round(float(value), 2) for name, value in zip(table.components, values, strict=True)}


def linear_r2(table: Table) -> float:
    """R^2 of a linear least-squares fit of the score over the bits."""
    inputs = np.column_stack([table.bits, np.ones(len(table.bits))])
    solution = np.linalg.lstsq(inputs, table.scores, rcond=None)[0]
    residual = float(np.square(table.scores - inputs @ solution).sum())
    return 1 - residual / float(np.square(table.scores - table.scores.mean()).sum())


def usable_bits(table: Table, share: float) -> dict[str, tuple[float, ...]]:
    """Component -> bit widths with which some setting keeps `share` of the full score."""
    threshold = share * table.full_score()
    usable = {}
    for i, name in enumerate(table.components):
        column = table.bits[:, i]
        usable[name] = tuple(float(b) for b in np.unique(column) if table.scores[column == b].max() >= threshold)
    return usable


def marginal_changes(table: Table, full: float) -> dict[str, tuple[MarginalChange, ...]]:
    """Component -> for each bit width, the mean change against its largest one with all other components equal.

    full: full-precision score; changes are shares of it. error: standard error of the mean, 0 for a single pair.
    """
    by_component = {}
    for i, name in enumerate(table.components):
        groups = _scores_by_other_bits(table, i)
        top = float(table.bits[:, i].max())
        changes = []
        for bits in sorted({float(b) for b in table.bits[:, i]} - {top}):
            differences = np.array([(g[bits] - g[top]) / full for g in groups if top in g and bits in g])
            if len(differences):
                count = len(differences)
                error = float(differences.std(ddof=1) / count**0.5) if count > 1 else 0.0
                changes.append(MarginalChange(bits, float(differences.mean()), error, count))
        by_component[name] = tuple(changes)
    return by_component


def _scores_by_other_bits(table: Table, i: int) -> list[dict[float, float]]:
    """For every setting of the other components, a dict: bits of component `i` -> mean score."""
    scores: dict[tuple[float, ...], dict[float, list[float]]] = {}
    for bits, score in zip(table.bits, table.scores, strict=True):
        other_bits = tuple(float(value) for value in np.delete(bits, i))
        scores.setdefault(other_bits, {}).setdefault(float(bits[i]), []).append(float(score))
    return [{bits: float(np.mean(values)) for bits, values in group.items()} for group in scores.values()]
