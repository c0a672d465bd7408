"""Rows and tables of studies, and files that are none: intervals, changes, columns, and errors."""

import dataclasses
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from exporter.errors import DataError, RecipeError
from exporter.study import gallery, importance, prepare, result_tables, setting_rows, verdict
from exporter.study.grid import read_grid
from exporter.study.records import (
    CHANGE,
    CHANGE_ERROR,
    ERROR,
    FILE,
    SAMPLES,
    Records,
    ScoredSetting,
    full_outside_grid,
    read_records,
)
from exporter.study.score_table import Table, read_csv, require_gain
from exporter.study.study_plots import Plot


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
    assert [result_tables.change_text(row) for row in rows] == ["reference", "-50.0%"]
    (alone,) = setting_rows.rows_of([half])
    assert (alone.change, result_tables.change_text(alone), alone.plotted()) == (None, "", None)
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


# What the plots of a folder show


def grid_setting(bits: int, score: float, exam: str = "a", **about: str | int) -> ScoredSetting:
    fields: dict[str, str | int] = {"vision_bits": bits, "blocks": "all", "role": "all", "sequential": 0}
    fields |= {"method": "none" if bits == 16 else "gptq"} | about
    name = f"{exam} {bits} {sorted(about.items())}"
    return ScoredSetting(name, exam, fields, 1000 * bits, float(bits), 0.0, 0.0, {"score": score, "kl": 1 - score})


def test_series_are_relative_to_the_full_precision_model_of_their_exam() -> None:
    settings = [
        grid_setting(16, 0.8),
        grid_setting(4, 0.4),
        grid_setting(4, 0.6, method="rtn", group_size="128"),
        grid_setting(16, 0.5, "b", sequential=1),
        grid_setting(4, 0.25, "b", sequential=1),
        grid_setting(16, 1.0, "c", name="full"),
        grid_setting(4, 0.75, "c", name="choice 1"),
        grid_setting(4, 0.5, "c", name="by hand"),
        grid_setting(4, 0.5, "d"),  # without a reference
    ]
    series = gallery._series(settings, "score")
    assert {name: [(point.bits_per_weight, point.share) for point in points] for name, points in series.items()} == {
        "grid, gptq": [(4.0, 0.5)],
        "grid, rtn-g128": [(4.0, pytest.approx(0.75))],
        "grid, gptq-sequential": [(4.0, 0.5)],
        "mmq allocate": [(4.0, 0.75)],
        "hand-written recipes": [(4.0, 0.5)],
    }
    assert gallery._series(settings, "accuracy") == {}


def test_every_kind_of_quantization_has_a_table_with_its_own_reference() -> None:
    settings = [
        grid_setting(16, 0.8),
        *(grid_setting(bits, bits / 20) for bits in (4, 8)),
        grid_setting(4, 0.1, method="rtn"),
        grid_setting(8, 0.1, method="rtn"),
        grid_setting(2, 0.1, blocks="front"),
        grid_setting(16, 0.9, sequential=1),
        grid_setting(3, 0.3, sequential=1),
        grid_setting(4, 0.3, method="awq"),
    ]
    tables = gallery._tables(settings, "score")
    assert [(kind, table.bits.ravel().tolist(), table.full_score()) for kind, table in tables] == [
        ("gptq", [4, 8], 0.8),
        ("rtn", [4, 8], 0.8),
    ]


def test_a_score_must_exist_and_rise_with_quality() -> None:
    settings = [grid_setting(4, 0.5)]
    gallery._require_score(settings, "score")
    gallery._require_score([], "anything")
    with pytest.raises(DataError, match=r"no setting has a score 'scor'\. Did you mean 'score'") as caught:
        gallery._require_score(settings, "scor")
    assert caught.value.hint == "the scores are score, kl"
    for score in ("kl", "vqa KL", "nll"):
        with pytest.raises(DataError, match="lower values"):
            require_gain(score)
    require_gain("")


def test_points_of_a_paper_are_shares_of_its_best_setting(tmp_path: Path) -> None:
    path = tmp_path / "paper.csv"
    path.write_text("vision_bits,bpw,score\n4,4.5,0.4\n16,16,0.8\n")
    points = [(point.bits_per_weight, point.share) for point in gallery.paper_points(path)]
    assert points == [(4.5, 0.5), (16.0, 1.0)]
    path.write_text("vision_bits,bpw,score\n4,,0.4\n16,16,0.8\n")
    with pytest.raises(DataError, match="has no column bpw"):
        gallery.paper_points(path)


def test_only_settings_of_the_last_exam_of_each_grid_are_shown(tmp_path: Path) -> None:
    with Records(tmp_path / FILE) as records:
        for setting in (
            grid_setting(4, 0.1, "old"),
            grid_setting(4, 0.2, "sequential", sequential=1),
            grid_setting(4, 0.3, "new"),
            grid_setting(8, 0.4, "new"),
        ):
            records.add(setting)
    assert [setting.scores["score"] for setting in gallery.read_grids(tmp_path)] == [0.3, 0.4, 0.2]
    assert gallery.components_of(tmp_path) == {"vision"}
    assert gallery.read_allocations(tmp_path) == gallery.read_grids(tmp_path / "none") == []
    assert gallery.components_of(tmp_path / "none") == set()


def test_plots_are_written_below_their_names(tmp_path: Path) -> None:
    plots = [Plot(name, "", "", name.encode()) for name in ("a.png", "b.png")]
    assert gallery.write_plots(plots, tmp_path / "new") == [tmp_path / "new" / name for name in ("a.png", "b.png")]
    assert (tmp_path / "new" / "b.png").read_bytes() == b"b.png"


def test_importance_that_cannot_be_computed_is_a_note(monkeypatch: pytest.MonkeyPatch) -> None:
    notes: list[str] = []
    table: Any = "table"

    def fails(table: str) -> None:
        raise DataError("too few rows", "measure more") if table == "table" else DataError("no reason")

    monkeypatch.setattr(gallery, "need_forest", lambda: None)
    monkeypatch.setattr(gallery, "importance", fails)
    assert gallery._importance(table, "gptq", notes.append) == []
    assert gallery._importance("other", "rtn", notes.append) == []  # type: ignore[arg-type]
    assert notes == [
        "no plot of importance for gptq: too few rows (measure more)",
        "no plot of importance for rtn: no reason",
    ]
    monkeypatch.setattr(gallery, "importance", lambda table: SimpleNamespace(notes=("few rows",)))
    for name in ("importance_bars", "marginal_lines"):
        monkeypatch.setattr(gallery.study_plots, name, lambda result, label, name=name: f"{name} {label}")
    assert gallery._importance(table, "gptq", notes.append) == ["importance_bars gptq", "marginal_lines gptq"]
    assert notes[2:] == ["gptq: few rows"]


@pytest.mark.parametrize(
    ("about", "is_alone"),
    [
        ([{"vision_bits": 4, "language_bits": 4}], True),
        ([{"vision_bits": 4, "language_bits": 16}], True),  # language is not varied
        ([{"vision_bits": 4, "language_bits": 16}, {"vision_bits": 4, "language_bits": 8}], False),
        ([{"vision_bits": 16, "language_bits": 4}, {"vision_bits": 4, "language_bits": 4}], False),
        ([], False),
    ],
)
def test_the_full_precision_model_is_outside_a_grid_without_16_bits(about: list[Any], is_alone: bool) -> None:
    full = grid_setting(16, 0.8, language_bits=16)
    others = [grid_setting(4, 0.5, **{**fields, "method": "rtn"}) for fields in about]
    assert full_outside_grid([*others, full]) == (full if is_alone else None)
    assert full_outside_grid(others) is None


# Importance without its forests


def table_of(rows: dict[tuple[int, int], float], **fields: Any) -> Table:
    """A table of vision and language bits -> score."""
    bits = np.array(list(rows), dtype=np.float64)
    return Table(("vision", "language"), bits, np.array(list(rows.values())), "score", **fields)


@pytest.fixture
def shared(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The tables and seeds of which shares are computed."""
    calls: list[Any] = []
    monkeypatch.setattr(importance, "shares", lambda table, seed: calls.append((len(table.scores), seed)) or "shares")
    return calls


GRID = {(v, q): 1 - 0.01 * (16 - v) - 0.02 * (16 - q) for v in (2, 4, 16) for q in (2, 4, 16)}


def test_the_usable_region_has_shares_where_it_has_enough_settings(shared: list[Any]) -> None:
    result = importance.importance(table_of(GRID, notes=("mixed",)), seed=3, usable=0.5)
    assert (shared, result.inside) == ([(9, 3), (9, 3)], "shares")
    assert result.full_score == 1.0
    assert result.notes == (
        "only 9 settings: with fewer than 20, each setting changes the shares by many points",
        "mixed",
    )
    assert result.usable == {"vision": (2.0, 4.0, 16.0), "language": (2.0, 4.0, 16.0)}
    some = importance.importance(table_of(GRID), usable=0.75)
    assert some.usable == {"vision": (2.0, 4.0, 16.0), "language": (4.0, 16.0)}
    assert (shared[2:], some.inside) == ([(9, 0)], None)  # six settings are too few
    assert [change.bits for change in some.marginal["language"]] == [4.0]
    assert importance.importance(table_of(GRID), usable=0.72).usable["language"] == (2.0, 4.0, 16.0)  # exactly
    assert importance._few_rows_note(20) == ()


def test_few_or_equal_scores_have_no_importance(shared: list[Any]) -> None:
    seven = dict(list(GRID.items())[:7])
    with pytest.raises(DataError, match="7 rows with 7 different scores are too few"):
        importance.importance(table_of(seven))
    with pytest.raises(DataError, match="9 rows with 1 different scores are too few"):
        importance.importance(table_of(dict.fromkeys(GRID, 0.5)))
    importance.importance(table_of(dict(list(GRID.items())[:8])))
    assert shared[0] == (8, 0)


def test_marginal_changes_pair_settings_with_equal_other_bits() -> None:
    rows = {(4, 4): 0.5, (16, 4): 0.75, (4, 16): 0.75, (16, 16): 1.5, (8, 16): 1.0, (8, 2): 0.1}
    changes = importance.marginal_changes(table_of(rows), 2.0)
    vision, language = changes["vision"], changes["language"]
    assert [(change.bits, change.change, change.pairs) for change in vision] == [(4, -0.25, 2), (8, -0.25, 1)]
    assert (vision[0].error, vision[1].error) == (pytest.approx(0.125), 0.0)
    assert [(change.bits, change.pairs) for change in language] == [(2, 1), (4, 2)]


def test_percentages_ignore_features_that_only_harm() -> None:
    assert importance._percent(np.array([3.0, -1.0, 1.0])).tolist() == [75.0, 0.0, 25.0]
    assert importance._percent(np.array([0.0, -1.0])).tolist() == [0.0, 0.0]
    assert importance._by_component(table_of(GRID), np.array([1.23456, 2.0])) == {"vision": 1.23, "language": 2.0}


def test_a_linear_fit_explains_a_linear_score() -> None:
    assert importance.linear_r2(table_of(GRID)) == pytest.approx(1.0)
    crossed = {(4, 4): 1.0, (16, 16): 1.0, (4, 16): 0.0, (16, 4): 0.0}
    assert importance.linear_r2(table_of(crossed)) == pytest.approx(0.0)


def test_importance_in_json_begins_with_the_consensus() -> None:
    by_component = {"vision": 70.0}
    result = importance.Importance(
        "score",
        0.9,
        importance.Shares(by_component, by_component, by_component, by_component, 0.99, 0.5, 40),
        {"vision": (4.0,)},
        None,
        {"vision": (importance.MarginalChange(4.0, -0.1, 0.01, 3),)},
        ("a note",),
    )
    plain = result.as_json()
    assert next(iter(plain)) == "consensus"
    assert (plain["metric"], plain["full_score"], plain["notes"], plain["rows"]) == ("score", 0.9, ["a note"], 40)
    assert plain["usable"] == {
        "bits": {"vision": (4.0,)},
        "shares": None,
        "marginal_change": {"vision": [{"bits": 4.0, "change": -0.1, "error": 0.01, "pairs": 3}]},
    }
    inside = dataclasses.replace(result, inside=result.shares).as_json()["usable"]["shares"]
    assert inside["rows"] == 40
