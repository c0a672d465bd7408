"""Studies: grids, shared units, scores, resumed runs, and worker pools."""

import json
import math
import statistics
import sys
import weakref
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file

from exporter.commands.main import cli
from exporter.commands.options import print_result
from exporter.data.tasks import retrieval
from exporter.errors import DataError, MmqError, RecipeError
from exporter.events import Event, ignore
from exporter.methods import METHODS
from exporter.model.families import FAMILIES
from exporter.model.inference.predict import Predictor
from exporter.planning.plan import Unit
from exporter.planning.recipe import Rule
from exporter.planning.whole_model import whole_model
from exporter.quantization.workdir import UnitResult
from exporter.study import exam, retrieval_exam, worker_pool, worker_tasks
from exporter.study.grid import Grid, Setting, parse_grid, settings_of, with_full_precision
from exporter.study.prepare import base_recipe
from exporter.study.ray_workers import ray_pool
from exporter.study.records import (
    CHANGE,
    CHANGE_ERROR,
    ERROR,
    FILE,
    SAMPLES,
    Records,
    ScoredSetting,
    comparable,
    full_outside_grid,
    last_exam,
    read_records,
)
from exporter.study.result_tables import outcome_page
from exporter.study.run import Outcome, keys_of_run, run
from exporter.study.score_table import read_table
from exporter.study.setting_tensors import SettingTensors, changes
from exporter.study.units import units_of
from exporter.study.worker_tasks import (
    Examiner,
    Setup,
    exam_samples,
    examiner,
    make_units,
    open_model,
    setting_of,
    store_of,
)
from tests.children import KillAt, run_killed
from tests.pool_functions import die, double, read_without_memory
from tests.shared_exams import share_exams
from tests.slow import some
from tests.tiny_models import QUICK

SMALL = {"samples": 8, "batch": 8, "device": "cpu"}


@pytest.fixture(autouse=True)
def shared_exams(monkeypatch: pytest.MonkeyPatch) -> None:
    share_exams(monkeypatch)


def setup_in(folder: Path, **changed: Any) -> Setup:
    recipe = base_recipe("demo-llava", None, (), 8, 0)
    return Setup(folder, recipe.model_dump_json(), **{**SMALL, **changed})


def grid(**content: Any) -> Grid:
    return parse_grid({"methods": ["rtn"], **content}, "a test")


def settings(a_grid: Grid) -> list[Setting]:
    model = open_model(setup_in(Path("unused")))
    return settings_of(a_grid, model.family, model.checkpoint.config)[0]


def test_a_product_has_every_combination_once() -> None:
    points = settings(grid(components={"vision": {"bits": [4, 8, 16]}, "language": {"bits": [3, 16]}}))
    assert len(points) == 6
    labels = [(dict(point.about)["vision_bits"], dict(point.about)["language_bits"]) for point in points]
    assert labels == [(v, q) for v in (4, 8, 16) for q in (3, 16)]
    assert [len(point.rules) for point in points] == [2, 1, 2, 1, 1, 0]


def test_blocks_and_roles_become_rules_and_choices_without_linears_are_reported() -> None:
    model = open_model(setup_in(Path("unused")))  # two blocks: they are its front and its middle
    axis = {"bits": [4, 16], "blocks": ["front", "end", "front+middle"], "roles": ["all", "mlp"]}
    grid_settings, notes = settings_of(
        grid(components={"vision": axis}, combine="alone"), model.family, model.checkpoint.config
    )
    assert [(point.rules[0].blocks, point.rules[0].role) for point in grid_settings[:2]] == [
        ("front", None),
        ("front", "mlp"),
    ]
    assert [len(point.rules) for point in grid_settings] == [1, 1, 2, 2, 0]
    assert len(notes) == 2
    assert "no linear in blocks end" in notes[0]


def test_a_grid_without_settings_or_with_lists_of_unequal_length_is_an_error() -> None:
    model = open_model(setup_in(Path("unused")))
    nowhere = grid(components={"vision": {"bits": [4], "blocks": ["5:9"]}}, combine="alone")
    with pytest.raises(RecipeError, match="no setting: vision has no linear in blocks 5:9 with role all"):
        settings_of(nowhere, model.family, model.checkpoint.config)
    uneven = grid(components={"vision": {"bits": [3, 4]}, "language": {"bits": [4]}}, combine="together")
    with pytest.raises(RecipeError, match="vision 2, language 1"):
        settings_of(uneven, model.family, model.checkpoint.config)


def test_a_study_always_measures_its_reference() -> None:
    model = open_model(setup_in(Path("unused")))
    without = settings(grid(components={"vision": {"bits": [4, 8]}, "language": {"bits": [3]}}))
    extended = with_full_precision(without, model.family)
    assert extended[:-1] == without
    assert extended[-1].rules == ()
    assert {value for name, value in extended[-1].about if name.endswith("_bits")} == {16}
    assert [name for name, _ in extended[-1].about] == [name for name, _ in without[0].about]
    assert with_full_precision(extended, model.family) == extended


def test_changes_are_paired_by_sample() -> None:
    """Two models that fail different samples have the same score, and the change between them an error."""
    before, after = [1.0, 1.0, 0.0, 1.0], [1.0, 0.0, 1.0, 1.0]
    scores = exam.overall([after, [1.0, 1.0]], [before, [0.0, 0.0]])
    assert scores[CHANGE] == pytest.approx((0 + 1) / 2)
    assert scores[CHANGE_ERROR] == pytest.approx(math.sqrt(statistics.variance([0, -1, 1, 0]) / 4) / 2)
    assert scores[ERROR] == pytest.approx(math.sqrt(statistics.variance(after) / 4) / 2)
    assert CHANGE not in exam.overall([after])


def test_together_gives_all_components_the_same_choice() -> None:
    axis = {"bits": [3, 4]}
    points = settings(grid(components={"vision": axis, "language": axis}, combine="together"))
    assert [[rule.bits for rule in point.rules] for point in points] == [[3, 3], [4, 4]]


def test_every_mistake_of_a_grid_is_listed() -> None:
    content = {"components": {"vision": {"bits": [1], "block": ["all"]}}, "methods": ["gtpq"], "group_sizes": [7]}
    with pytest.raises(RecipeError) as caught:
        parse_grid(content, "g.yaml")
    for text in ("g.yaml has 4 problems", "bits must be 2 to 8", "Did you mean 'blocks'", "'gptq'", "multiple of 8"):
        assert text in str(caught.value)
    with pytest.raises(RecipeError, match="Did you mean 'vision'"):
        settings(grid(components={"vison": {}}))


def test_keys_of_units_depend_exactly_on_what_determines_their_numbers() -> None:
    model = open_model(setup_in(Path("unused")))

    def keys(calibration: str, *rules: Rule) -> set[str]:
        return {unit.key for unit in units_of(model.plan(rules), "source", calibration)}

    both = keys("c", Rule(component="vision", bits=4), Rule(component="language", bits=3))
    assert keys("c", Rule(component="vision", bits=4)) < both
    assert keys("c", Rule(component="vision", bits=4, blocks="front", role="mlp")) < both
    assert len(both) == 8  # two blocks of two components, attention and mlp
    assert keys("other", Rule(component="vision", bits=4)) < both  # rounding reads no data
    gptq = Rule(component="vision", bits=4, method="gptq")
    assert not keys("c", gptq) & keys("other", gptq)
    assert not keys("c", gptq) & both
    assert not keys("c", Rule(component="vision", bits=4, group_size=32)) & both


def test_a_setting_made_of_units_is_the_rounded_model(tmp_path: Path) -> None:
    """Compare with a simple implementation that rounds each weight separately."""
    setup = setup_in(tmp_path)
    rules = (Rule(component="vision", bits=3, role="mlp"), Rule(component="language", bits=4, blocks="front"))
    run(setup, [Setting(rules, (("vision_bits", 3),))], worker_pool.inline, ignore)
    model = open_model(setup)
    plan = model.plan(rules)
    keys = keys_of_run(setup, model, ignore)
    units = units_of(plan, keys.model, "not read by rtn")
    tensors = changes(store_of(setup).read(unit) for unit in units)
    setting = setting_of(setup, rules, keys, [])
    assert {name for block in setting.blocks for name in setting.changes(block)} == tensors.keys()
    assert all(torch.equal(setting.tensor(name), tensor) for name, tensor in tensors.items())
    assert setting.tensor("language_model.model.norm.weight") is None
    rows = [row for row in plan.rows if row.rule]
    assert len(rows) == 2 * 2 + 7
    assert tensors.keys() == {row.tensor.name for row in rows}
    for row in rows:
        assert row.rule is not None
        weight = model.checkpoint.read(row.tensor.name).float()
        options = row.rule.parsed_options()
        quantized, _ = METHODS["rtn"].quantize_linear(weight, None, row.rule.scheme(), options, torch.bfloat16)
        assert torch.equal(tensors[row.tensor.name], quantized.dequantize())


@pytest.mark.parametrize("method", some(["gptq", "awq"], ["awq"]))  # AWQ does what GPTQ does, and folds scales
def test_a_unit_does_not_depend_on_other_units_of_the_same_pass(tmp_path: Path, method: str) -> None:
    """One pass over the blocks quantizes units of several rules; each equals the result of a separate pass."""
    rule = Rule(component="vision", bits=2, method=method, group_size=32, options=QUICK[method])
    choices = [rule, rule.model_copy(update={"bits": 4})]
    model = open_model(setup_in(tmp_path))
    units = [unit for rule in choices for unit in units_of(model.plan((rule,)), "source", "data")]

    def stored_tensors(setup: Setup) -> dict[str, dict[str, torch.Tensor]]:
        return {path.name: load_file(path) for path in (setup.folder / "units").glob("*.safetensors")}

    together, apart = setup_in(tmp_path / "together"), setup_in(tmp_path / "apart")
    assert make_units(together, units).result == 8
    for unit in units:
        assert make_units(apart, [unit]).result == 1
    stored_together, stored_apart = stored_tensors(together), stored_tensors(apart)
    assert len(stored_together) == 8
    assert stored_together.keys() == stored_apart.keys()
    for name, unit_tensors in stored_together.items():
        assert unit_tensors.keys() == stored_apart[name].keys()
        assert all(torch.equal(tensor, stored_apart[name][key]) for key, tensor in unit_tensors.items())


def test_composing_is_exact_for_rounding_and_not_for_gptq(tmp_path: Path) -> None:
    """RTN gives the weights of an export; GPTQ in an export also compensates errors of earlier blocks."""
    for method in ("rtn", "gptq"):
        rules = tuple(
            Rule(component=name, bits=4, method=method, options=QUICK[method]) for name in ("vision", "language")
        )
        point = Setting(rules, (("vision_bits", 4), ("language_bits", 4)))
        shared, exact = (
            run(setup_in(tmp_path / method, sequential=way), [point], worker_pool.inline, ignore)
            .settings[0]
            .scores["kl"]
            for way in (False, True)
        )
        assert (shared == exact) == (method == "rtn")
        assert 0 < shared < 0.1
        assert 0 < exact < 0.1


def test_settings_share_units_and_are_measured_once(tmp_path: Path) -> None:
    setup = setup_in(tmp_path)
    wide = settings(grid(components={"vision": {"bits": [4, 16]}, "language": {"bits": [4, 16]}}))
    first = run(setup, wide, worker_pool.inline, ignore)
    assert (first.scored, first.quantized, first.units, first.used_units) == (4, 8, 8, 16)
    again = run(setup, wide, worker_pool.inline, ignore)
    assert (again.scored, again.quantized) == (0, 0)
    assert [setting.scores for setting in again.settings] == [setting.scores for setting in first.settings]
    parts = settings(grid(components={"vision": {"bits": [4], "roles": ["mlp"], "blocks": ["front"]}}))
    part = run(setup, parts, worker_pool.inline, ignore)
    assert (part.scored, part.quantized) == (1, 0)
    full, least = first.settings[3], first.settings[0]
    assert full.scores["kl"] == 0
    assert full.bits_per_weight == 16
    assert part.settings[0].scores["kl"] > 0
    assert part.settings[0].bytes > least.bytes


def test_a_run_that_reuses_everything_shows_its_own_exam(tmp_path: Path) -> None:
    """The table shows the exam of the last run, not of the last written setting."""
    few, more = setup_in(tmp_path), setup_in(tmp_path, samples=9)
    two = settings(grid(components={"vision": {"bits": [4, 16]}}))
    first = run(few, two, worker_pool.inline, ignore)
    assert {setting.exam for setting in last_exam(read_records(tmp_path))} == {first.settings[0].exam}
    second = run(more, two[:1], worker_pool.inline, ignore)
    assert [setting.exam for setting in comparable(read_records(tmp_path))] == [second.settings[0].exam]
    again = run(few, two, worker_pool.inline, ignore)
    assert again.scored == 0
    assert {setting.id for setting in comparable(read_records(tmp_path))} == {setting.id for setting in first.settings}


def test_exact_replies_equal_greedy_answers() -> None:
    """Compare with generation, on a model with some wrong answers."""
    setup = setup_in(Path("unused"), samples=16)
    model_examiner = examiner(setup)
    model = open_model(setup)
    broken = {}
    for row in model.plan((Rule(component="language", bits=3),)).rows:
        if row.rule:
            weight = model.checkpoint.read(row.tensor.name).float()
            quantized, _ = METHODS["rtn"].quantize_linear(
                weight, None, row.rule.scheme(), row.rule.parsed_options(), torch.bfloat16
            )
            broken[row.tensor.name] = quantized.dequantize()
    forced = model_examiner.grade(Rounded(broken))
    family = FAMILIES["llava"]
    predictor = Predictor(model_examiner._live, model_examiner._processor, family, torch.device("cpu"), 8)
    for task, samples in exam_samples(setup).items():
        answers = predictor.answer(samples)
        right = [answer == sample.references[0] for answer, sample in zip(answers, samples, strict=True)]
        assert forced[f"{task} exact"] == pytest.approx(sum(right) / len(right))
    assert 0 < forced["captioning exact"] < 1
    assert model_examiner.grade(SettingTensors((), unread))["kl"] == 0  # the full-precision weights are restored


def unread(unit: Unit) -> UnitResult:
    """A reader of units that must not be called."""
    raise AssertionError(unit)


class Rounded(SettingTensors):
    """A setting of given tensors instead of stored units."""

    def __init__(self, tensors: Mapping[str, torch.Tensor]) -> None:
        super().__init__((), unread)
        self._tensors = dict(tensors)
        self._units = {name.removesuffix(".weight"): [] for name in tensors}

    def changes(self, block: str) -> dict[str, torch.Tensor]:
        """One linear."""
        return {f"{block}.weight": self._tensors[f"{block}.weight"]}


@pytest.mark.parametrize(("model", "component"), [("demo-llava", "projector"), ("demo-blip2-itm", "qformer")])
def test_scores_are_the_same_where_only_blocks_fit(
    model: str, component: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Grade settings one after the other, so that the tensors of the previous setting must be restored."""
    monkeypatch.setattr("exporter.data.DEMO_CANDIDATES", 3)
    recipe = base_recipe(model, None, (), 8, 0).model_dump_json()
    setup = Setup(tmp_path, recipe, samples=3, batch=2, device="cpu")
    vision, other = Rule(component="vision", bits=3), Rule(component=component, bits=2, store="dequantized")
    rules: list[tuple[Rule, ...]] = [(vision, other), (), (vision,)]
    points = [Setting(setting_rules, (("setting", i),)) for i, setting_rules in enumerate(rules)]
    expected = [setting.scores for setting in run(setup, points, worker_pool.inline, ignore).settings]
    assert expected[0]["kl"] > expected[2]["kl"] > expected[1]["kl"] == 0
    whole = whole_model(
        open_model(setup).checkpoint.tensors, open_model(setup).family, open_model(setup).checkpoint.config
    )
    monkeypatch.setattr(worker_tasks, "free_bytes", lambda device: whole.weight_bytes(itemsize=4))
    passing = Examiner(setup)
    assert passing._passing
    living: list[tuple[str, weakref.ref[UnitResult]]] = []
    for setting_rules, scores in zip(rules, expected, strict=True):
        setting = setting_of(setup, setting_rules, keys_of_run(setup, open_model(setup), ignore), [])
        monkeypatch.setattr(setting, "_read", alone(setting, setting._read, living))
        assert passing.grade(setting) == pytest.approx(
            scores, abs=1e-6
        )  # other batches have another order of summation
    assert len(living) > len(passing._inside)


def alone(
    setting: SettingTensors, read: Callable[[Unit], UnitResult], living: list[tuple[str, weakref.ref[UnitResult]]]
) -> Callable[[Unit], UnitResult]:
    """A reader of units that asserts that no unit of another block is in memory."""

    def reading(unit: Unit) -> UnitResult:
        assert not setting._last[1]
        assert not [block for block, result in living if block != unit.block and result() is not None]
        result = read(unit)
        living.append((unit.block, weakref.ref(result)))
        return result

    return reading


def test_divergence_is_the_sum_over_the_vocabulary() -> None:
    torch.manual_seed(0)
    truth, other = torch.randn(3, 5).log_softmax(-1), torch.randn(3, 5).log_softmax(-1)
    pairs = [zip(a.tolist(), b.tolist(), strict=True) for a, b in zip(truth, other, strict=True)]
    slow = [sum(math.exp(t) * (t - f) for t, f in pair) for pair in pairs]
    assert exam.divergence(truth, other).tolist() == pytest.approx(slow, rel=1e-5)


def wide_study(folder: Path, on_event: Callable[[Event], None]) -> Outcome:
    """Four settings of two components."""
    wide = settings(grid(components={"vision": {"bits": [4, 16]}, "language": {"bits": [4, 16]}}))
    return run(setup_in(folder), wide, worker_pool.inline, on_event)


@pytest.mark.parametrize(
    ("stage", "done", "scored", "quantized"), [("study units", 4, 4, 4), ("study points", 3, 1, 0)]
)
def test_a_killed_study_resumes(tmp_path: Path, stage: str, done: int, scored: int, quantized: int) -> None:
    run_killed(wide_study, tmp_path, KillAt(stage, done))
    outcome = wide_study(tmp_path, ignore)
    assert (outcome.scored, outcome.quantized) == (scored, quantized)
    assert len(read_records(tmp_path)) == 4


def check_pool(run_tasks: worker_pool.WorkerPool) -> None:
    assert sorted(run_tasks(double, [(3,), (4,), (5,)])) == [(0, 6), (1, 8), (2, 10)]
    assert list(run_tasks(double, [])) == []
    with pytest.raises(DataError, match="negative"):
        list(run_tasks(double, [(-1,), (1,)]))


def test_processes_give_results_and_errors() -> None:
    with worker_pool.local(1) as workers:
        check_pool(workers)
    with worker_pool.local(2) as workers:
        check_pool(workers)
        with pytest.raises(MemoryError):
            list(workers(read_without_memory, [(1,), (2,)]))
        with pytest.raises(MmqError, match="a worker process of the study was killed"):
            list(workers(die, [(1,), (2,)]))


def test_ray_gives_results_and_errors() -> None:
    pytest.importorskip("ray")
    with ray_pool(None) as workers:
        check_pool(workers)


def test_without_ray_the_hint_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(DataError, match="ray") as caught, ray_pool(None):
        pass
    assert caught.value.hint is not None
    assert "pip install '.[ray]'" in caught.value.hint


def test_progress_has_the_remaining_seconds(tmp_path: Path) -> None:
    events: list[Event] = []
    run(setup_in(tmp_path), settings(grid(components={"vision": {"bits": [3, 4]}})), worker_pool.inline, events.append)
    points = [event for event in events if event.stage == "study points"]
    left = [event.numbers["left"] for event in points[1:]]
    assert left[0] > 0
    assert left[-1] == 0
    starts = [(event.stage, event.done) for event in events if event.stage != "hash"]
    assert starts[:3] == [("prepare", 0), ("prepare", 1), ("study units", 0)]  # before workers start
    assert (points[0].done, points[0].total) == (0, 2)


def test_the_command_measures_a_grid_and_reports_reuse(tmp_path: Path) -> None:
    arguments = ["study", "--bits", "4,16", "--methods", "rtn", "--samples", "8", "--calibration", "8"]
    arguments += ["--workers", "1", "--device", "cpu", "--out", str(tmp_path / "s")]
    result = CliRunner().invoke(cli, [*arguments, "--json"])
    assert result.exit_code == 0, result.output
    result_data = json.loads(result.stdout)
    assert len(result_data["points"]) == 4
    assert (result_data["units"], result_data["units_named"]) == (8, 16)
    assert (tmp_path / "s" / "study.csv").read_text().startswith("vision_bits,projector_bits,language_bits")
    text = CliRunner().invoke(cli, arguments)
    assert "3 settings and full precision, 0 scored in this run" in text.output
    assert read_table(tmp_path / "s").components == ("vision", "language")
    wrong = CliRunner().invoke(cli, ["study", "--components", "visio", "--out", str(tmp_path / "t")])
    assert wrong.exit_code == 1
    assert "Did you mean 'vision'" in wrong.stderr


def measured(name: str, exam: str, **about: str | int) -> ScoredSetting:
    return ScoredSetting(
        name, exam, {"blocks": "all", "role": "all", "method": "rtn", **about}, 1, 1.0, 0.0, 0.0, {"kl": 0.0}
    )


def test_the_page_of_a_sequential_study_counts_quantized_units(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    two = settings(grid(components={"vision": {"bits": [4, 16]}}))
    outcome = run(setup_in(tmp_path, sequential=True), two, worker_pool.inline, ignore)
    assert outcome.quantized == 4  # attention and mlp of two blocks
    monkeypatch.setenv("COLUMNS", "70")
    print_result(outcome_page(outcome))
    text = capsys.readouterr().out
    assert "as an export does: 4 units, none shared" in text
    assert {"captioning", "score"} <= set(text.splitlines()[0].split())  # no column is cut
    assert "-0.0000" not in text


def test_the_score_of_a_retrieval_model_is_the_recall_of_its_answers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("exporter.data.DEMO_CANDIDATES", 4)
    recipe = base_recipe("demo-blip2-itm", None, (), 8, 0).model_dump_json()
    setup = Setup(tmp_path, recipe, samples=8, batch=8, device="cpu")
    broken = (Rule(component="qformer", bits=2),)
    both = [Setting((), (("qformer_bits", 16),)), Setting(broken, (("qformer_bits", 2),))]
    full, worse = (setting.scores for setting in run(setup, both, worker_pool.inline, ignore).settings)
    assert set(worse) == {
        *(f"retrieval {name}" for name in ("r1", "text_r1", "image_r1", "kl")),
        "score",
        "kl",
        *(ERROR, SAMPLES, CHANGE, CHANGE_ERROR),
    }
    assert full[CHANGE] == full[CHANGE_ERROR] == 0
    assert worse[CHANGE] == pytest.approx(worse["score"] - full["score"])
    assert worse[CHANGE_ERROR] > 0
    assert full["kl"] == pytest.approx(0, abs=1e-6)
    assert worse["kl"] > 0.01
    assert full["score"] > worse["score"] > 0
    model_examiner, model = examiner(setup), open_model(setup)
    model_examiner.grade(setting_of(setup, broken, keys_of_run(setup, model, ignore), []))
    samples = exam_samples(setup)["retrieval"]
    predictor = Predictor(model_examiner._live, model_examiner._processor, model.family, torch.device("cpu"), 8)
    recalls = retrieval.score(predictor.answer(samples), samples)
    assert worse["score"] == worse["retrieval r1"] == pytest.approx(sum(recalls["r1"]) / 8)
    assert worse["retrieval text_r1"] == pytest.approx(sum(recalls["text_r1"]) / 8)


def test_divergence_of_candidates_is_the_mean_over_queries() -> None:
    truth, other = torch.tensor([1.0, 2.0, 0.5, -1.0, 3.0]), torch.tensor([1.5, 0.0, 0.5, 1.0, float("nan")])
    slow = 0.0
    for a, b in ((truth[:2], other[:2]), (truth[2:4], other[2:4])):
        p, q = ([math.exp(v) for v in x.tolist()] for x in (a, b))
        slow += sum(x / sum(p) * math.log(x / sum(p) / (y / sum(q))) for x, y in zip(p, q, strict=True)) / 2
    assert retrieval_exam.divergence(truth[:4], other[:4], [2, 2]) == pytest.approx(slow, rel=1e-5)
    assert (
        1000 < retrieval_exam.divergence(truth, other, [2, 3]) < math.inf
    )  # scores that are not finite give a large finite divergence


def test_the_full_precision_model_is_outside_a_grid_without_16_bits() -> None:
    def at(vision: int, language: int) -> ScoredSetting:
        method = "none" if vision == language == 16 else "rtn"
        return measured(f"{vision}-{language}", "e", vision_bits=vision, language_bits=language, method=method)

    full, low = at(16, 16), [at(3, 3), at(3, 4), at(4, 3)]
    assert full_outside_grid([*low, full]) is full
    assert full_outside_grid([*low, at(16, 3), full]) is None
    assert full_outside_grid([at(3, 16), at(4, 16), full]) is full  # only vision varies
    assert full_outside_grid([full]) is None
    assert full_outside_grid(low) is None


def test_a_table_has_settings_of_one_exam_only() -> None:
    old, new = measured("a", "old"), measured("b", "new")
    front, again = measured("c", "new", blocks="front"), measured("d", "new in sequence", sequential=1)
    assert comparable([old, new]) == [new]
    assert comparable([old, front, new]) == [new]
    assert comparable([old, new, front], parts=True) == [new, front]
    assert comparable([old, front]) == [front]
    assert comparable([new, again]) == [again]
    assert comparable([]) == []


def test_another_calibration_or_model_is_another_exam(tmp_path: Path) -> None:
    full_precision = settings(grid(components={"language": {"bits": [16]}}))

    def exam_of(model: str, calibrated: int) -> str:
        recipe = base_recipe(model, None, (), calibrated, 0)
        setup = Setup(tmp_path / "s", recipe.model_dump_json(), **SMALL)
        return run(setup, full_precision, worker_pool.inline, ignore).settings[0].exam

    first = exam_of("demo-llava", 8)
    assert exam_of("demo-llava", 9) != first
    assert exam_of("demo-blip2", 8) != first
    assert exam_of("demo-llava", 8) == first
    assert {setting.exam for setting in last_exam(read_records(tmp_path / "s"))} == {first}


def test_the_order_of_rows_does_not_depend_on_the_order_of_scoring(tmp_path: Path) -> None:
    for name, order in (("a", (3, 2, 8)), ("b", (8, 3, 2))):
        with Records(tmp_path / name / FILE) as records:
            records.begin("x")
            for bits in order:
                records.add(measured(f"{name}{bits}", "x", vision_bits=bits))
    assert [setting.about for setting in read_records(tmp_path / "a")] == [
        setting.about for setting in read_records(tmp_path / "b")
    ]
