"""Samples of an export: calibration and test samples by the recipe, without a shared picture."""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from exporter import data
from exporter.artifact.manifest import read_manifest
from exporter.data.tasks.sample import Sample, task_of
from exporter.errors import DataError
from exporter.events import Listener, preparing
from exporter.planning.plan import Plan
from exporter.planning.recipe import Recipe


@dataclass(frozen=True)
class ExportSamples:
    """Calibration samples, their traces, and the test samples of each task."""

    calibration: list[Sample]
    traces: list[data.Trace]
    evaluation: dict[str, list[Sample]]

    @property
    def tested(self) -> list[Sample]:
        """Test samples of all tasks."""
        return [sample for samples in self.evaluation.values() for sample in samples]


def read_samples(
    plan: Plan, sources: Sequence[data.SourceSpec], skip_evaluation: bool, on_event: Listener
) -> ExportSamples:
    """Read the recipe's samples; DataError when calibration and evaluation share a picture."""
    with preparing(on_event, "reading samples"), _offering_tasks(plan.recipe, sources, skip_evaluation):
        evaluation = {} if skip_evaluation else evaluation_samples(plan, sources)
        calibration = calibration_samples(plan, sources)
        traces = data.traces(calibration)
        data.check_disjoint(traces, [sample for samples in evaluation.values() for sample in samples])
    return ExportSamples(calibration, traces, evaluation)


@contextmanager
def _offering_tasks(recipe: Recipe, sources: Sequence[data.SourceSpec], skip_evaluation: bool) -> Iterator[None]:
    """A DataError inside names the option that makes the job fit the data, if some task of the recipe has samples."""
    try:
        yield
    except DataError as error:
        tasks = () if error.problems else tasks_with_samples(recipe, sources, skip_evaluation)
        if not tasks or set(tasks) == {gate.task for gate in recipe.gates}:
            raise
        option = " ".join(f"--task {task}" for task in tasks)
        hint = f"add `{option}`: the job then needs only what this data has, and drops the gates of other tasks"
        raise DataError(error.message, f"{hint}; {error.hint}" if error.hint else hint) from None


def tasks_with_samples(
    recipe: Recipe, sources: Sequence[data.SourceSpec], skip_evaluation: bool = False
) -> tuple[str, ...]:
    """Tasks of the recipe's gates with a sample to test, and one to calibrate where the recipe calibrates on the task.

    skip_evaluation: nothing is tested. Reads every row of the data, and one picture of each task and split.
    """

    def has(task: str, split: str, specs: Sequence[data.SourceSpec]) -> bool:
        with suppress(DataError):
            return bool(data.samples_from(specs, task, split, 1, recipe.evaluation.seed))
        return False

    calibration, test = sources or data.places(recipe.calibration.data), sources or test_sources(recipe)
    return tuple(
        task
        for task in dict.fromkeys(gate.task for gate in recipe.gates)
        if (task not in recipe.calibration.tasks or has(task, "train", calibration))
        and (skip_evaluation or has(task, "test", test))
    )


def data_lines(samples: ExportSamples) -> list[str]:
    """The data of an export for `mmq plan --data`: number of samples by task, and notes."""

    def counts(of: Sequence[Sample]) -> str:
        by_task = Counter(task_of(sample) for sample in of)
        return ", ".join(f"{count:,} {task}" for task, count in sorted(by_task.items())) or "none"

    lines = [f"data: calibration {counts(samples.calibration)}; test {counts(samples.tested)}; no shared picture"]
    return lines + list(data.notes(samples.calibration, samples.tested))


def refuse_calibration_pictures(out: Path, evaluation: Mapping[str, Sequence[Sample]]) -> None:
    """DataError when `evaluation` has a picture that the manifest in `out` lists as a calibration picture."""
    recorded = read_manifest(out).provenance.calibration.samples
    traces = [data.Trace.from_json(sample.model_dump(exclude_none=True)) for sample in recorded]
    data.check_disjoint(traces, [sample for samples in evaluation.values() for sample in samples])


def calibration_samples(plan: Plan, sources: Sequence[data.SourceSpec]) -> list[Sample]:
    """Calibration samples of the plan's recipe; empty when no method needs data."""
    return training_samples(plan.recipe, sources) if plan.needs_calibration else []


def training_samples(recipe: Recipe, sources: Sequence[data.SourceSpec]) -> list[Sample]:
    """Calibration samples of a recipe, alternating between its tasks (DataError when there are none)."""
    settings = recipe.calibration
    share = -(-settings.samples // len(settings.tasks))
    specs = sources or data.places(settings.data)
    lists = [data.samples_from(specs, task, "train", share, settings.seed) for task in settings.tasks]
    mixed = [sample for group in zip(*lists, strict=False) for sample in group][: settings.samples]
    if not mixed:
        raise DataError(f"the data has no calibration samples for {', '.join(settings.tasks)}")
    return mixed


def evaluation_samples(plan: Plan, sources: Sequence[data.SourceSpec]) -> dict[str, list[Sample]]:
    """Test samples of each task that a gate names; without gates, of each task of the family.

    When all data are drawings, captioning is left out and its gates are not measured: captions of the drawings have
    one fixed wording that no model but the embedded ones produces. Calibration still uses them.
    """
    settings = plan.recipe.evaluation
    tasks = tuple(dict.fromkeys(gate.task for gate in plan.recipe.gates)) or plan.family.tasks
    specs = sources or test_sources(plan.recipe)
    if all(spec.name == "drawings" for spec in specs):
        measurable = [task for task in plan.family.tasks if task != "captioning"]
        tasks = tuple(task for task in tasks if task in measurable) or tuple(measurable)
    try:
        return {task: data.samples_from(specs, task, "test", settings.samples, settings.seed) for task in tasks}
    except DataError as error:
        hint = (
            f"the recipe's gates need samples of {' and '.join(tasks)}: give data for each task, or change the gates "
            "in a copy of the recipe"
        )
        raise DataError(error.message, f"{error.hint}; {hint}" if error.hint else hint) from None


def data_paths(recipe: Recipe, sources: Sequence[data.SourceSpec]) -> list[Path]:
    """Files and folders of this machine that the samples of a recipe are read from."""
    specs = sources or (*data.places(recipe.calibration.data), *test_sources(recipe))
    return [spec.path for spec in specs if spec.path and spec.path.exists()]


def test_sources(recipe: Recipe) -> tuple[data.SourceSpec, ...]:
    """Sources of test samples: `evaluation.data` of the recipe, else its `calibration.data`."""
    return data.places(recipe.calibration.data if recipe.evaluation.data is None else recipe.evaluation.data)
