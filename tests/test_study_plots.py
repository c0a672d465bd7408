"""Plots of studies: their content, their PNG files, and the page with all of them."""

import base64
import json
import re
import sys
from collections.abc import Mapping
from dataclasses import replace
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from PIL import Image

from exporter.commands.main import cli
from exporter.errors import DataError
from exporter.study import gallery, study_plots
from exporter.study.gallery import components_of, gather, paper_points, table_rows
from exporter.study.records import (
    CHANGE,
    CHANGE_ERROR,
    ERROR,
    FILE,
    SAMPLES,
    PlottedSetting,
    Records,
    ScoredSetting,
    as_csv,
)
from exporter.study.score_table import Table, read_table
from exporter.study.study_page import write_page
from tests.browser import Browser
from tests.page_audit import WIDTHS, audit
from tests.slow import some_of

BITS = (2, 3, 4, 8, 16)


@pytest.fixture(autouse=True)
def few_trees(monkeypatch: pytest.MonkeyPatch) -> None:
    """No test here depends on the shares of importance."""
    monkeypatch.setattr("exporter.study.importance.TREES", 10)
    monkeypatch.setattr("exporter.study.importance.REPEATS", 3)


def measured(number: int, exam: str, score: float, size: float, **about: str | int) -> ScoredSetting:
    scores = {"score": score, "kl": 1.01 - score}
    return ScoredSetting(f"{exam}-{number}", exam, about, int(1000 * size), size, 0.1, 0.1, scores)


def grid_in(folder: Path) -> None:
    with Records(folder / FILE) as records:
        for i, (v, q) in enumerate((v, q) for v in BITS for q in BITS):
            score = 1 - 0.5 * 2.0**-v - 2 * 2.0**-q
            kind = "none" if v == q == 16 else "gptq"
            about: dict[str, str | int] = {"vision_bits": v, "language_bits": q, "method": kind}
            about |= {"blocks": "all", "role": "all", "sequential": 0}
            records.add(measured(i, "grid", score, (v + q) / 2, **about))


def choices_in(folder: Path) -> None:
    with Records(folder / "allocate-front.sqlite") as records:
        records.add(measured(0, "f", 0.9, 16.0, name="full"))
        records.add(measured(1, "f", 0.8, 4.0, name="choice 1"))
        records.add(measured(2, "f", 0.7, 5.0, name="by hand"))
    with Records(folder / "allocate.sqlite") as records:
        for i, place in enumerate(("vision 0 mlp", "language 0 attention")):
            records.add(measured(i, "a", 0.9, 15.0, place=place, scheme="W4 g128", bits=4))


def test_gather_returns_every_plot_that_the_folder_has_data_for(tmp_path: Path) -> None:
    grid_in(tmp_path)
    names = {picture.name for picture in gather(tmp_path)}
    assert names == {
        "heat-vision-language-gptq.png",
        "importance-gptq.png",
        "marginal-gptq.png",
        "pareto.png",
        "pareto-upper.png",
    }
    choices_in(tmp_path)
    plots = gather(tmp_path)
    assert {picture.name for picture in plots} == names | {"sensitivity.png"}
    for picture in plots:
        image = Image.open(BytesIO(picture.png))
        assert image.format == "PNG"
        assert min(image.size) > 200
        assert len(np.unique(np.asarray(image.convert("L")))) > 20  # something is drawn
        assert picture.about
    with pytest.raises(DataError, match="contains no study"):
        gather(tmp_path / "empty")


def test_every_kind_of_quantization_has_separate_plots(tmp_path: Path) -> None:
    """Plots identify settings by bits, so group sizes, methods and zero points must not share a map or a series."""
    kinds_of_settings: list[dict[str, str | int]] = [{"group_size": "row"}, {"group_size": "32"}, {"method": "rtn"}]
    kinds_of_settings += [{"group_size": "32", "zero_points": "yes"}]
    with Records(tmp_path / FILE) as records:
        for number, kind_of_setting in enumerate(kinds_of_settings):
            for v, q in ((v, q) for v in (3, 16) for q in (3, 16)):
                kind = "none" if v == q == 16 else "gptq"
                plain: dict[str, str | int] = {"vision_bits": v, "language_bits": q, "blocks": "all", "role": "all"}
                about = plain | {"method": kind} | (kind_of_setting if kind != "none" else {})
                loss = 0.0 if kind == "none" else 0.1 * (number + 1)
                records.add(measured(100 * number + v * 16 + q, "grid", 1 - loss, (v + q) / 2, **about))
    about_by_name = {picture.name: picture.about for picture in gather(tmp_path)}
    kinds = ("gptq-row", "gptq-g32", "rtn", "gptq-g32-zero-points")
    assert set(about_by_name) == {
        "pareto.png",
        "pareto-upper.png",
        *(f"heat-vision-language-{kind}.png" for kind in kinds),
    }
    for number, kind in enumerate(kinds):
        assert f"from {0.9 - 0.1 * number:.3f} to 1.000" in about_by_name[f"heat-vision-language-{kind}.png"]


def test_a_note_explains_missing_plots(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    grid_in(tmp_path)
    monkeypatch.setitem(sys.modules, "shap", None)
    result = CliRunner().invoke(cli, ["study", "plots", str(tmp_path), "--json"])
    assert result.exit_code == 0, result.output
    result_data = json.loads(result.stdout)
    assert "importance needs scikit-learn and shap (pip install" in result_data["notes"][0]
    assert not any("importance" in file for file in result_data["files"])
    assert "note: no plot of importance for gptq" in CliRunner().invoke(cli, ["study", "plots", str(tmp_path)]).output


def test_an_unwritable_folder_is_an_error_before_drawing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    grid_in(tmp_path)
    monkeypatch.setattr(gallery, "gather", lambda *arguments: pytest.fail("drawn"))
    (tmp_path / "file").write_text("")
    result = CliRunner().invoke(cli, ["study", "plots", str(tmp_path), "--out", str(tmp_path / "file" / "plots")])
    assert result.exit_code == 1
    assert "write failed" in result.stderr


def test_the_text_counts_values_below_the_axis(tmp_path: Path) -> None:
    tiny = [measured(i, "a", 1.01 - kl, 15.0, place=f"vision {i}", bits=4) for i, kl in enumerate((0.1, 1e-9))]
    assert study_plots.sensitivity(tiny).about.endswith("; 1 values below 1e-06 are drawn at 1e-06")
    assert "below" not in study_plots.sensitivity(tiny[:1]).about


def test_the_front_omits_dominated_points() -> None:
    points = [PlottedSetting(*xy) for xy in [(4.0, 0.9), (5.0, 0.8), (3.0, 0.2), (4.0, 0.7), (8.0, 1.0)]]
    assert study_plots.front(points) == [PlottedSetting(3.0, 0.2), PlottedSetting(4.0, 0.9), PlottedSetting(8.0, 1.0)]


def test_a_heat_map_shows_each_pair_with_other_components_at_full_precision() -> None:
    bits = np.array([(v, q, s) for v in (4, 16) for q in (4, 16) for s in (4, 16)], dtype=np.float64)
    table = Table(("vision", "qformer", "language"), bits, bits.sum(1), "score")
    maps = study_plots.heat_maps(table, "rtn")
    assert [picture.name for picture in maps] == [
        "heat-vision-qformer-rtn.png",
        "heat-vision-language-rtn.png",
        "heat-qformer-language-rtn.png",
    ]
    assert maps[0].about == "score from 24.000 to 48.000 over vision and qformer bits"  # language stays at 16


def test_points_of_a_paper_are_shares_of_its_full_score(tmp_path: Path) -> None:
    path = tmp_path / "paper.csv"
    path.write_text("vision_bits,language_bits,acc,bpw\n4,4,60,4.5\n16,16,61,16\n2,4,30,4.4\n")
    assert paper_points(path) == [PlottedSetting(4.5, 60 / 61), PlottedSetting(16, 1), PlottedSetting(4.4, 30 / 61)]
    path.write_text("vision_bits,language_bits,acc\n4,4,60\n16,16,61\n")
    with pytest.raises(DataError, match="no column bpw"):
        paper_points(path)


def test_the_page_is_self_contained(tmp_path: Path) -> None:
    folder = tmp_path / "a <b>"
    grid_in(folder)
    plots = gather(folder)
    page = write_page(plots, table_rows(folder), folder.name, tmp_path / "page.html").read_text()
    assert "a &lt;b&gt;" in page
    images = re.findall(r'src="data:image/png;base64,([^"]+)" alt="[^"]+"', page)
    assert [base64.b64decode(encoded) for encoded in images] == [picture.png for picture in plots]
    assert not re.search(r"<script|https?://", page)


def page_of(folder: Path) -> Path:
    """The page of a study's folder."""
    return write_page(gather(folder), table_rows(folder), folder.name, folder / "page.html")


def small_study_in(folder: Path, scores: Mapping[int, float], samples: int = 250) -> None:
    """Settings of one component by bits, with standard errors of 0.02 and of 0.01 for changes from 16 bits."""
    with Records(folder / FILE) as records:
        for number, (bits, score) in enumerate(scores.items()):
            about: dict[str, str | int] = {"vision_bits": bits, "method": "rtn" if bits < 16 else "none"}
            setting = measured(number, "grid", score, float(bits), blocks="all", role="all", sequential=0, **about)
            certainty = {ERROR: 0.02, SAMPLES: float(samples)}
            changes = {CHANGE: score - scores[16], CHANGE_ERROR: 0.01 if bits < 16 else 0.0} if 16 in scores else {}
            records.add(replace(setting, scores={**setting.scores, **certainty, **changes}))


def cells(chromium: Browser, page: Path, width: int) -> list[list[str]]:
    """The texts of the rows of the first table."""
    chromium.show(page, width, 900)
    script = """return [...document.querySelector('table').tBodies[0].rows].map(
        row => [...row.cells].map(cell => cell.innerText.replace(/\\s+/g, ' ').trim()))"""
    return list(chromium.run(script))


def test_the_page_has_a_row_for_every_setting(tmp_path: Path, chromium: Browser) -> None:
    """Setting, method, size, bits per weight, score, change = setting - full, samples; intervals beside both."""
    small_study_in(tmp_path, {16: 0.8, 8: 0.796, 4: 0.6})
    assert cells(chromium, page_of(tmp_path), max(WIDTHS)) == [
        ["vision 4 bits *", "rtn", "4.0 kB", "4.00", "0.600 (0.560 to 0.638)", "-25.0 % (-27.5 to -22.6 %)", "250"],
        ["vision 8 bits *", "rtn", "8.0 kB", "8.00", "0.796 (0.754 to 0.832)", "-0.5 % (-3.0 to +1.9 %)", "250"],
        ["full precision", "none", "16.0 kB", "16.00", "0.800 (0.758 to 0.836)", "reference", "250"],
    ]


@pytest.mark.parametrize(
    ("scores", "samples", "words"),
    [
        pytest.param(
            {16: 0.8, 8: 0.796, 4: 0.6},
            250,
            "2 settings were measured with 250 samples; the smallest whose 95 % interval holds the full-precision "
            "score is vision 8 bits by rtn: 8.0 kB, 8.00 bits per weight, change -0.5 % (-3.0 to +1.9 %).",
            id="found",
        ),
        pytest.param(
            {16: 0.8, 8: 0.796},
            20,
            "1 setting was measured with 20 samples, which cannot tell how small the model may become: the smallest "
            "setting whose 95 % interval holds the full-precision score is vision 8 bits by rtn: 8.0 kB, 8.00 bits per "
            "weight, change -0.5 % (-21.1 to +1.9 %); 5 times the samples would narrow it to 5 %.",
            id="cannot tell",
        ),
        pytest.param(
            {16: 0.8, 8: 0.7, 4: 0.6},
            250,
            "2 settings were measured with 250 samples; each loses score beyond its 95 % interval, the least vision 8 "
            "bits by rtn: 8.0 kB, 8.00 bits per weight, change -12.5 % (-15.0 to -10.1 %).",
            id="each loses",
        ),
    ],
)
def test_the_page_begins_with_a_verdict(tmp_path: Path, scores: dict[int, float], samples: int, words: str) -> None:
    small_study_in(tmp_path, scores, samples)
    assert words == re.findall('<p class="headline">(.*?)</p>', page_of(tmp_path).read_text())[0]


def test_without_numbers_of_samples_the_page_says_so(tmp_path: Path) -> None:
    grid_in(tmp_path)
    page = page_of(tmp_path).read_text()
    assert "24 settings were measured; the smallest that keeps 99 % of the score is" in page
    assert "No intervals" in page
    assert '<a href="#all">All 25 settings</a>' in page


def test_importance_measures_against_a_reference_outside_the_grid(tmp_path: Path) -> None:
    small_study_in(tmp_path, {16: 0.8, 8: 0.796, 4: 0.6})
    table = read_table(tmp_path)
    assert sorted(table.bits.ravel()) == [4, 8]
    assert table.full_score() == 0.8


def test_a_large_study_shows_its_front_the_verdict_s_setting_and_the_reference_first(
    tmp_path: Path, chromium: Browser
) -> None:
    """Every setting is there in three sizes; one outside the front has an interval that holds the reference."""
    small_study_in(tmp_path, {16: 0.9, **{bits: 0.5 + bits / 100 for bits in range(2, 8)}})
    rows = [replace(row, bytes=row.bytes + n) for row in table_rows(tmp_path) for n in range(3)]
    holding = replace(rows[-4], name="holding", bytes=9000, change_interval=(-0.1, 0.1))
    page = write_page([], [*rows, holding], "x", tmp_path / "page.html")
    names = [row[0] for row in cells(chromium, page, max(WIDTHS))]
    assert names == [
        *(f"vision {bits} bits *" for bits in range(2, 8)),
        "full precision",
        "full precision",
        "full precision",
        "holding",
    ]


def test_a_study_without_its_reference_still_has_a_page(tmp_path: Path) -> None:
    small_study_in(tmp_path, {8: 0.796})
    page = page_of(tmp_path).read_text()
    assert "unknown" in page
    assert 'class="headline"' not in page


VIEWS = {f"{width} {name}": (width, name == "dark") for width in WIDTHS for name in ("light", "dark")}


@pytest.mark.parametrize(("width", "dark"), some_of(VIEWS, [f"{max(WIDTHS)} light", f"{min(WIDTHS)} dark"]))
def test_the_page_has_no_fault_in_a_browser(tmp_path: Path, chromium: Browser, width: int, dark: bool) -> None:
    """A grid with an allocation, which shows its front first, and a study of two settings."""
    grid_in(tmp_path / "grid")
    choices_in(tmp_path / "grid")
    small_study_in(tmp_path / "small", {16: 0.8, 8: 0.796, 4: 0.6})
    problems = {name: audit(chromium, page_of(tmp_path / name), width, dark) for name in ("grid", "small")}
    assert problems == {"grid": [], "small": []}


def test_the_command_writes_files_and_prints_their_paths(tmp_path: Path) -> None:
    grid_in(tmp_path)
    result = CliRunner().invoke(cli, ["study", "plots", str(tmp_path), "--out", str(tmp_path / "p")])
    assert result.exit_code == 0, result.output
    wrote = "wrote "
    paths = [Path(line.removeprefix(wrote)) for line in result.output.splitlines() if line.startswith(wrote)]
    assert {path.name for path in paths} >= {"study.html", "pareto.png"}
    assert all(path.exists() for path in paths)
    none = CliRunner().invoke(cli, ["study", "plots", str(tmp_path / "p")])
    assert none.exit_code == 1
    assert "Hint:" in none.stderr


def test_colors_are_distinct_with_color_blindness() -> None:
    """The palette of Okabe and Ito through Machado's matrices for full protanopia and deuteranopia."""
    protan = np.array([[0.152, 1.053, -0.205], [0.115, 0.786, 0.099], [-0.004, -0.048, 1.052]])
    deutan = np.array([[0.367, 0.861, -0.228], [0.280, 0.673, 0.047], [-0.012, 0.043, 0.969]])
    colors = np.array([[int(c[i : i + 2], 16) / 255 for i in (1, 3, 5)] for c in study_plots.COLORS])
    linear = np.where(colors <= 0.04045, colors / 12.92, ((colors + 0.055) / 1.055) ** 2.4)
    for matrix in (np.eye(3), protan, deutan):
        perceived = np.clip(linear @ matrix.T, 0, 1) ** (1 / 2.2)
        distances = [np.linalg.norm(a - b) for i, a in enumerate(perceived) for b in perceived[:i]]
        assert min(distances) > 0.1
    assert len(set(study_plots.MARKERS)) == len(study_plots.COLORS)  # series differ by marker too


@pytest.mark.parametrize(
    ("score", "says"), [("nosuch", "no setting has a score"), ("kl", "lower values of kl are better")]
)
def test_scores_that_cannot_be_drawn_are_errors(tmp_path: Path, score: str, says: str) -> None:
    grid_in(tmp_path)
    choices_in(tmp_path)
    with pytest.raises(DataError, match=says):
        gather(tmp_path, score)


def test_a_table_with_several_exams_has_a_note_and_can_be_filtered(tmp_path: Path) -> None:
    rows = [
        measured(i, exam, 1 - 2.0**-bits, bits, vision_bits=bits) for exam in ("a", "b") for i, bits in enumerate(BITS)
    ]
    (tmp_path / "study.csv").write_text(as_csv(rows))
    mixed = read_table(tmp_path / "study.csv")
    assert any("exam a, b are mixed" in note for note in mixed.notes)
    assert len(read_table(tmp_path / "study.csv", conditions=["exam=b"]).scores) == len(BITS)
    with pytest.raises(DataError, match="no row with exam=c"):
        read_table(tmp_path / "study.csv", conditions=["exam=c"])
    with pytest.raises(DataError, match="lower values of kl are better"):
        read_table(tmp_path / "study.csv", "kl")


def test_components_of_a_study_are_those_with_bits(tmp_path: Path) -> None:
    grid_in(tmp_path)
    assert components_of(tmp_path) == {"vision", "language"}
