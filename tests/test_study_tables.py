"""Rows and tables of studies, and files that are none: intervals, changes, columns, and errors."""

import dataclasses
import math
from pathlib import Path

import pytest

from exporter.errors import DataError, RecipeError
from exporter.study import prepare, result_tables, setting_rows, verdict
from exporter.study.grid import read_grid
from exporter.study.records import (
    CHANGE,
    CHANGE_ERROR,
    ERROR,
    FILE,
    SAMPLES,
    Records,
    ScoredSetting,
    read_records,
)
from exporter.study.score_table import read_csv


def scored(score: float, *, method: str = "rtn", **scores: float) -> ScoredSetting:
    about: dict[str, str | int] = {"vision_bits": 4, "method": method, "blocks": "all", "role": "all"}
    return ScoredSetting(f"{method} {score}", "exam", about, 1000, 4.5, 0.0, 0.0, {"score": score, **scores})


def test_a_score_beyond_0_to_1_has_an_interval_of_standard_errors() -> None:
    assert setting_rows.score_interval(2.0, 0.5, 8) == (2.0 - 0.98, 2.0 + 0.98)
    assert setting_rows.score_interval(-1.0, 0.5, 8) == pytest.approx((-1.98, -0.02))


@pytest.mark.parametrize(("score", "error", "samples"), [(0.5, 0.0625, 64), (0.25, 0.125, 12), (1.0, 0.0, 8)])
def test_the_interval_of_a_share_is_wilson_s(score: float, error: float, samples: int) -> None:
    """Wilson's interval holds the shares p whose z-test against the score does not reject."""
    low, high = setting_rows.score_interval(score, error, samples)
    count = score * (1 - score) / error**2 if error else samples
    for end in (low, high):
        if 0 < end < 1:
            assert abs(score - end) == pytest.approx(1.96 * math.sqrt(end * (1 - end) / count))
    assert 0 <= low < high <= 1


def test_changes_of_studies_without_errors_have_no_interval() -> None:
    full, half = scored(0.8, method="none"), scored(0.4)
    rows = setting_rows.rows_of([full, half])
    assert [(row.full, row.change, row.change_interval, row.interval) for row in rows] == [
        (True, 0.0, None, None),
        (False, pytest.approx(-0.5), None, None),
    ]
    assert [result_tables._change_text(row) for row in rows] == ["reference", "-50.0%"]
    (alone,) = setting_rows.rows_of([half])
    assert (alone.change, result_tables._change_text(alone), alone.plotted()) == (None, "", None)
    assert verdict.verdict([alone]) == verdict.verdict(rows[:1]) == ""


def test_the_difference_to_a_reference_is_paired_where_the_records_have_it() -> None:
    errors = {ERROR: 0.03, SAMPLES: 100.0}
    full = scored(0.8, method="none", **{ERROR: 0.04, SAMPLES: 100.0})
    paired = scored(0.7, **errors, **{CHANGE: -0.1, CHANGE_ERROR: 0.02})
    apart = scored(0.7, **errors)
    for setting, error in ((paired, 0.02), (apart, 0.05)):
        difference = setting_rows._difference(setting, full, 0.8)
        assert difference is not None
        assert (difference.before, difference.after) == (0.8, 0.7)
        assert difference.change == pytest.approx(-0.1)
        assert (difference.low, difference.high) == (
            pytest.approx(-0.1 - 1.96 * error),
            pytest.approx(-0.1 + 1.96 * error),
        )
    assert setting_rows._difference(apart, None, 0.8) is None


def test_a_file_that_is_no_database_or_no_study_is_an_error(tmp_path: Path) -> None:
    (tmp_path / FILE).write_text("no database" * 100)
    with pytest.raises(DataError, match="is not a study's database"):
        read_records(tmp_path)
    with pytest.raises(DataError, match=f"contains no {FILE}"):
        read_records(tmp_path / "empty")


def test_a_failing_database_is_an_error_with_a_hint(tmp_path: Path) -> None:
    with Records(tmp_path / FILE) as records:
        records.add(scored(0.5))
        records._db.execute("UPDATE points SET about = 'no json'")
        with pytest.raises(DataError, match="cannot be used") as caught:
            records.all()
        assert "free some disk space" in (caught.value.hint or "")


def test_a_grid_is_a_readable_mapping(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="cannot be read"):
        read_grid(tmp_path / "none.yaml")
    (tmp_path / "list.yaml").write_text("- 1\n")
    with pytest.raises(RecipeError, match="expected a mapping with keys components"):
        read_grid(tmp_path / "list.yaml")
    (tmp_path / "grid.yaml").write_text("components: {vision: {bits: [3, 4]}}\nmethods: [rtn]\n")
    assert read_grid(tmp_path / "grid.yaml").components["vision"].bits == (3, 4)


def test_a_model_s_study_has_its_own_folder() -> None:
    assert prepare.default_folder("demo-llava") == Path("studies/demo-llava")
    assert prepare.default_folder("/models/mine") == prepare.default_folder("org/mine") == Path("studies/mine")


def test_a_table_without_positive_scores_or_an_unreadable_one_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "t.csv"
    with pytest.raises(DataError, match="cannot be read"):
        read_csv(path)
    path.write_text("vision_bits,score\n4,0\n16,0\n")
    with pytest.raises(DataError, match="the full-precision score is 0"):
        read_csv(path)
    path.write_text("vision_bits,score\n4,x\n16,inf\n")
    with pytest.raises(DataError, match="row 1: score is 'x'; row 2: score is 'inf'"):
        read_csv(path)
    path.write_text("vision_bits,score\n4,0.5\n4,0.25\n")
    with pytest.raises(DataError, match="the bits of no component change"):
        read_csv(path)
    path.write_text("vision,score\n")
    with pytest.raises(DataError, match="has no column COMPONENT_bits"):
        read_csv(path)
    path.write_text("vision_bits,score\n,\n")
    with pytest.raises(DataError, match="has no rows"):
        read_csv(path)
    path.write_text("vision_bits,other\n4,1\n")
    with pytest.raises(DataError, match="no known column of a score") as caught:
        read_csv(path)
    assert caught.value.hint == "choose one with --score: other"


def test_columns_have_their_short_names_and_constant_ones_are_left_out(tmp_path: Path) -> None:
    path = tmp_path / "t.csv"
    path.write_text("vit_bits,projector_bits,llm_bits,CIDEr,Score,method\n4,16,3,1,0.5,rtn\n8,16,4,1,0.75,gptq\n")
    table = read_csv(path)
    assert (table.components, table.metric) == (("vision", "language"), "Score")
    assert table.bits.tolist() == [[4, 3], [8, 4]]
    assert table.full_score() == 0.75
    assert table.notes == ("settings of method rtn, gptq are mixed: --where method=rtn selects one of them",)
    assert dataclasses.replace(table, full=0.9).full_score() == 0.9
    crossed = dataclasses.replace(table, bits=table.bits[:, :1] * [[1, -1]])
    assert crossed.full_score() == 0.75  # no row has the most bits of every component
