"""What charts and plots draw, as coordinates: the SVG of the report's page, and artists of matplotlib."""

from typing import Any

import numpy as np
import pytest

from exporter.publishing.report import charts, plots
from exporter.study import study_plots
from exporter.study.importance import Importance, MarginalChange, Shares
from exporter.study.records import PlottedSetting, ScoredSetting
from exporter.study.score_table import Table

ROW = {"name": "vqa", "relative": {"change": -0.02, "low": -0.04, "high": 0.01}, "allowed": -0.05, "tone": "open"}
SAME = {"change": 0.0, "low": 0.0, "high": 0.0}
TICKS = "".join(f'<line class="tick" x1="{x}.00" y1="0.00" x2="{x}.00" y2="20.00"/>' for x in (0, 25, 50, 75, 100))
HEAD = '<svg class="{}" viewBox="0 0 {}" preserveAspectRatio="none" role="img" aria-label="{}">'


def test_the_chart_of_a_change_is_drawn_in_percent_of_its_axis() -> None:
    assert charts.change(ROW, (-0.10, 0.10)) == (
        HEAD.format("change", "100 20", "vqa: change -2.0%, interval -4.0% to +1.0%, the gate allows -5.0%")
        + '<rect class="forbidden" x="0.00" y="0.00" width="25.00" height="20.00"></rect>'
        + TICKS
        + '<line class="bound" x1="25.00" y1="0.00" x2="25.00" y2="20.00"/>'
        '<line class="zero" x1="50.00" y1="0.00" x2="50.00" y2="20.00"/>'
        '<rect class="interval open" x="30.00" y="7.00" width="25.00" height="6.00"></rect>'
        '<line class="mark" x1="40.00" y1="3.00" x2="40.00" y2="17.00"/></svg>'
    )
    assert charts.change(ROW | {"allowed": None, "relative": SAME}, (-0.10, 0.10)) == (
        HEAD.format("change", "100 20", "vqa: change +0.0%, interval +0.0% to +0.0%")
        + TICKS
        + '<line class="zero" x1="50.00" y1="0.00" x2="50.00" y2="20.00"/>'
        '<rect class="interval open" x="50.00" y="7.00" width="0.40" height="6.00"></rect>'
        '<line class="mark" x1="50.00" y1="3.00" x2="50.00" y2="17.00"/></svg>'
    )
    assert charts.change(ROW | {"relative": None}, (-0.10, 0.10)) == ""


def test_the_chart_of_blocks_has_room_for_eight() -> None:
    chart = charts.blocks([{"block": "a", "mean": 0.1, "largest": 0.4}, {"block": "b", "mean": 0.2, "largest": 0.2}])
    titles = [
        f"<title>{name}: mean {mean}, largest {most}</title>"
        for name, mean, most in (("a", "0.1000", "0.4000"), ("b", "0.2000", "0.2000"))
    ]
    assert chart == (
        HEAD.format("blocks", "80 100", "relative error of 2 blocks, largest 0.4000")
        + '<line class="tick" x1="0.00" y1="0.00" x2="80.00" y2="0.00"/>'
        '<line class="tick" x1="0.00" y1="50.00" x2="80.00" y2="50.00"/>'
        f'<rect class="quiet" x="1.00" y="0.00" width="8.00" height="100.00">{titles[0]}</rect>'
        f'<rect class="strong" x="1.00" y="75.00" width="8.00" height="25.00">{titles[0]}</rect>'
        f'<rect class="quiet" x="11.00" y="50.00" width="8.00" height="50.00">{titles[1]}</rect>'
        f'<rect class="strong" x="11.00" y="50.00" width="8.00" height="50.00">{titles[1]}</rect></svg>'
    )
    assert 'viewBox="0 0 90 100"' in charts.blocks([{"block": "a", "mean": 0.0, "largest": 0.0}] * 9)


def test_the_chart_of_sizes_has_a_bar_for_the_source_and_one_for_the_artifact() -> None:
    parts = {"vision": {"before": 80, "after": 20, "kept": 4}, "language": {"before": 100, "after": 125, "kept": 25}}
    whole, vision, language = charts.sizes(200, 50, parts)
    assert vision["chart"] == (
        HEAD.format("sizes", "100 20", "vision: the artifact takes 25% of the source&#39;s bytes")
        + '<rect class="quiet" x="0.00" y="1.00" width="64.00" height="8.00"><title>source 80 bytes</title></rect>'
        '<rect class="kept" x="0.00" y="11.00" width="3.20" height="8.00">'
        "<title>kept unchanged 4 bytes</title></rect>"
        '<rect class="strong" x="3.20" y="11.00" width="12.80" height="8.00"><title>artifact 20 bytes</title></rect>'
        "</svg>"
    )
    assert {key: value for key, value in whole.items() if key != "chart"} == {
        "name": "whole model",
        "before": 200,
        "after": 50,
        "kept": 29,
    }
    assert 'x="14.50" y="11.00" width="10.50"' in whole["chart"]
    assert 'x="20.00" y="11.00" width="80.00"' in language["chart"]
    assert "takes 0% of" in charts.sizes(0, 0, {})[0]["chart"]


def test_the_axis_reaches_all_intervals_and_bounds_and_two_percent_at_least() -> None:
    assert charts.reach([]) == pytest.approx((-0.02 - 0.004, 0.02 + 0.002))
    assert charts.reach([ROW, {"relative": None, "allowed": -0.2}]) == pytest.approx((-0.2 - 0.022, 0.02 + 0.011))
    wide = ROW | {"relative": {"change": 0.0, "low": -0.5, "high": 0.5}, "allowed": None}
    assert charts.reach([wide]) == pytest.approx((-0.6, 0.55))


@pytest.mark.parametrize(
    ("axis", "texts"),
    [
        ((-0.009, 0.009), ["-0.5", "0", "+0.5"]),
        ((-0.02, 0.02), ["-2", "-1", "0", "+1", "+2"]),
        ((-0.03, 0.03), ["-3", "-2", "-1", "0", "+1", "+2", "+3"]),
        ((-0.031, 0.03), ["-2", "0", "+2"]),
        ((-3, 4), ["-300", "-200", "-100", "0", "+100", "+200", "+300", "+400"]),
        ((-2e9, 1e9), ["-200000000000", "-100000000000", "0", "+100000000000"]),
    ],
)
def test_an_axis_has_marks_at_round_values(axis: tuple[float, float], texts: list[str]) -> None:
    assert [tick["text"].removesuffix(" %") for tick in charts.ticks(axis)] == texts


# matplotlib


@pytest.fixture
def figures(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, ...]]:
    """The arguments of every picture of a study: figure, file name, title, text."""
    pytest.importorskip("matplotlib")
    drawn: list[tuple[Any, ...]] = []
    monkeypatch.setattr(study_plots, "encode_figure", lambda *arguments: drawn.append(arguments))
    return drawn


def curves(axes: Any) -> list[list[tuple[float, float]]]:
    """The points of every line of some axes."""
    return [[(float(x), float(y)) for x, y in zip(*line.get_data(), strict=True)] for line in axes.lines]


def bars(axes: Any) -> list[tuple[float, float, float]]:
    """Center, width and height of every bar."""
    return [(p.get_x() + p.get_width() / 2, p.get_width(), p.get_height()) for p in axes.patches]


def words(labels: Any) -> list[str]:
    return [label.get_text() for label in labels]


def point(size: float, share: float, error: float | None = None) -> PlottedSetting:
    return PlottedSetting(size, share, (share - error, share + error) if error else None)


def test_a_pareto_plot_has_points_intervals_and_the_front(figures: list[tuple[Any, ...]]) -> None:
    series = {"grid": [point(4, 0.9, 0.05), point(2, 0.5), point(4, 0.8)], "choices": [point(3, 0.95)]}
    study_plots.pareto(series, {"paper": [point(8, 1.0)]}, "choices")
    (whole, name, _, about), (upper, upper_name, title, upper_about) = figures
    (axes,) = whole.axes
    assert [curve for curve in curves(axes) if max(y for _, y in curve) in (0.9, 0.95, 1.0)] == [
        [(2, 0.5), (4, 0.8), (4, 0.9)],
        [(3, 0.95)],
        [(8, 1.0)],
        [(2, 0.5), (3, 0.95)],
        [(0, 1.0), (1, 1.0)],  # full precision, across the whole width
    ]
    assert len({line.get_color() for line in axes.lines if line.get_marker() in ("o", "s", "^")}) == 3
    assert [(4.0, 0.8), (4.0, 0.85)] in [curve[1:] for curve in curves(axes)]  # the lower ends of the intervals
    assert [line.get_linestyle() for line in axes.lines if line.get_marker() in ("o", "s", "^")] == [
        "None",
        "-",
        "None",
    ]
    assert axes.get_xlabel() == "bits per weight of the whole artifact"
    assert axes.get_ylabel() == "share of the full-precision score"
    assert len(whole.legends) == len(upper.legends) == 1
    assert (name, upper_name, title) == ("pareto.png", "pareto-upper.png", "The same, above 90%")
    assert about.startswith("Pareto front: 50.0% at 2.00 bits per weight; 95.0% at 3.00 bits per weight; ")
    assert upper_about == "Scores from 90% on"
    assert upper.axes[0].get_ylim() == (0.9, 1.02)


def test_the_text_of_a_long_front_names_some_of_its_points(figures: list[tuple[Any, ...]]) -> None:
    study_plots.pareto({"grid": [point(i, i / 20) for i in range(1, 13)]}, {}, "")
    assert figures[0][3].count("bits per weight") == 6
    assert study_plots.share_text(point(4, 0.9, 0.05)) == "90.0% (85.0% to 95.0%) at 4.00 bits per weight"


def test_importance_is_a_bar_per_component_and_region(figures: list[tuple[Any, ...]]) -> None:
    shares = [
        Shares(consensus, {}, {}, {}, 1.0, 1.0, rows=40)
        for consensus in ({"vision": 70.4, "language": 30.0}, {"vision": 60.0})
    ]
    for inside in (shares[1], None):
        study_plots.importance_bars(Importance("score", 1.0, shares[0], {}, inside, {}), "gptq")
    (both, name, title, about), (alone, *_) = figures
    (axes,) = both.axes
    expected = [(-0.2, 70.4), (0.8, 30.0), (0.2, 60.0), (1.2, 0.0)]
    assert [(x, height) for x, _, height in bars(axes)] == [(pytest.approx(x), height) for x, height in expected]
    assert {round(width, 6) for _, width, _ in bars(axes)} == {0.38}
    assert words(axes.texts) == ["70 %", "30 %", "60 %", "0 %"]
    assert words(axes.get_xticklabels()) == ["vision", "language"]
    assert axes.get_ylim() == (0, 115)
    assert axes.get_ylabel() == "consensus importance, %"
    assert len(both.legends) == 1
    assert [round(x, 6) for x, *_ in bars(alone.axes[0])] == [0, 1]
    assert (name, title) == ("importance-gptq.png", "Importance of components for score, gptq")
    assert about == ("whole grid: vision 70 %, language 30 %; usable bits only: vision 60 %; from 40 settings")


def test_changes_per_bit_are_in_percent_with_errors(figures: list[tuple[Any, ...]]) -> None:
    marginal = {"vision": (MarginalChange(3, -0.2, 0.05, 2), MarginalChange(8, 0.01, 0.02, 2)), "qformer": ()}
    shares = Shares({}, {}, {}, {}, 1.0, 1.0, rows=40)
    study_plots.marginal_lines(Importance("score", 1.0, shares, {}, shares, marginal), "gptq")
    ((figure, name, _, about),) = figures
    (axes,) = figure.axes
    lines = curves(axes)
    assert [(3.0, -20.0), (8.0, 1.0)] in lines
    assert [(3.0, -25.0), (8.0, -1.0)] in lines
    assert lines[-1] == [(0, 0), (1, 0)]
    assert [float(tick) for tick in axes.get_xticks()] == [3, 8]
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("bits", "change of score, %")
    assert axes.get_legend() is not None
    assert name == "marginal-gptq.png"
    assert about.startswith("largest loss: vision -20.0% ± 5.0% (")


def alone(place: str, bits: int, kl: float) -> ScoredSetting:
    return ScoredSetting(f"{place}{bits}{kl}", "a", {"place": place, "bits": bits}, 1, 4.0, 0.1, 0.1, {"kl": kl})


def test_sensitivity_has_a_row_per_place_and_the_smallest_divergence(figures: list[tuple[Any, ...]]) -> None:
    settings = [alone("v0", 4, 0.5), alone("v0", 4, 0.2), alone("l0", 4, 0.8), alone("l0", 2, 3.0), alone("l1", 2, 0.0)]
    other = ScoredSetting("full", "a", {"name": "full"}, 1, 16.0, 0.1, 0.1, {"kl": 9.0})
    study_plots.sensitivity([*settings, other])
    study_plots.sensitivity(settings[:2])
    ((figure, name, _, about), (short, _, _, short_about)) = figures
    (axes,) = figure.axes
    assert curves(axes)[:2] == [[(3.0, 1), (1e-6, 2)], [(0.2, 0), (0.8, 1)]]
    assert words(axes.get_yticklabels()) == ["v0", "l0", "l1"]
    assert axes.get_xlim() == pytest.approx((5e-7, 6.0))
    assert axes.get_ylim() == (2.5, -0.5)
    assert len(axes.lines) == 3
    assert (axes.get_xscale(), axes.get_xlabel()) == ("log", "KL per token, quantized alone")
    assert len(figure.legends) == 1
    assert len(short.axes[0].lines) == 1
    assert short.get_size_inches()[1] == pytest.approx(1.4 + 0.24 * 4)
    assert name == "sensitivity.png"
    assert about == "largest at 2 bits: l0 3, l1 0; 1 values below 1e-06 are drawn at 1e-06"
    assert short_about == "largest at 4 bits: v0 0.2"


def test_a_heat_map_has_a_cell_per_pair_of_bits(figures: list[tuple[Any, ...]]) -> None:
    bits = np.array([[2, 4], [2, 8], [4, 4], [4, 8], [4, 8]])
    scores = np.array([0.1, 0.2, 0.3, 0.9, 0.7])
    study_plots.heat_maps(Table(("vision", "language"), bits.astype(float), scores, "score"), "gptq")
    ((figure, name, title, about),) = figures
    axes = figure.axes[0]
    assert words(axes.texts) == ["0.100", "0.200", "0.300", "0.800"]
    assert [text.get_color() for text in axes.texts] == ["white", "white", "white", "black"]
    assert [text.get_position() for text in axes.texts] == [(0, 0), (1, 0), (0, 1), (1, 1)]
    assert (words(axes.get_xticklabels()), words(axes.get_yticklabels())) == (["4", "8"], ["2", "4"])
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("language bits", "vision bits")
    assert (name, title) == ("heat-vision-language-gptq.png", "Score by bits, gptq")
    assert about == "score from 0.100 to 0.800 over vision and language bits"
    study_plots.heat_maps(Table(("vision", "language"), bits[:2].astype(float), scores[:2], "score"), "gptq")
    study_plots.heat_maps(Table(("vision", "language"), bits[[0, 2]].astype(float), scores[:2], "score"), "gptq")
    assert len(figures) == 1  # neither has two bit widths of both
    assert not any(spine.get_visible() for key, spine in axes.spines.items() if key in ("top", "right"))


def test_plots_of_a_report_have_its_figures() -> None:
    figure_class = pytest.importorskip("matplotlib.figure").Figure
    rows = [ROW, ROW | {"relative": None}, ROW | {"name": "captioning", "relative": SAME, "allowed": None}]
    content = {
        "name": "mine",
        "bytes": {"before": 2000, "after": 500},
        "scores": rows,
        "blocks": {"vision": [{"largest": 0.4, "mean": 0.2}, {"largest": 0.3, "mean": 0.1}], "language": []},
    }
    (axes,) = plots._size(figure_class, content).axes
    assert [patch.get_width() for patch in axes.patches] == [500, 2000]
    assert (words(axes.texts), axes.get_xlim(), list(axes.get_xticks())) == (["500 B", "2.0 kB"], (0, 2500), [])
    assert (words(axes.get_yticklabels()), axes.get_title(loc="left")) == (["artifact", "source"], "mine")
    (axes,) = plots._scores(figure_class, content).axes
    assert curves(axes) == [
        [(-4, 0), (1, 0)],
        [(-2, 0)],
        [(-5, -0.35), (-5, 0.35)],
        [(0, 1), (0, 1)],
        [(0, 1)],
        [(0, 0), (0, 1)],
    ]
    assert (words(axes.get_yticklabels()), axes.get_ylim()) == (["vqa", "captioning"], (1.5, -0.5))
    figure = plots._errors(figure_class, content)
    vision, language = figure.axes
    assert [height for *_, height in bars(vision)] == [0.4, 0.3, 0.2, 0.1]
    assert not bars(language)
    assert (vision.get_title(loc="left"), vision.get_ylabel(), vision.get_xlabel()) == (
        "vision",
        "relative error",
        "block",
    )
    assert words(figure.legends[0].get_texts()) == ["largest linear", "mean of the linears"]
    for each in (axes, vision):
        assert not each.spines["top"].get_visible()
