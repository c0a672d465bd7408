"""The consensus of importance: against a naive computation, and against the published one where scores exist."""

import csv
import json
import os
from itertools import combinations, product
from math import factorial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner

from bench.study_paper import TABLE, WITHIN, Published
from exporter.commands.main import cli
from exporter.study import importance
from exporter.study.importance import REPEATS
from exporter.study.score_table import Floats

PAPER = Path(os.environ.get("MMQ_PAPER_DATA", Path(__file__).parents[2] / "shared" / "paper-data"))
AGREES = (
    "BLIP-2 COCO, GPTQ",
    "BLIP-2 COCO, AWQ",
    "LLaVA GQA, AWQ",
)  # the others do not: docs/how-to/choose-bits.md says why
COLUMNS = ("vit_bits", "qformer_bits", "llm_bits")
BITS = (2, 3, 4, 8)


def consensus_of(path: Path, *options: str) -> dict[str, float]:
    """What the command prints."""
    result = CliRunner().invoke(cli, ["study", "importance", str(path), "--json", *options])
    assert result.exit_code == 0, result.output
    consensus: dict[str, float] = json.loads(result.stdout)["consensus"]
    return consensus


def scores(bits: Floats) -> Floats:
    """Cliffs of three heights that meet, as in the paper's grids."""
    lost = 0.5 * 2.0 ** -bits[:, 0] + 0.1 * 2.0 ** -bits[:, 1] + 0.8 * 2.0 ** -(bits[:, 2] - 1)
    score: Floats = np.maximum(0.0, 1.2 - 2 * lost - (bits[:, 0] == 2) * (bits[:, 2] <= 3) * 0.2)
    return score


def test_the_consensus_is_what_its_definition_gives(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Against gains of splits, shuffles and Shapley values that are computed here from a forest's trees."""
    monkeypatch.setattr(importance, "TREES", 30)
    bits = np.array(list(product(BITS, BITS, BITS)), dtype=np.float64)
    with (tmp_path / "grid.csv").open("w", newline="") as file:
        csv.writer(file).writerows(
            [(*COLUMNS, "cider"), *([*row, y] for row, y in zip(bits, scores(bits), strict=True))]
        )
    consensus = consensus_of(tmp_path / "grid.csv")
    assert list(consensus) == ["vision", "qformer", "language"]
    assert list(consensus.values()) == pytest.approx(list(naive_consensus(bits, scores(bits))), abs=1.0)
    assert consensus["language"] > consensus["vision"] > consensus["qformer"] > 0


def naive_consensus(bits: Floats, values: Floats) -> Floats:
    """Percent of each column."""
    from sklearn.ensemble import RandomForestRegressor

    forest = RandomForestRegressor(n_estimators=importance.TREES, random_state=1).fit(bits, values)
    trees = [tree.tree_ for tree in forest.estimators_]
    gains = sum(gains_of(tree, bits.shape[1]) for tree in trees)
    dice = np.random.default_rng(5)
    whole = r2(values, forest.predict(bits))
    drops = np.zeros(bits.shape[1])
    for column, _ in product(range(bits.shape[1]), range(REPEATS)):
        shuffled = bits.copy()
        shuffled[:, column] = dice.permutation(bits[:, column])
        drops[column] += whole - r2(values, forest.predict(shuffled))
    some = bits[::5]
    explained = np.mean([np.abs(np.mean([shapley(tree, row) for tree in trees], axis=0)) for row in some], axis=0)
    ways = [100 * way / way.sum() for way in (gains, np.maximum(drops, 0), explained)]
    mean: Floats = np.mean(ways, axis=0)
    return mean


def r2(values: Floats, predicted: Floats) -> float:
    return 1 - float(((values - predicted) ** 2).sum() / ((values - values.mean()) ** 2).sum())


def gains_of(tree: Any, columns: int) -> Floats:
    """How much variance the splits on each column take away, as a share of the tree's."""
    gains = np.zeros(columns)
    weight = tree.weighted_n_node_samples
    for node, left in enumerate(tree.children_left):
        if left >= 0:
            sides = (left, tree.children_right[node])
            after = sum(weight[side] * tree.impurity[side] for side in sides)
            gains[tree.feature[node]] += weight[node] * tree.impurity[node] - after
    return gains / gains.sum()


def shapley(tree: Any, row: Floats) -> Floats:
    """Each column's Shapley value in a tree's prediction; omitted columns take both branches, weighted by samples."""

    def predict(node: int, features: tuple[int, ...]) -> float:
        left, right, column = tree.children_left[node], tree.children_right[node], tree.feature[node]
        if left < 0:
            return float(tree.value[node].item())
        if column in features:
            return predict(left if row[column] <= tree.threshold[node] else right, features)
        weight = tree.weighted_n_node_samples
        return float(weight[left] * predict(left, features) + weight[right] * predict(right, features)) / float(
            weight[node]
        )

    count = len(row)
    sets = [subset for size in range(count + 1) for subset in combinations(range(count), size)]
    worth = {subset: predict(0, subset) for subset in sets}
    values = np.zeros(count)
    for column, subset in product(range(count), sets):
        if column not in subset:
            share = factorial(len(subset)) * factorial(count - len(subset) - 1) / factorial(count)
            values[column] += share * (worth[tuple(sorted((*subset, column)))] - worth[subset])
    return values


@pytest.mark.parametrize(
    "published", [published for published in TABLE if published.title in AGREES], ids=lambda published: published.file
)
def test_the_published_consensus_is_reproduced(published: Published) -> None:
    path = PAPER / published.file
    if not path.exists():
        pytest.skip(f"the paper's scores are not at {path}: name their folder by MMQ_PAPER_DATA")
    consensus = consensus_of(path, "--score", published.score)
    assert consensus.keys() == published.shares.keys()
    for name, share in published.shares.items():
        assert consensus[name] == pytest.approx(share, abs=WITHIN), name
