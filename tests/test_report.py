"""The report: one self-contained page, readable at any width and by keyboard."""

import json
import re
import shutil
import sys
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest
import yaml
from click.testing import CliRunner, Result
from PIL import Image

from exporter.commands.main import cli
from exporter.data import image_key
from exporter.data.tasks.sample import Sample
from exporter.device import choose
from exporter.evaluation.gate_text import sentence
from exporter.evaluation.report_file import REPORT, AnswerPair, Report
from exporter.events import ignore
from exporter.pipeline.export import export
from exporter.planning.recipe import Recipe
from exporter.planning.recipe_file import load_recipe
from exporter.publishing import card
from exporter.publishing.artifact_summary import Summary, folder_reader, read_summary
from exporter.publishing.report import charts, collect, find_pictures, html, thumbnail, write
from exporter.serving.check import CheckResult, store_result
from exporter.serving.comparison import Control
from exporter.serving.reference import Distance, EngineComparison
from tests.browser import ENTER, TAB, Browser
from tests.page_audit import WIDTHS, audit
from tests.test_evaluate import crafted

HOSTILE = "<script>alert(1)</script><img src=http://example.invalid/x.png onerror=alert(1)> \" ' &"


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    data = load_recipe("llava-w3-vit4").model_dump()
    data["model"] |= {"repo": "demo-llava"}
    data["calibration"] |= {"samples": 4}
    data["evaluation"] |= {"samples": 24}
    folder = tmp_path_factory.mktemp("report") / "my-artifact"
    export(Recipe.model_validate(data), out=folder, device=choose("cpu"), on_event=ignore)
    return folder


@pytest.fixture(scope="module")
def page(out: Path) -> Path:
    result = mmq("report", out, "--out", out.parent / "report.html")
    assert result.exit_code == 0, result.output
    return out.parent / "report.html"


def mmq(*arguments: object) -> Result:
    return CliRunner().invoke(cli, [str(argument) for argument in arguments])


def summary(out: Path, report: Report | None = None) -> Summary:
    """Summary of the artifact, with `report` in place of its own if given."""
    artifact_summary = read_summary(out.name, folder_reader(out))
    return artifact_summary if report is None else replace(artifact_summary, report=report)


class Tags(HTMLParser):
    """Start tags with their attributes; `open` must be empty at the end."""

    VOID = frozenset(("meta", "link", "img", "br", "line", "rect"))

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        if tag not in self.VOID:
            assert self.open.pop() == tag


def test_the_page_has_all_values_of_the_artifact(out: Path, page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    report = json.loads((out / "mmq_report.json").read_text())
    manifest = json.loads((out / "mmq_manifest.json").read_text())
    for measure in report["measures"]:
        for value in (measure["difference"]["before"], measure["difference"]["after"]):
            assert f"{value:.4f}" in text
    for gate in report["gates"]:
        for value in (gate["change"], gate["low"], gate["high"]):
            assert f"{value:+.1%}" in text
    for linear, error in manifest["errors"].items():
        assert f"{error:.5f}" in text, linear
    assert manifest["recipe"]["sha256"] in text
    assert "mmq 0." in text
    assert report["changed"], "3 bits change answers of the demo"
    tags = Tags(text)
    assert tags.open == []
    pictures = [attributes for tag, attributes in tags.tags if tag == "img"]
    assert len(pictures) == len(report["changed"]) + len(report["examples"])
    assert all(picture["alt"] for picture in pictures)


def test_the_json_file_has_the_same_content_without_pictures(out: Path, page: Path) -> None:
    content = json.loads(page.with_suffix(".json").read_text())
    manifest = json.loads((out / "mmq_manifest.json").read_text())
    assert content["verdict"] == json.loads((out / "mmq_report.json").read_text())["verdict"]
    assert content["bytes"] == manifest["bytes"]
    errors = {
        f"{b['block']}.{name}": e
        for rows in content["blocks"].values()
        for b in rows
        for name, e in b["linears"].items()
    }
    assert errors == pytest.approx(manifest["errors"])
    for row in (row for rows in content["blocks"].values() for row in rows):
        assert row["mean"] == pytest.approx(sum(row["linears"].values()) / len(row["linears"]))
        assert row["largest"] == max(row["linears"].values())
    assert [row["block"] for rows in content["blocks"].values() for row in rows] == manifest["units"]
    assert all("picture" not in row for row in content["changed"])
    assert "data:image" not in page.with_suffix(".json").read_text()


def test_the_page_has_no_external_references(page: Path) -> None:
    tags = Tags(page.read_text(encoding="utf-8")).tags
    for tag, attributes in tags:
        assert tag not in ("script", "iframe", "object", "embed", "form", "base")
        assert not [name for name in attributes if name.startswith("on")]
        for name in ("src", "href", "srcset", "action"):
            value = attributes.get(name) or "#"
            assert value.startswith(("#", "data:"))
            if value.startswith("#") and len(value) > 1:
                assert value[1:] in {a.get("id") for _, a in tags}
    assert "url(" not in page.read_text(encoding="utf-8")


def test_answers_cannot_become_markup(out: Path) -> None:
    report = crafted(1, 3)
    texts = {"before": HOSTILE, "after": HOSTILE, "question": HOSTILE, "id": HOSTILE, "references": (HOSTILE,)}
    rows = {key: tuple(row.model_copy(update=texts) for row in getattr(report, key)) for key in ("changed", "examples")}
    text = html(collect(summary(out, report.model_copy(update=rows)), {}))
    tags = [tag for tag, _ in Tags(text).tags]
    assert "script" not in tags
    assert "img" not in tags
    assert "&lt;script&gt;alert(1)" in text


@pytest.mark.parametrize(
    ("wrong_after", "verdict", "tone", "text_part"),
    [
        (1, "passed", "passed", "No answer changed."),
        (
            4,
            "not resolved",
            "open",
            "A gate is not resolved: with this number of samples",
        ),
        (40, "failed", "failed", "A gate failed: the loss is larger than the recipe allows."),
        (50, "failed", "failed", "49 answers changed"),
    ],
)
def test_verdicts(out: Path, wrong_after: int, verdict: str, tone: str, text_part: str) -> None:
    """A gate that is not resolved has a distinct color, at the top and in its row."""
    content = collect(summary(out, crafted(1, wrong_after)), {})
    text = html(content)
    assert content["verdict"] == verdict
    assert f'<span class="badge {tone}">{verdict}</span>' in text
    assert f'class="{tone}"><b>{verdict}</b></td>' in text
    assert text_part in text
    if tone == "open":
        assert 'class="passed"' not in text
        assert re.search(
            r'<p class="open">vqa accuracy: about \d+ samples would resolve it \(--eval-samples \d+\)', text
        )


def test_a_baseline_at_chance_level_is_named_on_the_page(out: Path) -> None:
    text = html(collect(summary(out, crafted(50, 50)), {}))
    assert '<span class="badge failed">not comparable</span>' in text
    assert "the full-precision model scores 0, so a relative change is undefined" in text


def test_the_page_of_an_artifact_without_evaluation_states_it(out: Path) -> None:
    text = html(collect(replace(summary(out), report=None), {}))
    assert '<span class="badge open">never evaluated</span>' in text
    assert "The artifact was not evaluated." in text


def test_scores_on_the_built_in_drawings_are_called_that(out: Path) -> None:
    """The embedded models learned them; for others they show little."""
    artifact_summary = summary(out)
    disclaimer = "the scores show that the model works, not how much accuracy it lost"
    assert disclaimer not in html(collect(artifact_summary, {}))
    source = artifact_summary.manifest.source.model_copy(update={"model": "org/llava@abc"})
    assert disclaimer in html(
        collect(replace(artifact_summary, manifest=artifact_summary.manifest.model_copy(update={"source": source})), {})
    )


@pytest.mark.parametrize("evaluated", [True, False])
@pytest.mark.parametrize("problems", [(), ("mean 0.2 of 0.015 allowed <b>",)])
def test_the_result_of_check_is_on_the_page(
    out: Path, tmp_path: Path, evaluated: bool, problems: tuple[str, ...]
) -> None:
    """With and without an evaluation."""
    copy = tmp_path / "checked"
    shutil.copytree(out, copy)
    if not evaluated:
        (copy / REPORT).unlink()
    distance, floor = Distance(0.03125, 0.0125, 70), Distance(0.0625, 0.025, 70)
    control = Control("vision", Distance(9.5, 4.25, 70), EngineComparison(distance, floor))
    texts = (
        "0.32.0+cpu",
        "cpu",
        16,
        0.015,
        EngineComparison(distance, floor),
        control,
        {"W4": 8},
        ("K for W4",),
        30.0,
        problems,
    )
    store_result(copy, CheckResult(*texts), "0" * 64)
    content = collect(summary(copy), {})
    text = html(content)
    assert content["serving"]["passed"] is not bool(problems)
    assert ("The engine's answers differ" in text) is bool(problems)
    assert ("mean 0.2 of 0.015 allowed &lt;b&gt;" in text) is bool(problems)
    report = summary(copy).report
    assert content["verdict"] == (report.verdict if report else "never evaluated")
    assert bool(report) is evaluated
    for text_part in (
        "vllm 0.32.0+cpu, cpu build",
        "mean difference 0.0125, largest 0.0312",
        "mean difference 4.2500, largest 9.5000",
        "K for W4",
    ):
        assert text_part in text
    assert Tags(text).open == []


def test_a_baseline_of_zero_still_makes_a_page(out: Path) -> None:
    assert "full-precision score is 0" in html(collect(summary(out, crafted(50, 50)), {}))


def rectangles(svg: str, kind: str) -> list[tuple[float, float, float]]:
    """x, width and height of every bar of a CSS class."""
    attributes_of_bars = [
        attributes for tag, attributes in Tags(svg).tags if tag == "rect" and attributes["class"] == kind
    ]
    return [(float(a["x"] or 0), float(a["width"] or 0), float(a["height"] or 0)) for a in attributes_of_bars]


def test_charts_are_to_scale() -> None:
    row = {
        "name": "vqa accuracy",
        "relative": {"change": -0.02, "low": -0.04, "high": 0.01},
        "allowed": -0.05,
        "tone": "open",
    }
    svg = charts.change(row, (-0.10, 0.10))
    assert rectangles(svg, "forbidden") == [(0, pytest.approx(25), 20)]
    assert rectangles(svg, "interval open") == [(pytest.approx(30), pytest.approx(25), 6)]
    lines = {a["class"]: float(a["x1"] or 0) for tag, a in Tags(svg).tags if tag == "line" and a["class"] != "tick"}
    assert lines == {"bound": 25, "zero": 50, "mark": 40}
    assert [(tick["text"], round(tick["place"])) for tick in charts.ticks((-0.10, 0.10))] == [
        ("-10 %", 0),
        ("-5 %", 25),
        ("0", 50),
        ("+5 %", 75),
        ("+10 %", 100),
    ]
    low, high = charts.reach([row])
    assert low < -0.05 < 0.01 < 0.02 < high
    bars = charts.blocks([{"block": "a", "mean": 0.1, "largest": 0.4}, {"block": "b", "mean": 0.3, "largest": 0.3}])
    assert [height for _, _, height in rectangles(bars, "strong")] == pytest.approx([25, 75])
    assert [height for _, _, height in rectangles(bars, "quiet")] == pytest.approx([100, 75])
    assert [width for _, width, _ in rectangles(charts.sizes(200, 50, {})[0]["chart"], "strong")] == pytest.approx([25])
    many = [{"block": str(i), "mean": 0.1, "largest": 0.4} for i in range(20)]
    marks = charts.block_axes(many)
    assert [(mark["text"], mark["place"]) for mark in marks["errors"]] == [("0.4000", 0), ("0.2000", 50), ("0", 100)]
    assert [mark["text"] for mark in marks["numbers"]] == ["0", "3", "6", "9", "12", "15", "18"]
    assert marks["numbers"][1]["place"] == pytest.approx(17.5)
    assert charts.block_axes(many[:2])["numbers"][1] == {"text": "1", "place": pytest.approx(18.75)}
    parts = {"language": {"before": 120, "after": 30, "kept": 0}, "vision": {"before": 80, "after": 20, "kept": 4}}
    whole, vision, language = charts.sizes(200, 50, parts)
    assert rectangles(whole["chart"], "kept") == [(0, 2, 8)]
    assert rectangles(whole["chart"], "strong") == [(2, 23, 8)]
    assert [row["name"] for row in (vision, language)] == ["vision", "language"]
    assert rectangles(language["chart"], "quiet") == [(0, 100, 8)]
    assert rectangles(vision["chart"], "strong") == [(3.33, 13.33, 8)]


def test_thumbnails_are_small_and_have_the_right_format() -> None:
    tiny, large = Image.new("RGB", (64, 40), (250, 3, 3)), Image.new("RGB", (3000, 1000), (3, 250, 3))
    assert thumbnail(tiny).startswith("data:image/png;base64,")
    assert thumbnail(large).startswith("data:image/jpeg;base64,")
    assert len(thumbnail(large)) < 10_000


def test_a_picture_is_shown_only_if_question_references_and_pixels_are_equal() -> None:
    sample = Sample("1", lambda: Image.new("RGB", (4, 4), (9, 0, 0)), None, ("a dog", "a pet"))
    row = AnswerPair(task="captioning", id="1", question=None, references=("a dog", "a pet"), before="", after="")
    named = row.model_copy(update={"image": image_key(sample.image())})
    for same in (row, named):  # reports of older versions have no hash of the image
        assert find_pictures([same], {"captioning": [sample]}) == {("captioning", "1"): thumbnail(sample.image())}
    for other in ({"id": "2"}, {"question": "what?"}, {"references": ("a cat",)}, {"image": "0" * 64}):
        assert find_pictures([named.model_copy(update=other)], {"captioning": [sample]}) == {}


def test_values_that_round_to_zero_have_no_minus_sign(out: Path) -> None:
    report = crafted(1, 1)
    tiny = {"change": -1e-6, "low": -1e-6, "high": 1e-6}
    (measure,), (gate,) = report.measures, report.gates
    difference = measure.difference.model_copy(update=tiny)
    changed = measure.model_copy(update={"difference": difference, "samples": 10**8})
    both = {"measures": (changed,), "gates": (gate.model_copy(update=tiny),)}
    text = html(collect(summary(out, report.model_copy(update=both)), {}))
    assert "+0.0000 to +0.0000" in text
    assert "+0.0 to +0.0" in text
    assert "+0.0% to +0.0%" in text
    assert "change +0.0%, interval +0.0% to +0.0%" in text
    assert not re.search(r"-0\.0*(?![0-9])", text.partition("</style>")[2])
    assert card.signed(-1e-6) == "+0.0000"
    assert "changed by +0.0% of" in sentence(gate.model_copy(update=tiny))


def test_missing_data_is_an_error_only_if_it_was_passed(out: Path, tmp_path: Path) -> None:
    recipe = out / "recipe.yaml"
    recipe_text = recipe.read_text()
    try:
        changed = yaml.safe_load(recipe_text)
        changed["calibration"]["data"] = f"folder:{tmp_path}/gone"
        recipe.write_text(yaml.safe_dump(changed))
        result = mmq("report", out, "--out", tmp_path / "r.html", "--json")
        result_data = json.loads(result.stdout)
        assert (result_data["pictures"], "--data" in result_data["note"]) == (0, True)
        assert "<img" not in (tmp_path / "r.html").read_text()
        named = mmq("report", out, "--out", tmp_path / "r.html", "--data", tmp_path / "gone")
        assert named.exit_code == 2
        assert "gone' does not exist" in named.stderr
    finally:
        recipe.write_text(recipe_text)


def test_the_page_shows_a_study(out: Path, tmp_path: Path) -> None:
    from tests.test_study_plots import choices_in

    choices_in(tmp_path)
    file = tmp_path / "with.html"
    result = mmq("report", out, "--study", tmp_path, "--out", file)
    assert result.exit_code == 0, result.output
    text = file.read_text()
    assert text.count('<img class="wide" src="data:image/png;base64,') == 2
    assert 'href="#study"' in text
    assert "Sensitivity: KL divergence with one part quantized" in text
    assert 'id="study"' not in html(collect(summary(out), {}))
    failed = mmq("report", out, "--study", out, "--out", file)
    assert failed.exit_code == 1
    assert "contains no study" in failed.stderr


def test_a_folder_without_an_artifact_is_an_error(tmp_path: Path) -> None:
    result = mmq("report", tmp_path)
    assert result.exit_code == 1
    assert "it is not an mmq artifact" in result.stderr


def test_plots_are_written_as_png_files(out: Path, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    result = mmq("report", out, "--out", tmp_path / "r.html", "--plots", tmp_path / "plots", "--json")
    assert [Path(name).name for name in json.loads(result.stdout)["files"]] == [
        "r.html",
        "r.json",
        "size.png",
        "scores.png",
        "errors.png",
    ]
    for path in (tmp_path / "plots").iterdir():
        with Image.open(path) as image:
            assert min(image.size) > 200
            assert len(image.convert("RGB").getcolors(2**20) or ()) > 10


def test_without_matplotlib_the_hint_names_the_extra(
    out: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    result = mmq("report", out, "--out", tmp_path / "r.html", "--plots", tmp_path / "plots")
    assert result.exit_code == 1
    assert "pip install '.[report]'" in result.stderr
    assert (tmp_path / "r.html").exists()


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("width", WIDTHS)
def test_the_page_has_no_fault_in_a_browser(chromium: Browser, page: Path, width: int, dark: bool) -> None:
    assert audit(chromium, page, width, dark) == []


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("width", [320, 390, 1280])
def test_in_a_browser(chromium: Browser, page: Path, width: int, dark: bool) -> None:
    """No horizontal scrolling, readable contrast, and no request besides the file itself."""
    chromium.requested()  # of the tests before
    chromium.show(page, width, 800, dark)
    assert chromium.run("return document.documentElement.scrollWidth") <= width
    hidden = chromium.run(
        "return [...document.querySelectorAll('main *')].filter(e => !e.closest('.scroll, pre, details:not([open])')"
        " && e.getBoundingClientRect().right > innerWidth + 1).map(e => e.outerHTML.slice(0, 80))"
    )
    assert hidden == []
    colors = chromium.run(
        "return ['body', '.soft', 'a', '.badge', '.card dt'].map(s => document.querySelector(s)).map(e => "
        "[getComputedStyle(e).color, getComputedStyle(e.closest('.card') || document.body).backgroundColor])"
    )
    assert min(contrast(*map(rgb, pair)) for pair in colors) >= 4.5
    assert (sum(rgb(colors[0][1])) < 200) == dark
    pictures = chromium.run("return [...document.images].map(i => i.complete && i.naturalWidth)")
    assert pictures
    assert all(pictures)
    assert [url for url in chromium.requested() if not url.startswith("data:")] == [page.resolve().as_uri()]


def rgb(color: str) -> tuple[int, ...]:
    return tuple(int(part) for part in re.findall(r"\d+", color)[:3])


def contrast(first: tuple[int, ...], other: tuple[int, ...]) -> float:
    """Contrast ratio as WCAG 2.2 defines it."""

    def luminance(color: tuple[int, ...]) -> float:
        parts = [c / 255 for c in color]
        linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts]
        return sum(w * c for w, c in zip((0.2126, 0.7152, 0.0722), linear, strict=True))

    low, high = sorted((luminance(first), luminance(other)))
    return (high + 0.05) / (low + 0.05)


def test_by_keyboard(chromium: Browser, page: Path) -> None:
    """Tab focuses the skip link, sections, tables and folds with a visible outline; Enter unfolds."""
    chromium.show(page, 1280, 800)
    expected_count = chromium.run("return document.querySelectorAll('a[href], summary, [tabindex]').length")
    focused: list[str] = []
    for _ in range(expected_count * 3):
        chromium.press(TAB)
        name, outline, folded = chromium.run(
            "const e = document.activeElement; return [e === document.body ? '' : "
            "e.tagName + ' ' + (e.getAttribute('aria-label') || e.textContent).trim(), "
            "getComputedStyle(e).outlineStyle, e.tagName === 'SUMMARY' && !e.parentElement.open]"
        )
        if not name:
            break
        assert outline == "solid", name
        focused.append(name)
        if folded:
            chromium.press(ENTER)
            assert chromium.run("return document.activeElement.parentElement.open"), name
    assert focused[0] == "A Skip to the report"
    assert len(focused) == expected_count
    assert "A Plan and provenance" in focused
    assert "PRE Recipe" in focused


def test_written_files_replace_older_ones_completely(out: Path, tmp_path: Path) -> None:
    (tmp_path / "r.html").write_text("old")
    files = write(collect(summary(out), {}), tmp_path / "r.html")
    assert [path.name for path in files] == ["r.html", "r.json"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["r.html", "r.json"]
    assert (tmp_path / "r.html").read_text(encoding="utf-8").startswith("<!doctype html>")


def test_an_unwritable_path_is_an_error_without_a_traceback(out: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for arguments in (
        ["--out", tmp_path / "file" / "r.html"],
        ["--out", tmp_path / "r.html", "--plots", tmp_path / "file" / "p"],
    ):
        result = mmq("report", out, *arguments)
        assert result.exit_code == 1
        assert "Traceback" not in result.output
        assert str(tmp_path / "file") in result.stderr
