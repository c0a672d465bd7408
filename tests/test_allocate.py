"""Choosing bits under a budget: the program against trying everything, recipes of choices, and the whole command."""

import itertools
import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from click.testing import CliRunner

from exporter.commands.allocate import ByteSize
from exporter.commands.main import cli
from exporter.errors import DataError, PlanError, RecipeError
from exporter.events import ignore
from exporter.model.families import FAMILIES
from exporter.planning.plan import make_plan
from exporter.planning.recipe import Rule
from exporter.planning.recipe_file import load_recipe
from exporter.study import pool
from exporter.study.allocate import Option, Slot, front, rules_of, solve
from exporter.study.prepare import base_recipe
from exporter.study.propose import with_evidence, write_recipe
from exporter.study.search import Request, allocate
from exporter.study.sensitivity import measure, rules, spots, without_extras
from exporter.study.work import Setup, opened


def rule(bits: int, component: str = "vision") -> Rule:
    return Rule(component=component, bits=bits)


def random_places(seed: int, count: int = 5, options: int = 4) -> tuple[list[Slot], int]:
    dice = np.random.default_rng(seed)
    places = []
    for i in range(count):
        size = int(dice.integers(50, 2000))
        costs = np.sort(dice.exponential(size=options - 1) * 10.0 ** dice.integers(-6, 0))[::-1]
        kept = [
            Option(rule(bits), size * (16 - bits) // 16, float(c)) for bits, c in zip((2, 4, 8), costs, strict=True)
        ]
        places.append(Slot("vision", i, None, (Option(None, 0, 0.0), *kept)))
    return places, 20_000


@pytest.mark.parametrize("seed", range(20))
def test_the_program_finds_what_trying_everything_finds(seed: int) -> None:
    places, full = random_places(seed)
    every = list(itertools.product(*(place.options for place in places)))
    sizes = [full - sum(option.saved for option in options) for options in every]
    costs = [sum(option.cost for option in options) for options in every]
    for budget in np.linspace(min(sizes), full, 7).astype(int):
        found = solve(places, full, int(budget))
        best = min(cost for cost, size in zip(costs, sizes, strict=True) if size <= budget)
        assert found.bytes == full - sum(option.saved for option in found.options) <= budget
        assert found.cost == pytest.approx(best, rel=1e-9, abs=1e-12)


def test_a_budget_that_nothing_meets_is_an_error_that_names_the_smallest_size() -> None:
    places, full = random_places(0)
    least = min(choice.bytes for choice in front(places, full))
    assert solve(places, full, least).bytes == least
    with pytest.raises(PlanError, match=f"the smallest is {least:,}"):
        solve(places, full, least - 1)


def test_the_front_costs_less_the_larger_it_is() -> None:
    places, full = random_places(1)
    found = front(places, full)
    assert len(found) > 5
    assert [c.bytes for c in found] == sorted({c.bytes for c in found})
    assert all(a.cost > b.cost for a, b in itertools.pairwise(found))


def test_the_solver_writes_nothing_to_standard_output(capfd: pytest.CaptureFixture[str]) -> None:
    for seed in range(5):
        front(*random_places(seed, count=12), points=40)
    assert capfd.readouterr().out == ""


def test_without_scipy_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "scipy.optimize", None)
    with pytest.raises(DataError) as caught:
        solve(*random_places(0), 19_000)
    assert "pip install '.[study]'" in (caught.value.hint or "")


def test_rules_of_a_choice_join_what_is_alike() -> None:
    places = [Slot("vision", i, role, ()) for i in range(4) for role in ("attention", "mlp")]
    places.append(Slot("projector", 0, None, ()))
    four, eight, kept = Option(rule(4), 1, 0), Option(rule(8), 1, 0), Option(None, 0, 0)
    chosen = [four, four, four, four, four, eight, kept, eight, Option(rule(8, "projector"), 1, 0)]
    found = [(r.component, r.blocks, r.role, r.bits) for r in rules_of(places, chosen)]
    assert found == [
        ("vision", "0:2", None, 4),
        ("vision", "2:3", "attention", 4),
        ("vision", "2:3", "mlp", 8),
        ("vision", "3:4", "mlp", 8),
        ("projector", None, None, 8),
    ]
    assert [r.blocks for r in rules_of(places[:8], [four] * 8)] == [None]
    assert rules_of(places[:8], [kept] * 8) == ()


def test_every_choice_plans_to_exactly_the_size_that_was_computed(tmp_path: Path) -> None:
    """Sizes add up, and the rules of a choice mean what the choice means."""
    setup = small_setup(tmp_path)
    schemes = rules((3, 8), (128,), "rtn", True, False, "compressed_tensors")
    places, full, _ = measure(setup, "role", (), schemes, pool.inline, ignore)
    model = opened(setup)
    assert {p.component for p in places} >= {"vision", "projector", "language"}
    found = front(places, full, 6)
    assert len(found) >= 4
    for choice in found:
        plan = model.plan(rules_of(places, choice.options))
        assert plan.bytes_after == choice.bytes


@pytest.fixture(scope="module")
def study_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One folder for several tests: what one has measured the next finds."""
    return tmp_path_factory.mktemp("study")


def small_setup(folder: Path) -> Setup:
    return Setup(folder, base_recipe("demo-llava", None, (), 8, 0).model_dump_json(), samples=8, batch=8, device="cpu")


def test_only_servable_schemes_unless_told_otherwise() -> None:
    def bits(form: str, unserved: bool = False) -> list[int]:
        return [r["bits"] for r in rules((2, 3, 4, 8), (128,), "rtn", True, unserved, form)]

    assert bits("compressed_tensors") == [2, 3, 4, 8]
    assert bits("gptq") == [4, 8]
    assert bits("gptq", unserved=True) == [2, 3, 4, 8]
    plain = without_extras(rules((2, 3, 4, 8), (128,), "rtn", True, False, "compressed_tensors"), "compressed_tensors")
    assert [r["bits"] for r in plain] == [4, 8]
    with pytest.raises(PlanError, match="no scheme is left"):
        rules((3,), (128,), "rtn", True, False, "gptq")


@pytest.mark.parametrize("name", ["llava", "blip2"])
def test_linears_that_the_engine_fuses_share_their_place(name: str) -> None:
    for component in FAMILIES[name].components:
        for members in component.fused.values():
            assert len({component.roles[member] for member in members}) == 1


def test_parts_that_the_engine_cannot_load_packed_are_left_alone(tmp_path: Path) -> None:
    model = opened(small_setup(tmp_path))
    found = [(component.name, block, role) for component, block, role in spots(model, "role", ())]
    assert ("vision", 0, "attention") in found
    assert ("vision", 1, "mlp") in found
    assert ("projector", 0, None) in found
    assert [f[1:] for f in spots(model, "component", ["language"])] == [(None, None)]
    assert [f[1:] for f in spots(model, "block", ["language"])] == [(0, None), (1, None)]


def request(**changed: object) -> Request:
    plain = {"max_size": 600_000, "max_drop": None, "bits": (3, 8), "groups": (128,), "method": "rtn"}
    return Request(**{**plain, "symmetric": True, "per": "role", "samples": 40, "points": 4, **changed})  # type: ignore[arg-type]


def test_a_choice_becomes_a_recipe_that_loads_plans_and_beats_a_uniform_one(tmp_path: Path, study_folder: Path) -> None:
    setup = small_setup(study_folder)
    found = allocate(setup, request(), pool.inline, ignore, prove=False)
    path = tmp_path / "mine.yaml"
    write_recipe(found.recipe, path, "mmq allocate --max-size 600kB")
    recipe = load_recipe(str(path))
    assert recipe.quantize == found.recipe.quantize
    model = opened(setup)
    plan = make_plan(recipe, model.checkpoint, model.family, model.device)
    assert plan.bytes_after == found.winner.measured.bytes <= 600_000
    assert "Not proven" in recipe.evidence[1].finding
    kl = found.winner.measured.scores["kl"]
    worse = [one for one in found.front if one.measured.bytes < found.winner.measured.bytes]
    assert worse
    assert all(one.measured.scores["kl"] > kl for one in worse)
    assert with_evidence(found.recipe, None, 0.1, 0.2, 0.03).gates[0].max_drop == 0.03


def test_the_command_proves_its_choice_beside_a_recipe(tmp_path: Path, study_folder: Path) -> None:
    out = tmp_path / "mine.yaml"
    arguments = ["allocate", "--max-drop", "0.2", "--bits", "3,8", "--method", "rtn", "--per", "component"]
    arguments += ["--samples", "8", "--calibration", "8", "--eval-samples", "24", "--workers", "1", "--device", "cpu"]
    arguments += ["--against", "llava-w3-vit4", "--out", str(out), "--folder", str(study_folder)]
    result = CliRunner().invoke(cli, [*arguments, "--json"])
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert found["confirmed"]["worst_change"] >= -0.2
    assert found["against"][0]["recipe"] == "llava-w3-vit4"
    assert found["confirmed"]["bytes"] == found["winner"]["bytes"]
    recipe = load_recipe(str(out))
    assert {gate.max_drop for gate in recipe.gates} == {0.2}
    assert recipe.evidence[1].figures.startswith(f"{found['winner']['bytes']:,} bytes")
    text = CliRunner().invoke(cli, arguments)
    assert "real tasks on test data" in text.output


def test_what_cannot_be_asked_is_said(study_folder: Path) -> None:
    assert CliRunner().invoke(cli, ["allocate"]).exit_code == 1
    both = CliRunner().invoke(cli, ["allocate", "--max-size", "1MB", "--max-drop", "0.1"])
    assert "either --max-size or --max-drop" in both.stderr
    wrong = CliRunner().invoke(cli, ["allocate", "--max-size", "4.2QB"])
    assert wrong.exit_code == 2
    setup = small_setup(study_folder)
    with pytest.raises(PlanError, match="loses at most"):
        allocate(
            setup, request(max_size=None, max_drop=0.0, bits=(2,), per="component"), pool.inline, ignore, prove=False
        )


def test_a_size_that_the_whole_model_meets_is_said_before_anything_is_measured(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"keeps everything at 16 bits: that takes 1,910,\d+ bytes"):
        allocate(small_setup(tmp_path), request(max_size=2_000_000), pool.inline, ignore, prove=False)
    assert not list(tmp_path.iterdir())


def test_a_choice_that_loses_much_is_no_success(tmp_path: Path, study_folder: Path) -> None:
    """Its recipe is written, the last word is the warning, and its own gates would fail."""
    out = tmp_path / "mine.yaml"
    arguments = ["allocate", "--max-size", "500kB", "--bits", "2,8", "--method", "rtn", "--per", "component"]
    arguments += ["--samples", "8", "--calibration", "8", "--workers", "1", "--device", "cpu", "--no-proof"]
    result = CliRunner().invoke(cli, [*arguments, "--out", str(out), "--folder", str(study_folder), "--json"])
    assert result.exit_code == 3
    found = json.loads(result.stdout)
    assert found["winner"]["change"] < -0.05
    assert "on the validation split, more than 5.0%" in found["warnings"][0]
    assert f"{out} is written, but this choice loses" in result.stderr
    recipe = load_recipe(str(out))
    report = SimpleNamespace(measures=[SimpleNamespace(samples=1)])
    lost = SimpleNamespace(worst=-0.3, row=lambda: {"metrics": {}}, report=report, bytes=1)
    lost.bits_per_weight = 2.0
    assert {gate.max_drop for gate in with_evidence(recipe, lost, 0.1, 0.1, None).gates} == {0.05}  # type: ignore[arg-type]
    (tmp_path / "file").write_text("")
    nowhere = ["allocate", "--max-size", "500kB", "--out", str(tmp_path / "file" / "a.yaml")]
    refused = CliRunner().invoke(cli, [*nowhere, "--folder", str(tmp_path / "none")])
    assert refused.exit_code == 1
    assert "write failed" in refused.stderr
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize(
    ("text", "size"), [("4.2GB", 4_200_000_000), ("900kB", 900_000), ("4 GiB", 2**32), ("123", 123)]
)
def test_sizes(text: str, size: int) -> None:
    assert ByteSize().convert(text, None, None) == size


def test_bits_of_a_retrieval_model_are_chosen_and_proven_by_its_recall(tmp_path: Path) -> None:
    recipe = base_recipe("demo-blip2-itm", None, (), 8, 0).model_dump_json()
    setup = Setup(tmp_path, recipe, samples=8, batch=8, device="cpu")
    asked = request(max_size=1_500_000, per="component", points=2, samples=12, bits=(3, 8))
    found = allocate(setup, asked, pool.inline, ignore)
    assert found.confirmed is not None
    assert list(found.confirmed.row()["metrics"]) == ["retrieval r1"]
    assert found.confirmed.bytes == found.winner.measured.bytes <= 1_500_000
    assert [(gate.task, gate.metric) for gate in found.recipe.gates] == [("retrieval", "r1")]
    assert found.sensitivity["qformer"]["W3 g128"] > found.sensitivity["qformer"]["W8 g128"] > 0
    assert {rule.component for rule in found.recipe.quantize} == {"vision", "qformer"}
