"""The pages of studies and allocations as they are printed."""

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from exporter.commands.options import print_result
from exporter.planning.recipe import Rule
from exporter.planning.recipe_file import load_recipe
from exporter.study import propose
from exporter.study.allocation_tables import allocation_page
from exporter.study.importance import Importance, MarginalChange, Shares
from exporter.study.propose import MeasuredRecipe
from exporter.study.records import CHANGE, CHANGE_ERROR, ERROR, SAMPLES, ScoredSetting
from exporter.study.result_tables import importance_page, outcome_json, outcome_page
from exporter.study.run import Outcome
from tests.test_evaluate import crafted, one_bootstrap

__all__ = ["one_bootstrap"]


def lines(page: Any, capsys: pytest.CaptureFixture[str]) -> list[str]:
    """The lines that a page prints."""
    print_result(page)
    return [line.rstrip() for line in capsys.readouterr().out.splitlines()]


def setting(name: str, size: int, score: float, **about: str | int) -> ScoredSetting:
    scores = {"score": score, "vqa exact": score / 2, "vqa nll": 9.0, ERROR: 0.1, SAMPLES: 8.0, "kl": 1 - score}
    return ScoredSetting(name, "exam", about, size, size / 100, 1.0, 1.0, scores)


SETTINGS = (
    setting("a", 1200, 0.5, vision_bits=4, language_bits=4, method="gptq", blocks="all"),
    setting("b", 800, 0.4, vision_bits=2, language_bits=4, method="gptq", blocks="front"),
    setting("c", 1600, 0.5, vision_bits=16, language_bits=4, method="none", blocks="all"),
)


def test_a_grid_is_a_table_by_size_with_the_front_and_the_cost(capsys: pytest.CaptureFixture[str]) -> None:
    outcome = Outcome(SETTINGS, 2, 5, 6, 9, {"quantize": 4.0, "score": 2.4}, 12.6)
    printed = lines(outcome_page(outcome), capsys)
    assert [line for line in printed if "settings were measured" not in line] == [
        "   vision  blocks    size  bits/w  score    vqa      kl                     change",
        "*       2  front    800 B    8.00  0.400  0.200  0.6000  -20.0% (-75.4% to +35.4%)",
        "*       4  all     1.2 kB   12.00  0.500  0.250  0.5000   +0.0% (-73.9% to +55.4%)",
        "       16  all     1.6 kB   16.00  0.500  0.250  0.5000                  reference",
        "* on the Pareto front: no setting of at most this size scores higher",
        "change: setting - full precision, as a share of its score, with its 95 % interval; 8 samples each",
        "2 settings and full precision, 2 scored in this run; quantize 4 s, score 2 s; 13 CPU seconds",
        "they use 9 units, 6 of them distinct; 5 quantized in this run",
        "3.2 s per setting scored in this run",
    ]
    assert sum(line.startswith("2 settings were measured with 8 samples, which cannot tell") for line in printed) == 1
    alone = Outcome(SETTINGS, 0, 5, 6, 9, {}, 1.0, sequential=True)
    assert lines(outcome_page(alone), capsys)[7:] == [
        "2 settings and full precision, 0 scored in this run; ; 1 CPU seconds",
        "each setting is quantized alone, as an export does: 5 units, none shared",
    ]
    plain = outcome_json(outcome)
    assert [point["score"] for point in plain.pop("points")] == [0.5, 0.4, 0.5]
    assert plain == {
        "scored": 2,
        "units_made": 5,
        "units": 6,
        "units_named": 9,
        "seconds": {"quantize": 4.0, "score": 2.4},
        "cpu_seconds": 12.6,
    }
    assert lines(outcome_page(Outcome((), 0, 0, 0, 0, {}, 0.0)), capsys)[0].split() == ["size", "bits/w"]


def test_importance_has_shares_and_changes(capsys: pytest.CaptureFixture[str]) -> None:
    shares = Shares({"vision": 70.0}, {"vision": 71.0}, {"vision": 72.0}, {"vision": 73.0}, 0.99, 0.5, rows=40)
    inside = Shares({"vision": 60.0}, {"vision": 61.0}, {"vision": 62.0}, {"vision": 63.0}, 0.9, 0.4, rows=9)
    marginal = {"vision": (MarginalChange(3, -0.05, 0.01, 4),), "language": (MarginalChange(4, 0.0, 0.02, 4),)}
    usable: dict[str, tuple[float, ...]] = {"vision": (3.0, 4.5), "language": ()}
    result = Importance("score", 0.98765, shares, usable, inside, marginal, ("few rows",))
    assert lines(importance_page(result), capsys) == [
        "score, 0.9877 with the most bits; 40 settings",
        "note: few rows",
        "importance for the score in percent, whole grid (R2: forest 0.99, line 0.50)",
        "component  consensus  forest  permutation  SHAP",
        "vision     70.0       71.0    72.0         73.0",
        "",
        "usable bits: vision 3, 4.5; language none",
        "importance among the 9 settings with usable bits only (R2: forest 0.90, line 0.40)",
        "component  consensus  forest  permutation  SHAP",
        "vision     60.0       61.0    62.0         63.0",
        "",
        "change of score per bit width among usable bits: mean share of full score, others equal (standard error)",
        "component  3 bits        4 bits",
        "vision     -5.0% (1.0%)",
        "language                 +0.0% (2.0%)",
    ]
    without = Importance("score", 0.98765, shares, usable, None, marginal)
    assert len(lines(importance_page(without), capsys)) == 15 - 1 - 3


def test_an_allocation_has_rules_front_proof_and_the_next_command(capsys: pytest.CaptureFixture[str]) -> None:
    rules = (
        Rule(component="vision", bits=8, method="rtn"),
        Rule(component="language", bits=4, group_size=128, method="gptq", blocks="0:4", role="mlp"),
        Rule(component="head", bits=16),
    )

    def candidate(name: str, size: int, predicted: float | None, change: float) -> Any:
        paired = {CHANGE: 0.75 * change / (1 + change), CHANGE_ERROR: 0.03} if name == "choice 1" else {}
        scored = setting(str(size), size, 0.75)
        scored = replace(scored, about={"name": name}, scores={**scored.scores, **paired})
        return SimpleNamespace(name=name, measured=scored, predicted=predicted, change=change)

    def measured(name: str, after: float) -> Any:
        row = {"metrics": {"vqa accuracy": {"before": 0.8, "after": after}}}
        figures: dict[str, Any] = {"bytes": 1200, "bits_per_weight": 4.5, "change": after - 0.8, "samples": 60}
        return SimpleNamespace(name=name, row=lambda: row, **figures)

    winner = candidate("choice 2", 1200, 0.25, -0.01)
    result: Any = SimpleNamespace(
        recipe=SimpleNamespace(quantize=rules),
        winner=winner,
        together=0.125,
        front=(winner, candidate("choice 1", 800, 0.5, -0.2), candidate("the winner again", 1200, 0.25, -0.01)),
        hand_written=(candidate("by hand", 900, None, -0.1),),
        confirmed=measured("allocated", 0.7),
        against=(measured("by hand", 0.6),),
        seconds={"quantize": 3.6},
        cpu_seconds=7.5,
        warnings=("it loses much",),
    )
    assert lines(allocation_page(result, Path("out.yaml"), "mmq export"), capsys) == [
        "the allocation",
        "component  blocks  role  scheme",
        "vision     all     all   W8 row rtn",
        "language   0:4     mlp   W4 g128 gptq",
        "head       all     all   16 bits",
        "1.2 kB, 12.00 bits per weight; sum of the costs 0.25000",
        "KL per token of the whole allocation: 0.12500; on the validation split 0.25000",
        "",
        "allocations of minimal cost by size, and recipes; score: exact replies of 8 samples, validation split",
        "   name        size  bits/w  predicted       KL   score                     change",
        "   choice 1   800 B    8.00    0.50000  0.25000  0.7500  -20.0% (-39.4% to -13.7%)",
        "   by hand    900 B    9.00             0.25000  0.7500                     -10.0%",
        ">  choice 2  1.2 kB   12.00    0.25000  0.25000  0.7500                      -1.0%",
        "exported artifacts on real tasks, test data",
        "recipe       size  bits/w  samples      vqa accuracy  mean change",
        "allocated  1.2 kB    4.50       60  0.7000 of 0.8000       -10.0%",
        "by hand    1.2 kB    4.50       60  0.6000 of 0.8000       -20.0%",
        "sensitivities: quantize 4 s; 8 CPU seconds",
        "WARNING: it loses much",
        "recipe: out.yaml",
        "next:",
        "  mmq export",
    ]
    result.confirmed = None
    assert "not measured on real tasks: --no-proof" in lines(allocation_page(result, Path("o"), "x"), capsys)


# Recipes of an allocation


def confirmed(worst: float) -> MeasuredRecipe:
    """An artifact whose worst task changes by a share `worst` of its score of 0.8."""
    report = crafted(20, 20 - round(100 * worst * 0.8), 100)
    return MeasuredRecipe("mine", 1_234_567, 4.5, worst, worst, report)


@pytest.mark.parametrize(
    ("worst", "max_drop", "allowed", "finding"),
    [
        (-0.0125, None, 0.03, "Real tasks confirm it."),
        (0.025, None, 0.01, "Real tasks confirm it."),
        (-0.05, None, 0.05, "Real tasks confirm it."),
        (-0.25, None, 0.05, "It loses 25% on real tasks."),
        (-0.25, 0.5, 0.5, "It loses 25% on real tasks."),
    ],
)
def test_an_allocation_s_gates_allow_what_was_measured_within_a_limit(
    worst: float, max_drop: float | None, allowed: float, finding: str
) -> None:
    recipe = propose.with_evidence(load_recipe("llava-w4"), confirmed(worst), 0.25, 0.125, max_drop)
    assert {gate.max_drop for gate in recipe.gates} == {allowed}
    optimality, real = recipe.evidence
    assert optimality.figures == "KL per token: sum 0.25000, measured together 0.12500"
    assert real.finding == finding
    after = 0.8 * (1 + worst)
    start = f"1,234,567 bytes, 4.50 bits per weight; vqa accuracy 0.8000 -> {after:.4f} (change {worst:+.1%}, 95 %"
    assert real.figures.startswith(start)
    assert real.figures.endswith("; 100 samples of each task")


def test_an_allocation_that_was_not_measured_says_so() -> None:
    recipe = propose.with_evidence(load_recipe("llava-w4"), None, 0.25, 0.125, None)
    assert {gate.max_drop for gate in recipe.gates} == {0.01}
    assert recipe.evidence[1].finding == "Not proven by real tasks."


def test_the_file_of_a_recipe_begins_with_its_commands(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    recipe = load_recipe("llava-w4").model_copy(update={"summary": "four bits é"})
    propose.write_recipe(recipe, path, "mmq allocate --plain")
    text = path.read_text()
    assert text.splitlines()[:3] == ["# four bits é.", "#   mmq allocate --plain", f"#   mmq export --recipe {path}"]
    assert "\nname:" not in text
    assert load_recipe(str(path)) == recipe.model_copy(update={"name": "mine"})
