"""Allocation of bits under a budget: the solver against brute force, recipes of allocations, and the command."""

import importlib
import itertools
import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from PIL import Image

from exporter.commands.allocate import ByteSize
from exporter.commands.main import cli
from exporter.data import places
from exporter.errors import DataError, PlanError, RecipeError
from exporter.events import ignore
from exporter.model.families import FAMILIES
from exporter.planning.plan import make_plan
from exporter.planning.recipe import Rule
from exporter.planning.recipe_file import load_recipe
from exporter.study import allocation_run, worker_pool
from exporter.study.allocate import Option, Slot, front, rules_of, solve
from exporter.study.allocation_run import Request, allocate
from exporter.study.prepare import base_recipe
from exporter.study.propose import with_evidence, write_recipe
from exporter.study.sensitivity import iterate_slots, measure, rules, without_extras
from exporter.study.worker_tasks import Setup, exam_samples, open_model
from tests.shared_exams import share_exams
from tests.slow import some


@pytest.fixture(autouse=True)
def shared_exams(monkeypatch: pytest.MonkeyPatch) -> None:
    share_exams(monkeypatch)


def rule(bits: int, component: str = "vision") -> Rule:
    return Rule(component=component, bits=bits)


def random_places(seed: int, count: int = 5, options: int = 4) -> tuple[list[Slot], int]:
    dice = np.random.default_rng(seed)
    slots = []
    for i in range(count):
        size = int(dice.integers(50, 2000))
        costs = np.sort(dice.exponential(size=options - 1) * 10.0 ** dice.integers(-6, 0))[::-1]
        quantized_options = [
            Option(rule(bits), size * (16 - bits) // 16, float(c)) for bits, c in zip((2, 4, 8), costs, strict=True)
        ]
        slots.append(Slot("vision", i, None, (Option(None, 0, 0.0), *quantized_options)))
    return slots, 20_000


@pytest.mark.parametrize("seed", some(range(20), range(6)))
def test_the_solver_equals_brute_force(seed: int) -> None:
    slots, full = random_places(seed)
    all_choices = list(itertools.product(*(slot.options for slot in slots)))
    sizes = [full - sum(option.saved for option in options) for options in all_choices]
    costs = [sum(option.cost for option in options) for options in all_choices]
    for budget in np.linspace(min(sizes), full, 7).astype(int):
        allocation = solve(slots, full, int(budget))
        best = min(cost for cost, size in zip(costs, sizes, strict=True) if size <= budget)
        assert allocation.bytes == full - sum(option.saved for option in allocation.options) <= budget
        assert allocation.cost == pytest.approx(best, rel=1e-9, abs=1e-12)


def test_a_budget_below_the_smallest_size_is_an_error_with_that_size() -> None:
    places, full = random_places(0)
    least = min(choice.bytes for choice in front(places, full))
    assert solve(places, full, least).bytes == least
    with pytest.raises(PlanError, match=f"the smallest has {least:,}"):
        solve(places, full, least - 1)


def test_the_front_costs_less_the_larger_it_is() -> None:
    places, full = random_places(1)
    choices = front(places, full)
    assert len(choices) > 5
    assert [c.bytes for c in choices] == sorted({c.bytes for c in choices})
    assert all(a.cost > b.cost for a, b in itertools.pairwise(choices))


def test_the_solver_writes_nothing_to_standard_output(capfd: pytest.CaptureFixture[str]) -> None:
    for seed in range(2):
        front(*random_places(seed, count=12), points=12)
    assert capfd.readouterr().out == ""


def test_without_scipy_the_hint_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "scipy.optimize", None)
    with pytest.raises(DataError) as caught:
        solve(*random_places(0), 19_000)
    assert "pip install '.[study]'" in (caught.value.hint or "")


def test_rules_of_an_allocation_merge_equal_blocks_and_roles() -> None:
    slots = [Slot("vision", i, role, ()) for i in range(4) for role in ("attention", "mlp")]
    slots.append(Slot("projector", 0, None, ()))
    four, eight, full_precision = Option(rule(4), 1, 0), Option(rule(8), 1, 0), Option(None, 0, 0)
    options = [four, four, four, four, four, eight, full_precision, eight, Option(rule(8, "projector"), 1, 0)]
    rule_fields = [(r.component, r.blocks, r.role, r.bits) for r in rules_of(slots, options)]
    assert rule_fields == [
        ("vision", "0:2", None, 4),
        ("vision", "2:3", "attention", 4),
        ("vision", "2:3", "mlp", 8),
        ("vision", "3:4", "mlp", 8),
        ("projector", None, None, 8),
    ]
    assert [r.blocks for r in rules_of(slots[:8], [four] * 8)] == [None]
    assert rules_of(slots[:8], [full_precision] * 8) == ()


def test_the_plan_of_every_allocation_has_exactly_the_computed_size(study_folder: Path) -> None:
    """The size of an allocation equals that of the plan of its rules."""
    setup = small_setup(study_folder)
    schemes = rules((3, 8), (128,), "rtn", True, False, "compressed_tensors")
    slots, full, _ = measure(setup, "role", (), schemes, worker_pool.inline, ignore)
    model = open_model(setup)
    assert {slot.component for slot in slots} >= {"vision", "projector", "language"}
    allocations = front(slots, full, 6)
    assert len(allocations) >= 4
    for allocation in allocations:
        plan = model.plan(rules_of(slots, allocation.options))
        assert plan.bytes_after == allocation.bytes


@pytest.fixture(scope="module")
def study_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One folder for several tests, so that later tests reuse measurements."""
    return tmp_path_factory.mktemp("study")


def small_setup(folder: Path) -> Setup:
    return Setup(folder, base_recipe("demo-llava", None, (), 8, 0).model_dump_json(), samples=4, batch=4, device="cpu")


def test_only_servable_schemes_unless_unserved_is_set() -> None:
    def bits(form: str, unserved: bool = False) -> list[int]:
        return [r["bits"] for r in rules((2, 3, 4, 8), (128,), "rtn", True, unserved, form)]

    assert bits("compressed_tensors") == [2, 3, 4, 8]
    assert bits("gptq") == [4, 8]
    assert bits("gptq", unserved=True) == [2, 3, 4, 8]
    plain = without_extras(rules((2, 3, 4, 8), (128,), "rtn", True, False, "compressed_tensors"), "compressed_tensors")
    assert [r["bits"] for r in plain] == [4, 8]
    with pytest.raises(PlanError, match="no scheme of these options can be served"):
        rules((3,), (128,), "rtn", True, False, "gptq")


@pytest.mark.parametrize("name", ["llava", "blip2"])
def test_linears_that_the_engine_fuses_share_their_slot(name: str) -> None:
    for component in FAMILIES[name].components:
        for members in component.fused.values():
            assert len({component.roles[member] for member in members}) == 1


def test_slots_exclude_parts_that_the_engine_cannot_load_packed(tmp_path: Path) -> None:
    model = open_model(small_setup(tmp_path))
    slots = [(component.name, block, role) for component, block, role in iterate_slots(model, "role", ())]
    assert ("vision", 0, "attention") in slots
    assert ("vision", 1, "mlp") in slots
    assert ("projector", 0, None) in slots
    assert [slot[1:] for slot in iterate_slots(model, "component", ["language"])] == [(None, None)]
    assert [slot[1:] for slot in iterate_slots(model, "block", ["language"])] == [(0, None), (1, None)]


def request(**changed: object) -> Request:
    plain = {"max_size": 600_000, "max_drop": None, "bits": (3, 8), "groups": (128,), "method": "rtn"}
    return Request(**{**plain, "symmetric": True, "per": "role", "samples": 6, "points": 4, **changed})  # type: ignore[arg-type]


def test_an_allocation_becomes_a_recipe_that_loads_and_plans_and_beats_smaller_ones(
    tmp_path: Path, study_folder: Path
) -> None:
    setup = small_setup(study_folder)
    result = allocate(setup, request(), worker_pool.inline, ignore, prove=False)
    path = tmp_path / "mine.yaml"
    write_recipe(result.recipe, path, "mmq allocate --max-size 600kB")
    recipe = load_recipe(str(path))
    assert recipe.quantize == result.recipe.quantize
    model = open_model(setup)
    plan = make_plan(recipe, model.checkpoint, model.family, model.device)
    assert plan.bytes_after == result.winner.measured.bytes <= 600_000
    assert "Not proven" in recipe.evidence[1].finding
    kl = result.winner.measured.scores["kl"]
    worse = [candidate for candidate in result.front if candidate.measured.bytes < result.winner.measured.bytes]
    assert worse
    assert all(candidate.measured.scores["kl"] > kl for candidate in worse)
    assert with_evidence(result.recipe, None, 0.1, 0.2, 0.03).gates[0].max_drop == 0.03


def cache_by_name(monkeypatch: pytest.MonkeyPatch, name: str) -> list[Any]:
    """Let a function return its first result again; the list of its results."""
    module, _, attribute = name.rpartition(".")
    function, results = getattr(importlib.import_module(module), attribute), list[Any]()

    def once(*arguments: Any) -> Any:
        if not results:
            results.append(function(*arguments))
        return results[0]

    monkeypatch.setattr(name, once)
    return results


def test_the_command_measures_its_allocation_and_a_recipe(
    tmp_path: Path, study_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "mine.yaml"
    search = cache_by_name(monkeypatch, "exporter.commands.allocate.search")
    arguments = ["allocate", "--max-drop", "0.2", "--bits", "3,8", "--method", "rtn", "--per", "component"]
    arguments += ["--samples", "8", "--calibration", "8", "--eval-samples", "4", "--workers", "1", "--device", "cpu"]
    arguments += ["--against", "llava-w8", "--out", str(out), "--folder", str(study_folder)]
    result = CliRunner().invoke(cli, [*arguments, "--json"])
    assert result.exit_code == 0, result.output
    result_data = json.loads(result.stdout)
    assert result_data["confirmed"]["worst_change"] >= -0.2
    assert result_data["against"][0]["recipe"] == "llava-w8"
    assert result_data["confirmed"]["bytes"] == result_data["winner"]["bytes"]
    recipe = load_recipe(str(out))
    assert {gate.max_drop for gate in recipe.gates} == {0.2}
    assert recipe.evidence[1].figures.startswith(f"{result_data['winner']['bytes']:,} bytes")
    text = CliRunner().invoke(cli, arguments)  # the same result, printed for people
    assert len(search) == 1
    assert "exported artifacts on real tasks, test data" in text.output


def test_impossible_requests_are_errors(study_folder: Path) -> None:
    assert CliRunner().invoke(cli, ["allocate"]).exit_code == 1
    both = CliRunner().invoke(cli, ["allocate", "--max-size", "1MB", "--max-drop", "0.1"])
    assert "exactly one of --max-size and --max-drop" in both.stderr
    wrong = CliRunner().invoke(cli, ["allocate", "--max-size", "4.2QB"])
    assert wrong.exit_code == 2
    setup = small_setup(study_folder)
    with pytest.raises(PlanError, match="loses more than"):
        allocate(
            setup,
            request(max_size=None, max_drop=0.0, bits=(2,), per="component"),
            worker_pool.inline,
            ignore,
            prove=False,
        )


def test_a_size_above_the_full_model_is_refused_before_measuring(tmp_path: Path) -> None:
    with pytest.raises(
        RecipeError, match=r"the model in 16 bits has 1,910,\d+ bytes, which --max-size 2,000,000 already allows"
    ):
        allocate(small_setup(tmp_path), request(max_size=2_000_000), worker_pool.inline, ignore, prove=False)
    assert not list(tmp_path.iterdir())


def captions_only(folder: Path, count: int = 40) -> Path:
    """A data folder without splits, whose lines have captions and no questions."""
    folder.mkdir()
    for i in range(count):
        Image.new("RGB", (24, 24), (i, 99, 9)).save(folder / f"{i}.png")
    rows = "".join(f"{i}.png,a square {i}\n" for i in range(count))
    (folder / "metadata.csv").write_text(f"file_name,text\n{rows}")
    return folder


def test_data_without_a_split_is_refused_before_measuring(tmp_path: Path) -> None:
    source = str(captions_only(tmp_path / "data"))
    words = ["allocate", "--data", source, "--task", "captioning", "--max-size", "1MB", "--folder", str(tmp_path / "s")]
    result = CliRunner().invoke(cli, words)
    assert result.exit_code == 1
    assert "no validation split" in result.stderr
    assert "datasets folder" in result.stderr
    assert not list((tmp_path / "s").rglob("*.safetensors"))


def test_a_study_of_one_task_uses_data_without_the_others(tmp_path: Path) -> None:
    source = places([str(captions_only(tmp_path / "data"))])
    recipe = base_recipe("demo-llava", None, source, 8, 0, ["captioning"])
    setup = Setup(tmp_path / "s", recipe.model_dump_json(), places=source, samples=5, device="cpu")
    assert {task: len(samples) for task, samples in exam_samples(setup).items()} == {"captioning": 5}
    assert recipe.calibration.tasks == ("captioning",)
    with pytest.raises(PlanError, match="demo-llava: no task retrieval"):
        base_recipe("demo-llava", None, source, 8, 0, ["retrieval"])


def test_an_allocation_with_a_large_loss_fails_with_a_warning(tmp_path: Path, study_folder: Path) -> None:
    """The recipe is written, the exit code is 3 with a warning, and the recipe's gates would fail."""
    out = tmp_path / "mine.yaml"
    arguments = ["allocate", "--max-size", "500kB", "--bits", "2,8", "--method", "rtn", "--per", "component"]
    arguments += ["--samples", "8", "--calibration", "8", "--workers", "1", "--device", "cpu", "--no-proof"]
    result = CliRunner().invoke(cli, [*arguments, "--out", str(out), "--folder", str(study_folder), "--json"])
    assert result.exit_code == 3
    result_data = json.loads(result.stdout)
    assert result_data["winner"]["change"] < -0.05
    assert "on the validation split, more than 5.0%" in result_data["warnings"][0]
    assert f"{out} is written, but the allocation loses" in result.stderr
    recipe = load_recipe(str(out))
    measured_recipe = SimpleNamespace(worst=-0.3, row=lambda: {"metrics": {}}, samples=1, bytes=1)
    measured_recipe.bits_per_weight = 2.0
    assert {gate.max_drop for gate in with_evidence(recipe, measured_recipe, 0.1, 0.1, None).gates} == {0.05}  # type: ignore[arg-type]
    (tmp_path / "file").write_text("")
    nowhere = ["allocate", "--max-size", "500kB", "--out", str(tmp_path / "file" / "a.yaml")]
    refused = CliRunner().invoke(cli, [*nowhere, "--folder", str(tmp_path / "none")])
    assert refused.exit_code == 1
    assert "write failed" in refused.stderr
    assert not (tmp_path / "none").exists()


def test_a_loss_that_is_unknown_is_no_loss_that_is_too_large(
    tmp_path: Path, study_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert "is unknown: the full-precision model scores 0" in allocation_run._warnings(math.nan, True, None)[0]
    assert allocation_run._warnings(-0.04, True, None) == ()
    monkeypatch.setattr(allocation_run, "_change", lambda winner, confirmed: math.nan)
    arguments = ["allocate", "--max-size", "500kB", "--bits", "2,8", "--method", "rtn", "--per", "component"]
    arguments += ["--samples", "8", "--calibration", "8", "--workers", "1", "--device", "cpu", "--no-proof"]
    result = CliRunner().invoke(
        cli, [*arguments, "--out", str(tmp_path / "mine.yaml"), "--folder", str(study_folder), "--json"]
    )
    assert result.exit_code == 5, result.output


@pytest.mark.parametrize(
    ("text", "size"), [("4.2GB", 4_200_000_000), ("900kB", 900_000), ("4 GiB", 2**32), ("123", 123)]
)
def test_sizes(text: str, size: int) -> None:
    assert ByteSize().convert(text, None, None) == size


def test_allocation_for_a_retrieval_model_uses_its_recall(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("exporter.data.DEMO_CANDIDATES", 3)
    recipe = base_recipe("demo-blip2-itm", None, (), 8, 0).model_dump_json()
    setup = Setup(tmp_path, recipe, samples=3, batch=8, device="cpu")
    size_request = request(max_size=1_500_000, per="component", points=2, samples=4, bits=(3, 8))
    result = allocate(setup, size_request, worker_pool.inline, ignore)
    assert result.confirmed is not None
    assert list(result.confirmed.row()["metrics"]) == ["retrieval r1"]
    assert result.confirmed.bytes == result.winner.measured.bytes <= 1_500_000
    assert [(gate.task, gate.metric) for gate in result.recipe.gates] == [("retrieval", "r1")]
    assert result.sensitivity["qformer"]["W3 g128"] > result.sensitivity["qformer"]["W8 g128"] > 0
    assert {rule.component for rule in result.recipe.quantize} == {"vision", "qformer"}
