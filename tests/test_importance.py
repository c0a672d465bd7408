"""Shares of importance, marginal changes, and reading of tables."""

import csv
import json
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

from exporter.commands.main import cli
from exporter.errors import DataError
from exporter.study.importance import importance, linear_r2, marginal_changes, usable_bits
from exporter.study.score_table import Table, read_csv

BITS = (2, 3, 4, 8, 16)


def loss(bits: float) -> float:
    return 2.0 ** -float(bits)


def grid(vision: float, language: float) -> Table:
    """Additive scores with losses of `vision` and `language` times `2^-bits`, so that exact drops are known."""
    bits = np.array([(v, q) for v in BITS for q in BITS], dtype=np.float64)
    scores = np.array([1 - vision * loss(v) - language * loss(q) for v, q in bits])
    return Table(("vision", "language"), bits, scores, "score")


@pytest.fixture(autouse=True)
def fewer_trees(monkeypatch: pytest.MonkeyPatch) -> None:
    """Enough for shares to differ clearly."""
    monkeypatch.setattr("exporter.study.importance.TREES", 40)
    monkeypatch.setattr("exporter.study.importance.REPEATS", 10)


@pytest.fixture
def few_trees(monkeypatch: pytest.MonkeyPatch) -> None:
    """For tests of what no share decides."""
    monkeypatch.setattr("exporter.study.importance.TREES", 10)
    monkeypatch.setattr("exporter.study.importance.REPEATS", 3)


def test_shares_follow_the_effect_on_the_score_and_sum_to_100() -> None:
    shares = importance(grid(vision=0.5, language=2.0)).shares
    for shares_by_method in (shares.consensus, shares.forest, shares.permutation, shares.shap):
        assert sum(shares_by_method.values()) == pytest.approx(100, abs=0.02)
        assert shares_by_method["language"] > 3 * shares_by_method["vision"]
    swapped = importance(grid(vision=2.0, language=0.5)).shares
    assert swapped.consensus["vision"] == pytest.approx(shares.consensus["language"], abs=3)


def test_a_component_without_effect_has_no_share() -> None:
    assert importance(grid(vision=0.0, language=2.0)).shares.consensus["vision"] < 0.5


def test_shares_depend_on_the_bits_of_the_grid() -> None:
    """Marginal changes do not: language loses more at every bit width, but vision has the larger share."""
    whole = grid(vision=1.0, language=2.0)
    part = whole.where(whole.bits[:, 1] >= 4)
    assert importance(whole).shares.consensus["language"] > 70
    assert importance(part).shares.consensus["vision"] > 70
    assert marginal_changes(part, 1.0)["language"][0].change < marginal_changes(part, 1.0)["vision"][2].change


def test_marginal_changes_are_exact_for_an_additive_score() -> None:
    table = grid(vision=0.5, language=2.0)
    changes = marginal_changes(table, table.full_score())["language"]
    assert [change.bits for change in changes] == [2, 3, 4, 8]
    for change in changes:
        assert change.change == pytest.approx(-2.0 * (loss(change.bits) - loss(16)) / table.full_score())
        assert change.pairs == len(BITS)
        assert change.error == pytest.approx(0, abs=1e-9)


@pytest.mark.usefixtures("few_trees")
def test_usable_bits_keep_their_share_of_the_full_score() -> None:
    assert usable_bits(grid(vision=0.5, language=2.0), 0.8) == {"vision": (2, 3, 4, 8, 16), "language": (4, 8, 16)}
    assert importance(grid(vision=0.5, language=2.0)).usable["language"] == (4, 8, 16)


def test_a_linear_fit_explains_linear_scores_and_not_a_collapse() -> None:
    table = grid(0.5, 2.0)
    straight = Table(table.components, table.bits, table.bits @ np.array([1.0, 3.0]), "score")
    assert linear_r2(straight) == pytest.approx(1)
    assert linear_r2(table) < 0.7


def write(path: Path, columns: list[str], rows: list[list[object]]) -> Path:
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([columns, *rows])
    return path


def test_a_file_is_read_by_its_column_names(tmp_path: Path) -> None:
    rows: list[list[object]] = [[v, 16, q, 9.0, v + q, "a" if v < 4 else "b"] for v in (2, 4) for q in (3, 8)]
    columns = ["vit_bits", "qformer_bits", "llm_bits", "model_size", "CIDEr", "kind"]
    path = write(tmp_path / "grid.csv", columns, rows)
    table = read_csv(path)
    assert table.components == ("vision", "language")  # the Q-Former never changes
    assert table.metric == "CIDEr"
    assert table.scores.tolist() == [5, 10, 7, 12]
    assert table.full_score() == 12
    assert read_csv(path, "model_size").scores.tolist() == [9] * 4
    assert read_csv(path, conditions=["kind=a"]).bits[:, 0].tolist() == [3, 8]


def test_problems_of_a_file_are_errors(tmp_path: Path) -> None:
    path = write(tmp_path / "grid.csv", ["vit_bits", "llm_bits", "blue"], [[2, 3, 1], [4, 8, 2]])
    with pytest.raises(DataError, match="has no known column of a score"):
        read_csv(path)
    with pytest.raises(DataError, match="Did you mean 'blue'"):
        read_csv(path, "blu")
    with pytest.raises(DataError, match="2 rows with 2 different scores are too few"):
        importance(read_csv(path, "blue"))
    bad = write(tmp_path / "bad.csv", ["vit_bits", "acc"], [["x", 1], [4, ""]])
    with pytest.raises(DataError, match="row 1: vit_bits is 'x'; row 2: acc is ''"):
        read_csv(bad)
    with pytest.raises(DataError, match="no column COMPONENT_bits"):
        read_csv(write(tmp_path / "none.csv", ["acc"], [[1]]))


@pytest.mark.usefixtures("few_trees")
def test_few_rows_and_mixed_settings_give_notes(tmp_path: Path) -> None:
    columns = ["vision_bits", "language_bits", "acc", "method", "group_size"]
    rows: list[list[object]] = [[v, q, 1 - loss(v) - loss(q), "gptq", "row"] for v in BITS for q in BITS]
    whole = [*rows[:-1], [16, 16, 1.0, "none", "none"]]
    assert importance(read_csv(write(tmp_path / "one.csv", columns, whole))).notes == ()
    few = importance(read_csv(write(tmp_path / "few.csv", columns, rows[:10])))
    assert few.notes == ("only 10 settings: with fewer than 20, each setting changes the shares by many points",)
    rows[3][3], rows[4][4] = "awq", 32
    mixed = write(tmp_path / "mixed.csv", columns, rows)
    result = CliRunner().invoke(cli, ["study", "importance", str(mixed)])
    assert "note: settings of method gptq, awq are mixed: --where method=gptq selects one of them" in result.output
    assert "note: settings of group_size row, 32 are mixed" in result.output
    result_data = json.loads(CliRunner().invoke(cli, ["study", "importance", str(mixed), "--json"]).stdout)
    assert len(result_data["notes"]) == 2


@pytest.mark.usefixtures("few_trees")
def test_the_command_prints_the_consensus_first(tmp_path: Path) -> None:
    table = grid(0.5, 2.0)
    rows: list[list[object]] = [[*bits, score] for bits, score in zip(table.bits, table.scores, strict=True)]
    path = write(tmp_path / "grid.csv", ["vision_bits", "language_bits", "accuracy"], rows)
    result = CliRunner().invoke(cli, ["study", "importance", str(path), "--json"])
    assert result.exit_code == 0, result.output
    result_data = json.loads(result.stdout)
    assert next(iter(result_data)) == "consensus"
    assert result_data["consensus"] == importance(table).shares.consensus
    text = CliRunner().invoke(cli, ["study", "importance", str(path)])
    assert "consensus" in text.output
    wrong = CliRunner().invoke(cli, ["study", "importance", str(path), "--score", "x"])
    assert wrong.exit_code == 1
    assert "Traceback" not in wrong.output
