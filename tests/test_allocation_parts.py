"""Parts of allocations without a model: candidates, confirmations, solutions, schemes, and recipes."""

import dataclasses
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from exporter.errors import ArtifactError, PlanError, RecipeError
from exporter.events import Event
from exporter.model.families import FAMILIES
from exporter.planning.recipe import Rule
from exporter.planning.recipe_file import load_recipe
from exporter.study import allocate, allocation_run, propose, sensitivity
from exporter.study.allocate import Allocation, Option, Slot
from exporter.study.allocation_run import AllocationResult, Candidate, Request


def candidate(name: str, size: int, change: float, predicted: float | None = 0.5) -> Candidate:
    measured: Any = SimpleNamespace(bytes=size, bits_per_weight=4.5, scores={"score": 0.75, "kl": 0.25})
    return Candidate(name, measured, predicted, change)


def request(max_size: int | None = None, max_drop: float | None = None) -> Request:
    return Request(max_size, max_drop, (4,), (128,), "rtn", True, "block")


def test_the_smallest_candidates_within_the_drop_are_confirmed() -> None:
    sizes = [candidate(str(size), size, -1 / size) for size in (900, 100, 200, 400, 300, 500, 600)]
    by_hand = candidate("by hand", 50, 0.0, None)
    assert [c.name for c in allocation_run._candidates(request(max_drop=0.005), [*sizes, by_hand])] == [
        "200",
        "300",
        "400",
        "500",
    ]
    assert [c.name for c in allocation_run._candidates(request(max_size=1), sizes)] == ["600"]  # the one for the size
    with pytest.raises(PlanError, match=r"every allocation of these schemes loses more than 0\.1%"):
        allocation_run._candidates(request(max_drop=0.001), sizes)


def chosen(limit: Request, worst: dict[str, float], prove: bool = True) -> tuple[str, Any, list[Event]]:
    """The name of the candidate, its confirmation, and events; worst: candidate -> its loss on real tasks."""
    events: list[Event] = []
    candidates = [candidate(name, 100 * i, -0.01) for i, name in enumerate(worst, 1)]
    recipes: Any = [f"recipe of {name}" for name in worst]
    setup: Any = "setup"
    winner, confirmed = allocation_run._choose(setup, limit, candidates, recipes, events.append, prove)
    return winner.name, confirmed, events


def test_the_first_candidate_whose_loss_on_real_tasks_is_allowed_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    worst = {"a": -0.2, "b": -0.1, "c": -0.05}

    def confirm(setup: Any, recipe: str, samples: int, on_event: Any) -> Any:
        assert samples == 500
        return SimpleNamespace(worst=worst[recipe.removeprefix("recipe of ")])

    monkeypatch.setattr(allocation_run, "_confirm", confirm)
    name, confirmed, events = chosen(request(max_drop=0.1), worst)
    assert (name, confirmed.worst) == ("b", -0.1)
    assert [(event.stage, event.message) for event in events] == [
        ("note", "a: 20.0% lost on real tasks; the next candidate is a larger one")
    ]
    assert chosen(request(max_drop=0.1), worst, prove=False) == ("a", None, [])
    name, confirmed, events = chosen(request(max_size=1), worst)
    assert (name, confirmed.worst, events) == ("c", -0.05, [])
    with pytest.raises(PlanError, match=r"every measured allocation loses more than 2\.0% on real tasks"):
        chosen(request(max_drop=0.02), worst)


def test_a_result_in_json_has_each_candidate() -> None:
    winner = candidate("choice 1", 100, -0.25)
    row = {
        "name": "choice 1",
        "bytes": 100,
        "bits_per_weight": 4.5,
        "change": -0.25,
        "score": 0.75,
        "kl": 0.25,
        "predicted_kl": 0.5,
    }
    assert winner.row() == row
    result = AllocationResult(
        recipe=load_recipe("llava-w4"),
        sensitivity={"vision 0": {"W4": 0.5}},
        front=(winner,),
        winner=winner,
        together=0.125,
        hand_written=(candidate("by hand", 50, 0.0, None),),
        confirmed=None,
        against=(),
        seconds={"score": 1.0},
        cpu_seconds=2.0,
        warnings=("x",),
    )
    plain = result.as_json()
    assert (plain["winner"], plain["front"]) == (row | {"together_kl": 0.125}, [row])
    assert [item["predicted_kl"] for item in plain["written"]] == [None]
    assert (plain["confirmed"], plain["against"], plain["warnings"]) == (None, [], ["x"])
    assert (plain["sensitivity"], plain["seconds"], plain["cpu_seconds"]) == (
        {"vision 0": {"W4": 0.5}},
        {"score": 1.0},
        2.0,
    )
    assert plain["recipe"]["name"] == "llava-w4"
    assert result.decided
    assert not dataclasses.replace(result, winner=candidate("x", 1, math.nan)).decided


def test_a_size_that_the_model_already_has_is_refused() -> None:
    model: Any = SimpleNamespace(plan=lambda rules: SimpleNamespace(bytes_after=1000))
    allocation_run._require_smaller_size(model, request(max_size=999))
    allocation_run._require_smaller_size(model, request(max_drop=0.1))
    with pytest.raises(RecipeError, match="the model in 16 bits has 1,000 bytes, which --max-size 1,000 already"):
        allocation_run._require_smaller_size(model, request(max_size=1000))


def test_a_budget_that_the_solver_exceeds_is_solved_again_with_less(monkeypatch: pytest.MonkeyPatch) -> None:
    budgets: list[int] = []

    def program(slots: Any, full: int, budget: int) -> list[int]:
        budgets.append(budget)
        return [0 if len(budgets) < 3 else 1]

    monkeypatch.setattr(allocate, "_program", program)
    slots = [Slot("vision", 0, None, (Option(None, 495, 0.0), Option(Rule(component="vision", bits=4), 500, 0.25)))]
    result = allocate.solve(slots, 1000, 500)
    assert (result.bytes, result.cost, result.options) == (500, 0.25, slots[0].options[1:])
    assert budgets == [500, 495, 490]


def test_a_program_without_a_solution_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    optimize = pytest.importorskip("scipy.optimize")
    monkeypatch.setattr(optimize, "milp", lambda *arguments, **options: SimpleNamespace(x=None, message="infeasible"))
    with pytest.raises(PlanError, match="the solver returned no allocation: infeasible"):
        allocate.solve([Slot("vision", 0, None, (Option(None, 0, 0.0),))], 1000, 1000)


@pytest.mark.parametrize(
    ("costs_and_sizes", "kept"),
    [
        ([(0.0, 0), (1.0, 10), (2.0, 10), (3.0, 20)], [0, 10, 20]),
        ([(1.0, 10), (1.0, 20), (0.0, 0)], [0, 20]),
        ([(3.0, 5), (0.0, 0), (1.0, 10)], [0, 10]),
    ],
)
def test_an_option_that_costs_more_must_save_more(costs_and_sizes: list[tuple[float, int]], kept: list[int]) -> None:
    options = [Option(None, saved, cost) for cost, saved in costs_and_sizes]
    assert [option.saved for option in sensitivity._undominated(options)] == kept


def test_sensitivities_are_a_table_by_slot_and_scheme() -> None:
    settings: Any = [
        SimpleNamespace(about={"place": place, "scheme": scheme}, scores={"kl": kl})
        for place, scheme, kl in (("a", "W4", 0.5), ("b", "W4", 0.25), ("a", "W8", 0.125))
    ]
    assert sensitivity.table(settings) == {"a": {"W4": 0.5, "W8": 0.125}, "b": {"W4": 0.25}}


def test_schemes_are_sorted_by_bits_and_invalid_values_are_refused() -> None:
    def schemes(*bits: int, method: str = "rtn") -> list[Any]:
        return sensitivity.rules(bits, ("row", 128), method, True, True, "compressed_tensors")

    assert [(scheme["bits"], scheme["group_size"]) for scheme in schemes(8, 16, 4, 8)] == [
        (4, "row"),
        (4, 128),
        (8, "row"),
        (8, 128),
    ]
    for bits, method in ((1, "rtn"), (4, "gtpq")):
        with pytest.raises(PlanError, match="bits: " if bits == 1 else "method: ") as caught:
            schemes(bits, method=method)
        assert "--bits, --groups and --method" in (caught.value.hint or "")


def test_an_allocation_that_quantizes_nothing_is_no_recipe() -> None:
    slots = [Slot("vision", 0, None, (Option(None, 0, 0.0),))]
    nothing = Allocation(slots[0].options, 1000, 0.0)
    with pytest.raises(RecipeError, match="keeps everything at 16 bits"):
        propose.recipe_of(load_recipe("llava-w4"), "mine", slots, nothing, {}, 0.1)


def test_changes_of_a_confirmed_recipe_are_those_of_main_metrics(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def measure(task: str, metric: str, before: float, change: float) -> Any:
        return SimpleNamespace(task=task, metric=metric, difference=SimpleNamespace(before=before, change=change))

    report = SimpleNamespace(
        measures=[
            measure("vqa", "accuracy", 0.5, -0.1),
            measure("captioning", "cider", 0.8, 0.04),
            measure("vqa", "anls", 0.5, -0.4),
        ]
    )
    monkeypatch.setattr(propose, "main_metric", lambda task, metrics: {"vqa": "accuracy", "captioning": "cider"}[task])
    manifest = SimpleNamespace(bytes=SimpleNamespace(after=1234), bits_per_weight=4.5)
    monkeypatch.setattr(propose, "read_manifest", lambda folder: manifest)
    monkeypatch.setattr(propose, "read_report", lambda folder: (report, None))
    confirmed = propose.read_confirmed("mine", tmp_path)
    assert (confirmed.name, confirmed.bytes, confirmed.bits_per_weight) == ("mine", 1234, 4.5)
    assert (confirmed.change, confirmed.worst) == (pytest.approx((-0.2 + 0.05) / 2), -0.2)
    report.measures = [measure("vqa", "accuracy", 0.0, 0.1)]
    undecided = propose.read_confirmed("mine", tmp_path)
    assert math.isnan(undecided.change)
    assert math.isnan(undecided.worst)
    monkeypatch.setattr(propose, "read_report", lambda folder: (None, None))
    with pytest.raises(ArtifactError, match="has no evaluation"):
        propose.read_confirmed("mine", tmp_path)


def test_a_hand_written_recipe_of_another_family_is_not_compared() -> None:
    base = load_recipe("llava-w4")
    other = propose.comparable("llava-w4-vit8", base, FAMILIES["llava"])
    assert (other.name, other.gates, other.model) == ("llava-w4-vit8", base.gates, base.model)
    assert other.quantize != base.quantize
    with pytest.raises(RecipeError, match="recipe 'blip2-caption-w4' does not fit llava-hf"):
        propose.comparable("blip2-caption-w4", base, FAMILIES["llava"])


@pytest.mark.parametrize(
    ("change", "confirmed", "max_drop", "warning"),
    [
        (math.nan, True, 0.1, "the loss on real tasks is unknown: the full-precision model scores 0 there"),
        (math.nan, False, None, "the loss on the validation split is unknown"),
        (-0.1, True, 0.1, ""),
        (-0.101, True, 0.1, "the allocation loses 10.1% on real tasks, more than 10.0%: allow a larger size"),
        (-0.051, False, None, "the allocation loses 5.1% on the validation split, more than 5.0%: allow a larger"),
        (-0.05, False, None, ""),
        (-0.2, True, 0.0, "the allocation loses 20.0% on real tasks, more than 0.0%"),
    ],
)
def test_a_loss_beyond_the_allowed_one_is_a_warning(
    change: float, confirmed: bool, max_drop: float | None, warning: str
) -> None:
    warnings = allocation_run._warnings(change, confirmed, max_drop)
    assert len(warnings) == bool(warning)
    assert all(text.startswith(warning) for text in warnings)
