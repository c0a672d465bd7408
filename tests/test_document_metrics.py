"""ANLS and relaxed accuracy: the papers' definitions, naive twins, gates, advice, and reports of such data."""

from fractions import Fraction
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from exporter import api
from exporter.commands.main import cli
from exporter.data import places
from exporter.data.tasks import TASKS, main_metric, measured
from exporter.data.tasks.anls import anls, levenshtein
from exporter.data.tasks.relaxed import relaxed_accuracy
from exporter.data.tasks.sample import Sample
from exporter.evaluation.evaluate import compare
from exporter.evaluation.sample_size import advise, unpredictable
from exporter.planning.recipe import Gate
from exporter.planning.recipe_file import load_recipe
from exporter.publishing.proof.report import score_problems
from exporter.study.propose import _main_measures
from tests import layouts

letters = st.text("ab c", max_size=9)


def sample(*references: str, identity: str = "x", metrics: tuple[str, ...] = (), kind: str = "") -> Sample:
    return Sample(identity, lambda: Image.new("RGB", (2, 2)), "what?", references, kind, metrics=metrics)


def naive_distance(first: str, second: str) -> int:
    """The recursive definition of the Levenshtein distance."""

    @cache
    def distance(i: int, j: int) -> int:
        if not (i and j):
            return i + j
        replaced = distance(i - 1, j - 1) + (first[i - 1] != second[j - 1])
        return min(distance(i - 1, j) + 1, distance(i, j - 1) + 1, replaced)

    return distance(len(first), len(second))


def naive_anls(answer: str, references: list[str]) -> float:
    """max over references of s = 1 - NL if NL < 0.5, else 0 (Biten et al. 2019, section 4), on plain texts."""
    found, best = " ".join(answer.lower().split()), 0.0
    for reference in references:
        expected = " ".join(reference.lower().split())
        if found and expected:
            nl = Fraction(naive_distance(found, expected), max(len(found), len(expected)))
            best = max(best, float(1 - nl) if nl < Fraction(1, 2) else 0.0)
    return best


@given(letters, letters)
def test_levenshtein_is_its_recursive_definition(first: str, second: str) -> None:
    assert levenshtein(first, second) == naive_distance(first, second) == levenshtein(second, first)


@given(letters, st.lists(letters, min_size=1, max_size=3))
def test_anls_is_its_naive_twin(answer: str, references: list[str]) -> None:
    assert anls(answer, references) == pytest.approx(naive_anls(answer, references), abs=1e-12)


@pytest.mark.parametrize(  # the table of the challenge's page (rrc.cvc.uab.es)
    ("answer", "expected"),
    [("The Coca", 0.0), ("CocaCola", 8 / 9), ("Coca cola", 1.0), ("Cola", 0.0), ("Cat", 0.0)],
)
def test_anls_of_the_challenges_example(answer: str, expected: float) -> None:
    assert anls(answer, ["Coca Cola", "Coca Cola Company"]) == pytest.approx(expected)


def test_anls_at_the_threshold_and_of_empty_answers() -> None:
    assert anls("12", ["13"]) == 0.0  # NL is 0.5, which is not below the threshold
    assert anls("123", ["124"]) == pytest.approx(2 / 3)
    assert anls("abcde", ["abcdefghi"]) == pytest.approx(5 / 9)  # the lengths alone differ by 4 of 9
    assert anls("abc", ["abcdef"]) == 0.0
    assert anls("  Two   WORDS ", ["two words"]) == 1.0
    assert anls("", ["x"]) == anls("", [""]) == anls("x", []) == 0.0


@pytest.mark.parametrize(
    ("answer", "reference", "expected"),
    [
        ("105", "100", 1.0),  # at the limit of 5 %
        ("105.1", "100", 0.0),
        ("95", "100", 1.0),
        ("94.9", "100", 0.0),
        ("-104", "-100", 1.0),
        ("104", "-100", 0.0),
        ("0.0", "0", 1.0),
        ("0.001", "0", 0.0),
        ("26%", "25%", 1.0),
        ("0.25", "25%", 1.0),
        ("25", "25%", 0.0),
        ("1e2", "102", 1.0),
        (".5", "0.5", 1.0),
        ("14.", "14", 1.0),
        ("Germany", "germany ", 1.0),
        ("germany", "france", 0.0),
        ("100", "one hundred", 0.0),
        ("1,000", "1000", 0.0),  # a text, as in published evaluations
        ("nan", "nan", 1.0),  # a text, no number
        ("inf", "100", 0.0),
        ("", "", 0.0),
        ("1_0", "10", 0.0),
    ],
)
def test_relaxed_accuracy_allows_five_percent_of_numbers(answer: str, reference: str, expected: float) -> None:
    assert relaxed_accuracy(answer, [reference]) == expected
    assert relaxed_accuracy(answer, ["something else", reference]) == expected


@given(st.integers(-999, 999), st.integers(-999, 999))
def test_relaxed_accuracy_of_integers_is_exact_arithmetic(answer: int, reference: int) -> None:
    """Masry et al. 2022, section 5.1: within 5 % of the gold answer."""
    right = 20 * abs(answer - reference) <= abs(reference)
    assert relaxed_accuracy(str(answer), [str(reference)]) == float(right)


def test_metrics_are_measured_where_data_or_a_gate_names_them() -> None:
    plain, chart, page = sample("1"), sample("1", metrics=("relaxed_accuracy",)), sample("1", metrics=("anls",))
    assert measured("vqa", [plain]) == ("accuracy",)
    assert measured("vqa", [plain, chart]) == ("relaxed_accuracy", "accuracy")
    assert measured("vqa", [page]) == measured("vqa", [plain], ["anls"]) == ("anls", "accuracy")
    assert measured("captioning", []) == TASKS["captioning"].METRICS
    assert main_metric("vqa", {"accuracy"}) == main_metric("vqa", ()) == "accuracy"
    assert main_metric("vqa", {"accuracy", "anls"}) == "anls"
    assert main_metric("captioning", TASKS["captioning"].METRICS) == "cider"


def test_gates_of_both_metrics_are_decided_and_the_report_is_by_the_datas_metric() -> None:
    samples = [sample(str(100 + i), identity=f"{i}", metrics=("relaxed_accuracy",), kind="human") for i in range(200)]
    right, near = [s.references[0] for s in samples], [str(int(s.references[0]) + 3) for s in samples]
    gates = [Gate(task="vqa", metric=metric, max_drop=0.1) for metric in ("relaxed_accuracy", "anls", "accuracy")]
    report = compare({"vqa": right}, {"vqa": near}, {"vqa": samples}, gates, seed=0)
    verdicts = {gate.metric: gate.verdict for gate in report.gates}
    assert verdicts == {"relaxed_accuracy": "passed", "anls": "failed", "accuracy": "failed"}
    assert {measure.metric for measure in _main_measures(report)} == {"anls"}  # the first of the measured ones
    ungated = compare({"vqa": right}, {"vqa": near}, {"vqa": samples}, (), seed=0)
    assert [measure.metric for measure in ungated.measures] == ["relaxed_accuracy", "accuracy"]
    assert {measure.metric for measure in _main_measures(ungated)} == {"relaxed_accuracy"}
    assert ungated.by_kind["vqa"]["human"] == (1.0, 1.0, 200)
    assert all(row.scores == (1.0, 1.0) for row in ungated.changed)


def test_a_model_at_chance_level_is_recognized_by_each_metric() -> None:
    samples = [sample("100" if i < 8 else f"a{i}", identity=f"{i}") for i in range(10)]
    chances = TASKS["vqa"].chance([""] * 10, samples, ("anls", "relaxed_accuracy"))
    assert {metric: sum(values) for metric, values in chances.items()} == {"anls": 8.0, "relaxed_accuracy": 8.0}


def test_advice_knows_the_metrics() -> None:
    gates = tuple(Gate(task="vqa", metric=metric, max_drop=0.03) for metric in ("anls", "relaxed_accuracy"))
    recipe = load_recipe("llava-w4").model_copy(update={"gates": gates})
    assert [advice.metric for advice in advise(recipe)] == ["anls", "relaxed_accuracy"]
    assert unpredictable(recipe) == ""


@pytest.mark.parametrize(("name", "metric"), [("chartqa", "relaxed_accuracy"), ("docvqa", "anls")])
def test_an_evaluation_on_the_data_sets_measures_their_metric(name: str, metric: str, tmp_path: Path) -> None:
    getattr(layouts, name)(tmp_path / "data")
    recipe = load_recipe("llava-w8").model_copy(update={"gates": (Gate(task="vqa", metric=metric, max_drop=0.5),)})
    options: dict[str, Any] = {"model": "demo-llava", "device": "cpu", "samples": 2}
    done = api.export(recipe, out=tmp_path / "out", skip_evaluation=True, **options)
    report = api.evaluate(done.out, data=f"{name}:{tmp_path / 'data'}", eval_samples=3, device="cpu")
    assert [(measure.task, measure.metric) for measure in report.measures] == [("vqa", metric), ("vqa", "accuracy")]
    assert report.gates[0].metric == metric
    assert [problem for problem in score_problems(report, recipe) if "metric" in problem or "no " in problem] == []


def test_score_prints_the_metric_of_the_data_by_kind(tmp_path: Path) -> None:
    layouts.chartqa(tmp_path)
    answers = layouts.write(tmp_path / "answers.json", {"human-0": "10.4", "human-1": "99", "augmented-0": "0.26"})
    done = CliRunner().invoke(cli, ["score", str(answers), "--data", f"chartqa:{tmp_path}", "--task", "vqa"])
    assert done.exit_code == 0, done.output
    lines = " ".join(done.output.split())
    assert "relaxed_accuracy 0.6667" in lines
    assert "relaxed_accuracy human 0.5000" in lines
    assert " accuracy 0.0000" in lines
    assert places(f"chartqa:{tmp_path}")[0].tasks == ("vqa",)
