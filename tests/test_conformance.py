"""Statistics of every tiny model of the registry equal those of transformers' forward pass of the whole model."""

from importlib.util import find_spec
from math import isfinite
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from exporter.artifact.artifact import Artifact
from exporter.data.tasks import TASKS
from exporter.device import choose
from exporter.evaluation.backends import ARTIFACT, SOURCE
from exporter.evaluation.report_file import read_report
from exporter.events import Event, ignore
from exporter.model.checkpoint import Checkpoint
from exporter.model.families import FAMILIES, Family
from exporter.pipeline.export import export
from exporter.planning.recipe import Recipe
from exporter.planning.recipe_file import load_recipe
from exporter.publishing.artifact_summary import folder_reader, read_summary
from exporter.publishing.report import collect, html
from exporter.quantization import calibrate
from exporter.quantization.workdir import Workdir
from tests.slow import some, some_of
from tests.test_calibrate import plan_for
from tests.test_whole_forward import gathered
from tests.tiny_models import CONFIGS, random_weights, tiny_inputs, write_tiny
from tests.whole_forward import captured_rows, rules, stacks

# Every kind of component once: the other parts of a family run in LLaVA in `test_whole_forward.py`, and families of the
# same parts run block by block in `test_families.py`.
SAME_PARTS = ("llava-next", "qwen2-vl", "smolvlm")
DIFFERENT = [name for name in FAMILIES if name not in SAME_PARTS]
MODELS = pytest.mark.parametrize(("family", "config"), some_of(CONFIGS, [*DIFFERENT, "llava-pixtral"]))
# Passes of their own, and blocks that are no chain; test_export.py and test_blip2.py stop chains.
PASSES = ("blip2-itm", "qwen3-vl")
# Every kind of component once; all families are compared with their whole forward pass. test_added_family.py opens the
# components of LLaVA.
OPENED = ("llava-onevision", "qwen2.5-vl", "qwen3-vl", "blip2", "blip2-itm")
EVALUATED = 4  # samples per task
TASKS_OF = {("vqa", "captioning"): ["captioning", "vqa"], ("retrieval",): ["retrieval"]}


@pytest.mark.parametrize("name", some(FAMILIES, PASSES))
def test_stopped_in_every_component_and_resumed_gives_the_same_integers(name: str, tmp_path: Path) -> None:
    check_stopped(name, tmp_path, every_unit=False)


@pytest.mark.slow
@pytest.mark.parametrize("name", FAMILIES)
def test_stopped_after_any_unit_and_resumed_gives_the_same_integers(name: str, tmp_path: Path) -> None:
    check_stopped(name, tmp_path, every_unit=True)


def check_stopped(name: str, tmp_path: Path, every_unit: bool) -> None:
    """Stop after every second unit, or after the first of every component."""
    family, config = CONFIGS[name]
    checkpoint = Checkpoint.open(write_tiny(tmp_path / "model", family), family.canonical_name)
    plan = plan_for(checkpoint, rules(family, "awq"), family)
    batches = [tiny_inputs(family, 2, 6, config), tiny_inputs(family, 3, 9, config)]
    whole, parts = Workdir.open(tmp_path / "whole", {}), Workdir.open(tmp_path / "parts", {})
    calibrate.run(plan, checkpoint, whole, batches, choose("cpu"), lambda event: None)
    first = {unit.component: unit for unit in reversed(plan.units)}
    for unit in plan.units[::2] if every_unit else sorted(first.values(), key=lambda unit: unit.index):

        def stop_after(event: Event, last: int = unit.index + 1) -> None:
            if event.stage == "quantize" and event.done == last and event.message != "resumed":
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            calibrate.run(plan, checkpoint, parts, batches, choose("cpu"), stop_after)
    calibrate.run(plan, checkpoint, parts, batches, choose("cpu"), lambda event: None)
    for unit in plan.units:
        first, second = (load_file(tmp_path / name / unit.file) for name in ("whole", "parts"))
        assert first.keys() == second.keys()
        assert all(torch.equal(tensor, second[key]) for key, tensor in first.items()), unit.block
        assert whole.read(unit).errors == parts.read(unit).errors


@pytest.mark.parametrize(
    ("name", "method"),
    [
        pytest.param(name, method, marks=() if method == "awq" and name in OPENED else pytest.mark.slow)
        for name in FAMILIES
        for method in ("gptq", "awq")  # AWQ does what GPTQ does, and folds scales
    ],
)
def test_every_component_is_what_transformers_opens(name: str, method: str, tmp_path: Path) -> None:
    family, config = CONFIGS[name]
    recipe = load_recipe("llava-w4").model_dump() | {
        "quantize": [rule.model_dump() for rule in rules(family, method)],
        "model": {"repo": str(write_tiny(tmp_path / "model", family))},
        "calibration": {"data": "demo", "tasks": TASKS_OF[family.tasks], "samples": 3, "batch": 3},
        "gates": (),
    }
    done = export(
        Recipe.model_validate(recipe), out=tmp_path / "out", device=choose("cpu"), on_event=ignore, skip_evaluation=True
    )
    if find_spec("compressed_tensors"):
        assert done.verified.block_difference == pytest.approx(0, abs=1e-4)
        assert done.verified.skipped == ""
        stored = sum(part.stored(config) for part in family.components)
        assert done.verified.blocks >= stored  # the retrieval model runs its blocks in several passes
    artifact, source = Artifact.open(tmp_path / "out"), Checkpoint.open(tmp_path / "model", family.canonical_name)
    assert set(artifact.names()) == set(source.tensors)
    packed = {row.module for row in done.plan.rows if row.decision == "packed"}
    assert packed == set(artifact.manifest.linears) != set()
    for component in family.components:
        if component.without_data:
            continue
        for i in range(component.used(config)):
            for linear in component.linears_of(config, i):
                module = component.module(i, linear)
                assert (module in packed) == (component.unpackable is None), module
                assert not torch.equal(artifact.read(f"{module}.weight"), source.read(f"{module}.weight").float())


def evaluated_recipe(family: Family, folder: Path) -> Recipe:
    """Rounding to 8 bits, which needs no calibration; all tasks with a gate each, on a few drawings."""
    rounded = [part for part in family.components if part.name in ("vision", "language")]
    quantize = [{"component": part.name, "method": "rtn", "bits": 8, "group_size": "row"} for part in rounded]
    gates = [{"task": task, "metric": TASKS[task].DEFAULT[0], "max_drop": 0.5} for task in family.tasks]
    changed = {"quantize": quantize, "gates": gates, "model": {"repo": str(folder)}}
    changed["evaluation"] = {"data": ("demo",), "samples": EVALUATED, "batch": EVALUATED}
    changed["max_new_tokens"] = dict.fromkeys(family.max_new_tokens, 4)  # random weights never end a reply
    return Recipe.model_validate(load_recipe("llava-w4").model_dump() | changed)


@pytest.mark.parametrize("name", some(FAMILIES, PASSES))
def test_an_evaluated_export_has_a_complete_report(name: str, tmp_path: Path) -> None:
    """Both models answered every sample of every task; how well is no question for random weights."""
    family, _ = CONFIGS[name]
    recipe = evaluated_recipe(family, write_tiny(tmp_path / "model", family))
    done = export(recipe, out=tmp_path / "out", device=choose("cpu"), on_event=ignore)
    report, _ = read_report(tmp_path / "out")
    assert report is not None
    assert report == done.report
    assert report.samples.keys() == report.counts.keys() == set(family.tasks)
    expected = {(task, metric) for task in family.tasks for metric in TASKS[task].DEFAULT}
    assert {(task, metric) for task, stored in report.samples.items() for metric in stored.scores} == expected
    assert {(measure.task, measure.metric) for measure in report.measures} == expected
    for stored in report.samples.values():
        assert len(stored.ids) == EVALUATED
        for scores in stored.scores.values():
            assert len(scores.before) == len(scores.after) == EVALUATED
            assert all(map(isfinite, (*scores.before, *scores.after)))
    assert [(gate.task, gate.max_drop) for gate in report.gates] == [(task, 0.5) for task in family.tasks]
    assert {pair.task for pair in report.examples} == set(family.tasks)
    identities = report.evaluation.models
    assert identities.keys() == {SOURCE, ARTIFACT}
    assert identities[SOURCE].weights != identities[ARTIFACT].weights
    assert "evaluate" in {step.name for step in done.measured}
    summary = read_summary("out", folder_reader(tmp_path / "out"))
    page = html(collect(summary, {}))
    assert all(recipe.name in page and task in page for task in family.tasks)


@MODELS
def test_statistics_equal_those_of_the_whole_forward_pass(
    family: Family, config: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = write_tiny(tmp_path / "model", family, torch.float32, config)
    checkpoint = Checkpoint.open(folder, family.canonical_name)
    plan = plan_for(checkpoint, rules(family), family)
    batches = [tiny_inputs(family, 2, 6, config), tiny_inputs(family, 3, 9, config)]
    workdir = Workdir.open(tmp_path / "work", {})
    with gathered(monkeypatch) as hessians:
        calibrate.run(plan, checkpoint, workdir, batches, choose("cpu"), lambda event: None)
    model = random_weights(family.skeleton({**config, "dtype": "float32"}).eval())
    results = {name: linear for unit in plan.units for name, linear in workdir.read(unit).linears.items()}
    assert len(hessians) == len(stacks(plan)) > 0
    for (component, modules), hessian in zip(stacks(plan), hessians, strict=True):
        x = captured_rows(model, family, component, modules[0], config, batches)
        whole = (x.T @ x / len(x)).float()
        assert float((hessian - whole).norm() / whole.norm()) < 1e-5, modules[0]
        for module in modules:
            model.get_submodule(family.live_name(module)).weight.data = results[module].as_served()
