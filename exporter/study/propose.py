"""Turn an allocation into a recipe: build it, export and measure it, and add the results as evidence."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from exporter import data
from exporter.artifact.manifest import read_manifest
from exporter.data.tasks import main_metric, measured
from exporter.data.tasks.sample import Sample
from exporter.device import Device
from exporter.errors import ArtifactError, RecipeError
from exporter.evaluation.report_file import Measure, Report, read_report
from exporter.events import Listener
from exporter.files.writing import make_folder, write_text
from exporter.model.families import Family
from exporter.pipeline.export import export
from exporter.pipeline.preparation import with_suitable_data
from exporter.planning.fitting_recipes import fitting_recipes
from exporter.planning.recipe import Evaluation, Evidence, Gate, Recipe, widths
from exporter.planning.recipe_file import load_recipe
from exporter.study.allocate import Allocation, Slot, rules_of

CLOSE = 0.05  # largest drop of a confirmed recipe, and of a gate without --max-drop
MARGIN = 0.01  # gates allow this much more than the measured drop, without --max-drop


@dataclass(frozen=True)
class MeasuredRecipe:
    """The result of exporting and measuring a recipe.

    change: mean relative change of the tasks' main metrics, a share of the full score. worst: the lowest of them.
    """

    name: str
    bytes: int
    bits_per_weight: float
    change: float
    worst: float
    report: Report

    @property
    def samples(self) -> int:
        """Number of test samples of each task."""
        return self.report.measures[0].samples

    def row(self) -> dict[str, Any]:
        """JSON-compatible data: size, change, and each metric before and after with its interval."""
        return {
            "recipe": self.name,
            "bytes": self.bytes,
            "bits_per_weight": self.bits_per_weight,
            "change": self.change,
            "worst_change": self.worst,
            "metrics": {f"{m.task} {m.metric}": _with_interval(m) for m in _main_measures(self.report)},
        }


def _with_interval(measure: Measure) -> dict[str, Any]:
    """A measured difference as JSON-compatible data, with the interval that decides gates."""
    low, high = measure.interval()
    return measure.difference.model_dump() | {"low": low, "high": high}


def _main_measures(report: Report) -> list[Measure]:
    """The measures of each task's main metric."""
    names = {(measure.task, measure.metric) for measure in report.measures}
    mains = {task: main_metric(task, {metric for of, metric in names if of == task}) for task, _ in names}
    return [measure for measure in report.measures if measure.metric == mains[measure.task]]


def recipe_of(
    base: Recipe,
    name: str,
    slots: Sequence[Slot],
    allocation: Allocation,
    exam: Mapping[str, Sequence[Sample]],
    max_drop: float,
) -> Recipe:
    """The recipe of an allocation, with a gate on the main metric of each task of the exam, and without evidence.

    Raises RecipeError if the allocation quantizes nothing.
    """
    rules = rules_of(slots, allocation.options)
    if not rules:
        raise RecipeError("the allocation keeps everything at 16 bits", "lower --max-size, or raise --max-drop")
    gates = tuple(
        Gate(task=task, metric=measured(task, samples)[0], max_drop=max_drop) for task, samples in exam.items()
    )
    return base.model_copy(
        update={
            "name": name,
            "summary": f"{widths(rules)}; bits chosen by mmq allocate",
            "quantize": rules,
            "gates": gates,
        }
    )


def confirm(
    recipe: Recipe,
    folder: Path,
    device: Device,
    sources: Sequence[data.SourceSpec],
    samples: int,
    on_event: Listener,
) -> MeasuredRecipe:
    """Export a recipe into a folder named by the recipe's digest, and measure generated answers.

    If an earlier run exported the same recipe from the same model and data, its artifact is verified and its stored
    answers are reused.
    """
    recipe = with_suitable_data(recipe.model_copy(update={"evaluation": Evaluation(samples=samples)}))
    out = folder / f"{recipe.name}-{recipe.digest()[:12]}"
    make_folder(folder)
    export(recipe, out=out, device=device, on_event=on_event, sources=sources, overwrite=True)
    return read_confirmed(recipe.name, out)


def read_confirmed(name: str, out: Path) -> MeasuredRecipe:
    """Read the results of an exported and measured artifact. Raises ArtifactError without a report."""
    (report, _), manifest = read_report(out), read_manifest(out)
    if report is None:
        raise ArtifactError(f"{out} has no evaluation", "delete the folder and run the same command again")
    changes = [
        measure.difference.change / measure.difference.before
        for measure in _main_measures(report)
        if measure.difference.before > 0
    ]
    worst = min(changes, default=math.nan)
    mean = sum(changes) / len(changes) if changes else math.nan
    return MeasuredRecipe(name, manifest.bytes.after, manifest.bits_per_weight, mean, worst, report)


def comparable(name: str, base: Recipe, family: Family) -> Recipe:
    """A hand-written recipe with the model, data and gates of `base`, so that only the rules differ.

    Raises RecipeError if a rule names a component that the model's family does not have.
    """
    names = [recipe.name for recipe in fitting_recipes(family)]
    hand_written = load_recipe(name, lambda: names)
    if problems := hand_written.foreign_components(family):
        raise RecipeError(
            "\n".join([f"recipe '{name}' does not fit {base.model.repo}:", *problems]),
            f"built-in recipes for family {family.name}: {', '.join(names)}",
        )
    return base.model_copy(
        update={"name": hand_written.name, "summary": hand_written.description(), "quantize": hand_written.quantize}
    )


def with_evidence(
    recipe: Recipe, confirmed: MeasuredRecipe | None, predicted: float, measured: float, max_drop: float | None
) -> Recipe:
    """The recipe with evidence and final gates. confirmed: results on real tasks, None if they were not measured.

    predicted, measured: sum of the slots' divergences, and divergence of the whole allocation, in KL per token.
    Gates allow `max_drop`. Without it they allow the measured drop plus MARGIN, but at most CLOSE, so that an
    allocation with a large loss fails its own gates; without a measurement they allow MARGIN.
    """
    drop = max(-confirmed.worst, 0) if confirmed else 0.0
    allowed = max_drop if max_drop is not None else min(CLOSE, math.ceil(100 * (drop + MARGIN)) / 100)
    optimality = Evidence(
        finding="No other allocation of these schemes with this size has a smaller sum of measured divergences.",
        figures=f"KL per token: sum {predicted:z.5f}, measured together {measured:z.5f}",
        source=f"mmq allocate on {recipe.model.repo}; each scheme measured alone in each part",
    )
    gates = tuple(gate.model_copy(update={"max_drop": allowed}) for gate in recipe.gates)
    return recipe.model_copy(update={"gates": gates, "evidence": (optimality, _real_task_evidence(confirmed))})


def _real_task_evidence(confirmed: MeasuredRecipe | None) -> Evidence:
    """Evidence from real tasks."""
    if confirmed is None:
        return Evidence(finding="Not proven by real tasks.", figures="none", source="mmq allocate --no-proof")
    lines = []
    for name, difference in confirmed.row()["metrics"].items():
        before, after = difference["before"], difference["after"]
        change, low, high = (difference[key] / before if before else 0.0 for key in ("change", "low", "high"))
        change_text = f"change {change:+z.1%}, 95 % interval {low:+z.1%} to {high:+z.1%}"
        lines.append(f"{name} {before:.4f} -> {after:.4f} ({change_text})")
    size = f"{confirmed.bytes:,} bytes, {confirmed.bits_per_weight:.2f} bits per weight"
    return Evidence(
        finding="Real tasks confirm it."
        if confirmed.worst >= -CLOSE
        else f"It loses {-confirmed.worst:.0%} on real tasks.",
        figures=f"{size}; {'; '.join(lines)}; {confirmed.samples} samples of each task",
        source="mmq export and evaluate, run by mmq allocate",
    )


def write_recipe(recipe: Recipe, path: Path, command: str) -> None:
    """Write the recipe as YAML without default values; the comment at its head holds the summary and the commands."""
    content = recipe.model_dump(mode="json", exclude_defaults=True, exclude={"name"})
    text = yaml.safe_dump(content, sort_keys=False, allow_unicode=True, width=120)
    write_text(path, f"# {recipe.description()}.\n#   {command}\n#   mmq export --recipe {path}\n{text}")
