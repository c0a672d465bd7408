"""From a choice of bits to a recipe with its evidence: the choice is exported and measured like any recipe."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from exporter import data
from exporter.artifact.manifest import read_manifest
from exporter.device import Device
from exporter.errors import ArtifactError, RecipeError
from exporter.evaluation.report_file import Measure, Report, read_report
from exporter.events import Listener
from exporter.files.writing import make_folder, write_text
from exporter.pipeline.export import export
from exporter.pipeline.preparation import with_suitable_data
from exporter.planning.recipe import Evaluation, Evidence, Gate, Recipe, Rule
from exporter.planning.recipe_file import load_recipe
from exporter.study.allocate import Allocation, Slot, rules_of
from exporter.tasks import TASKS

MOST = 0.99  # a gate that allows everything is none
CLOSE = 0.05  # a drop up to this is called confirmed, and a gate allows no more unless the user does
MARGIN = 0.01  # what a recipe's gates allow beyond the drop that was measured, when the user gave no limit


@dataclass(frozen=True)
class Confirmed:
    """A recipe exported and measured.

    change: mean over the tasks' main metrics of the change, a share of the full score; worst: the lowest of them.
    """

    name: str
    bytes: int
    bits_per_weight: float
    change: float
    worst: float
    report: Report

    def row(self) -> dict[str, Any]:
        """For tables and `--json`: size, change, and each metric before and after with its interval."""
        return {
            "recipe": self.name,
            "bytes": self.bytes,
            "bits_per_weight": self.bits_per_weight,
            "change": self.change,
            "worst_change": self.worst,
            "metrics": {f"{m.task} {m.metric}": m.difference.model_dump() for m in _main(self.report)},
        }


def _main(report: Report) -> list[Measure]:
    """The first metric of every task."""
    return [measure for measure in report.measures if measure.metric == _first(measure.task)]


def _first(task: str) -> str:
    return TASKS[task].METRICS[0]


def recipe_of(
    base: Recipe, name: str, places: Sequence[Slot], chosen: Allocation, tasks: Sequence[str], max_drop: float
) -> Recipe:
    """The recipe of a choice, with gates on each task's first metric and no evidence yet."""
    rules = rules_of(places, chosen.options)
    if not rules:
        raise RecipeError("the choice keeps everything at 16 bits", "lower --max-size, or raise --max-drop")
    gates = tuple(Gate(task=task, metric=_first(task), max_drop=max_drop) for task in tasks)
    return base.model_copy(
        update={
            "name": name,
            "summary": f"{summary(rules)}; bits chosen by mmq allocate",
            "quantize": rules,
            "gates": gates,
        }
    )


def summary(rules: Sequence[Rule]) -> str:
    """Which bits each component has."""
    bits: dict[str, list[int]] = {}
    for rule in rules:
        bits.setdefault(rule.component, []).append(rule.bits)
    spans = [
        f"{name} {min(found)}" + (f" to {max(found)}" if min(found) < max(found) else "")
        for name, found in bits.items()
    ]
    return ", ".join(spans) + " bits"


def confirm(
    recipe: Recipe,
    folder: Path,
    device: Device,
    sources: Sequence[data.SourceSpec],
    samples: int,
    on_event: Listener,
) -> Confirmed:
    """Export a recipe into a folder named by its content and measure real answers.

    What an earlier run made there of the same model and data is verified, and its kept answers are used.
    """
    recipe = with_suitable_data(recipe.model_copy(update={"evaluation": Evaluation(samples=samples)}))
    out = folder / f"{recipe.name}-{recipe.digest()[:12]}"
    make_folder(folder)
    export(recipe, out=out, device=device, on_event=on_event, sources=sources, overwrite=True)
    return read_confirmed(recipe.name, out)


def read_confirmed(name: str, out: Path) -> Confirmed:
    """What an exported and measured artifact shows."""
    (report, _), manifest = read_report(out), read_manifest(out)
    if report is None:
        raise ArtifactError(f"{out} was never evaluated", "delete the folder and run the same command again")
    changes = [m.difference.change / m.difference.before for m in _main(report) if m.difference.before > 0]
    worst = min(changes, default=math.nan)
    mean = sum(changes) / len(changes) if changes else math.nan
    return Confirmed(name, manifest.bytes.after, manifest.bits_per_weight, mean, worst, report)


def comparable(name: str, base: Recipe) -> Recipe:
    """A hand-written recipe with the model, data and gates of `base`, so that only its rules differ."""
    other = load_recipe(name)
    if other.model.family != base.model.family:
        raise RecipeError(f"recipe '{name}' is for family {other.model.family}, not {base.model.family}")
    return base.model_copy(update={"name": other.name, "summary": other.summary, "quantize": other.quantize})


def with_evidence(
    recipe: Recipe, found: Confirmed | None, predicted: float, measured: float, max_drop: float | None
) -> Recipe:
    """The recipe with what was measured of it. found: its real tasks, None when they were not measured.

    Gates allow `max_drop`; without one the measured drop and a margin, but at most CLOSE, so that a choice that lost
    much fails its own gates; or the margin alone when nothing was measured.
    """
    drop = max(-found.worst, 0) if found else 0.0
    allowed = max_drop if max_drop is not None else min(CLOSE, math.ceil(100 * (drop + MARGIN)) / 100)
    choice = Evidence(
        finding="No other choice of these schemes of this size has a smaller sum of measured divergences.",
        figures=f"KL a token: sum {predicted:z.5f}, measured together {measured:z.5f}",
        source=f"mmq allocate on {recipe.model.repo}; every scheme alone in every place",
    )
    gates = tuple(gate.model_copy(update={"max_drop": allowed}) for gate in recipe.gates)
    return recipe.model_copy(update={"gates": gates, "evidence": (choice, _proof(found))})


def _proof(found: Confirmed | None) -> Evidence:
    """What real tasks say."""
    if found is None:
        return Evidence(finding="Not proven by real tasks.", figures="none", source="mmq allocate --no-proof")
    lines = []
    for name, difference in found.row()["metrics"].items():
        before, after = difference["before"], difference["after"]
        change, low, high = (difference[key] / before if before else 0.0 for key in ("change", "low", "high"))
        shown = f"change {change:+z.1%}, 95 % interval {low:+z.1%} to {high:+z.1%}"
        lines.append(f"{name} {before:.4f} -> {after:.4f} ({shown})")
    samples = found.report.measures[0].samples
    size = f"{found.bytes:,} bytes, {found.bits_per_weight:.2f} bits a weight"
    return Evidence(
        finding="Real tasks confirm it." if found.worst >= -CLOSE else f"It loses {-found.worst:.0%} on real tasks.",
        figures=f"{size}; {'; '.join(lines)}; {samples} samples of each task",
        source="mmq export and evaluate, run by mmq allocate",
    )


def write_recipe(recipe: Recipe, path: Path, command: str) -> None:
    """The recipe as a YAML file that `load_recipe` reads, without defaults; its first lines say how it came about."""
    content = recipe.model_dump(mode="json", exclude_defaults=True, exclude={"name"})
    text = yaml.safe_dump(content, sort_keys=False, allow_unicode=True, width=120)
    write_text(path, f"# {recipe.summary}.\n#   {command}\n#   mmq export --recipe {path}\n{text}")
