"""The Python API: what `exporter` exports. docs/reference/python-api.md documents it and states its stability.

Every function calls what the command of the same name calls. A failed gate or check raises nothing here: the result has
the verdict.
"""

from collections.abc import Sequence
from pathlib import Path

from exporter import data as sources
from exporter.artifact import verify as verification
from exporter.artifact.manifest import Manifest
from exporter.artifact.output import default_out
from exporter.artifact.verify import Load, Verification
from exporter.device import Device, choose
from exporter.errors import MmqError
from exporter.evaluation.answers import Store
from exporter.evaluation.opened_artifact import OpenedArtifact
from exporter.evaluation.report_file import Report
from exporter.events import Event, Listener, ignore
from exporter.model.source import open_source
from exporter.pipeline import export as exporting
from exporter.pipeline.export import Export
from exporter.pipeline.measurement import default_store
from exporter.pipeline.preparation import prepare
from exporter.pipeline.reevaluation import Reevaluation
from exporter.pipeline.serving_check import check_artifact, program_for
from exporter.pipeline.serving_check import questions as test_questions
from exporter.planning import recipe_file
from exporter.planning.overrides import adjusted
from exporter.planning.plan import Plan
from exporter.planning.recipe import Recipe
from exporter.planning.vllm_kernels import read_hardware
from exporter.publishing.card import CardDeclarations
from exporter.publishing.publication import PublishRequest, benchmark, publish_artifact
from exporter.publishing.upload import Publication
from exporter.serving.check import CheckResult, Session
from exporter.serving.launch import START_SECONDS
from exporter.serving.preflight import refuse_plan
from exporter.serving.reference import BOUND

Data = str | Path | Sequence[str | Path]


def load_recipe(name_or_path: str | Path) -> Recipe:
    """Load a built-in recipe by its name, or a recipe from a YAML file.

    RecipeError lists all problems of the file.
    """
    return recipe_file.load_recipe(str(name_or_path))


def plan(
    recipe: str | Path | Recipe,
    *,
    model: str | Path | None = None,
    revision: str | None = None,
    adapter: str | Path | None = None,
    device: str | Device = "auto",
    samples: int | None = None,
    eval_samples: int | None = None,
    eval_batch: int | None = None,
    serve_on: str | None = None,
    on_event: Listener = ignore,
) -> Plan:
    """Plan an export from the headers of the model's files: the decision for every tensor, sizes, memory and seconds.

    model, revision, adapter, samples, eval_samples, eval_batch: replace the values of the recipe.
    serve_on: fail unless vLLM can serve the artifact there: a GPU's compute capability (`9.0`) or `cpu`.
    """
    final_recipe = adjusted(_loaded(recipe), model, revision, None, samples, eval_samples, (), eval_batch, adapter)
    export_plan, checkpoint = prepare(final_recipe, _device(device), headers_only=True, on_event=on_event)
    if serve_on:
        refuse_plan(export_plan, checkpoint.config, read_hardware(serve_on))
    return export_plan


def export(
    recipe: str | Path | Recipe,
    *,
    model: str | Path | None = None,
    out: str | Path | None = None,
    revision: str | None = None,
    adapter: str | Path | None = None,
    device: str | Device = "auto",
    data: Data = (),
    seed: int | None = None,
    samples: int | None = None,
    eval_samples: int | None = None,
    eval_batch: int | None = None,
    skip_evaluation: bool = False,
    work: str | Path | None = None,
    overwrite: bool = False,
    on_event: Listener = ignore,
) -> Export:
    """Quantize a model by a recipe into the folder `out`, verify the artifact and measure its scores.

    A failed gate raises nothing: read `report.verdict` of the result. A stopped export resumes when it is called again.

    out: the artifact's folder; None means `artifacts/MODEL-RECIPE`.
    model, revision, adapter, data, seed, samples, eval_samples, eval_batch: replace the values of the recipe.
    data: a source as on the command line (`coco:/data/coco`, or a folder), or a list with a source for each task.
    work: folder for finished blocks; None means beside `out`, and mmq removes it at the end.
    """
    final_recipe = adjusted(_loaded(recipe), model, revision, seed, samples, eval_samples, data, eval_batch, adapter)
    return exporting.export(
        final_recipe,
        out=default_out(final_recipe) if out is None else Path(out),
        device=_device(device),
        on_event=on_event,
        work=None if work is None else Path(work),
        sources=sources.places(data),
        overwrite=overwrite,
        skip_evaluation=skip_evaluation,
    )


def verify(
    artifact: str | Path,
    *,
    load: Load = "blocks",
    source: str | Path | None = None,
    adapter: str | Path | None = None,
    device: str | Device = "auto",
    on_event: Listener = ignore,
) -> Verification:
    """Verify an artifact: hashes, integers, patterns of the configuration, and outputs of every block in transformers.

    ArtifactError lists everything that is wrong.

    load: `nothing` checks files and integers only; `whole` also loads the whole model, 8 bytes per parameter.
    source, adapter: the full-precision model, compared with every row of the quantized weights.
    """
    adapted = None if adapter is None else str(adapter)
    original = None if source is None else open_source(str(source), adapter=adapted)[0]
    return verification.verify(Path(artifact), _device(device), on_event, load, original)


def evaluate(
    artifact: str | Path,
    *,
    baseline: str | Path | None = None,
    adapter: str | Path | None = None,
    other_baseline: bool = False,
    data: Data = (),
    eval_samples: int | None = None,
    eval_batch: int | None = None,
    answers: str | Path | None = None,
    fresh: bool = False,
    device: str | Device = "auto",
    on_event: Listener = ignore,
) -> Report:
    """Measure an artifact beside its full-precision model in this process, and decide the gates of its recipe.

    A failed gate raises nothing: read `verdict` of the report. The report replaces the artifact's report.

    baseline, adapter: the full-precision model; None means the source in the recipe.
    other_baseline: allow a model that the artifact was not made from.
    data, eval_samples, eval_batch: replace the values of the recipe.
    answers: folder of stored answers; None means `.mmq-answers` beside the artifact.
    fresh: store and reuse no answers.
    """
    folder = Path(artifact)
    artifact_recipe = load_recipe(folder / "recipe.yaml")
    final_recipe = adjusted(artifact_recipe, baseline, None, None, None, eval_samples, data, eval_batch, adapter)
    store = None if fresh else Store(Path(answers)) if answers else default_store(folder)
    data_sources, target = sources.places(data), _device(device)
    return Reevaluation(
        folder, final_recipe, target, on_event, data_sources, store, other_baseline=other_baseline
    ).measure()


def check(
    artifact: str | Path,
    *,
    vllm: str | None = None,
    questions: int = 16,
    bound: float = BOUND,
    control: bool | str = True,
    tensor_parallel: int = 1,
    flags: Sequence[str] = (),
    wait: float = START_SECONDS,
    logs: str | Path | None = None,
    data: Data = (),
    device: str | Device = "auto",
    on_event: Listener = ignore,
) -> CheckResult:
    """Start vLLM on an artifact and compare its log-probabilities with the dequantized weights in transformers.

    A failed check raises nothing: read `passed` and `problems` of the result. Report and manifest store the result.

    vllm: the vllm program or command; None means `MMQ_VLLM`, or `vllm` on the PATH.
    flags: more flags of `vllm serve`.
    questions: number of pictures.
    bound: mean difference of log-probabilities that is always allowed.
    control: also start vLLM on doubled scales, of the component with this name or of the first packed component.
    wait: seconds until vLLM must be healthy.
    logs: folder for the logs of vLLM.
    data: replaces the recipe's test data.
    """
    folder = Path(artifact)
    session = Session(
        program_for(folder, vllm),
        _device(device),
        on_event,
        tensor_parallel,
        tuple(flags),
        wait,
        bound,
        None if logs is None else Path(logs),
        control if isinstance(control, str) else None,
    )
    samples = test_questions(folder, sources.places(data), questions)
    return check_artifact(folder, samples, session, control=bool(control))


def publish(
    artifact: str | Path,
    repo: str | None = None,
    *,
    revision: str | None = None,
    create_pr: bool = False,
    public: bool = False,
    replace: bool = False,
    force: bool = False,
    accept_built_in_data: bool = False,
    dry_run: bool = False,
    base_model: str | None = None,
    license: str | None = None,
    datasets: Sequence[str] = (),
    languages: Sequence[str] = (),
    benchmarks: Sequence[str] = (),
    device: str | Device = "auto",
    on_event: Listener = ignore,
) -> Publication:
    """Put a proven artifact on the hub, in one commit. The arguments are the options of `mmq publish`.

    PublishError lists every reason against it, such as a failed gate. The token is the hub library's.

    repo: `ORG/NAME`; None means the repository in the recipe.
    benchmarks: `TASK=ORG/DATASET:TASK_ID`.
    dry_run: prove and package, and send nothing; the result then has no commit.
    """
    keys = {"license": license} if license else {}
    tasks = dict(benchmark(text) for text in benchmarks)
    declared = CardDeclarations(base_model, keys, tuple(datasets), tuple(languages), tasks)
    options = (public, create_pr, replace, force, accept_built_in_data, dry_run)
    result = publish_artifact(
        PublishRequest(Path(artifact), repo, revision, *options, declared), _device(device), on_event
    )
    sizes = result.package.sizes()
    return result.publication or Publication("", "", len(sizes), sum(sizes.values()))


def open_artifact(artifact: str | Path, *, device: str | Device = "cpu") -> OpenedArtifact:
    """Open an artifact: a read-only mapping of the source's tensor names to dequantized tensors.

    It reads headers, manifest and report; a tensor is read when it is accessed, and is not cached.

    device: where packed tensors are dequantized, and where all tensors are returned.
    """
    return OpenedArtifact(Path(artifact), _device(device))


def _device(device: str | Device) -> Device:
    return device if isinstance(device, Device) else choose(device)


def _loaded(recipe: str | Path | Recipe) -> Recipe:
    return recipe if isinstance(recipe, Recipe) else load_recipe(recipe)


__all__ = [
    "CheckResult",
    "Device",
    "Event",
    "Export",
    "Listener",
    "Manifest",
    "MmqError",
    "OpenedArtifact",
    "Plan",
    "Publication",
    "Recipe",
    "Report",
    "Verification",
    "check",
    "evaluate",
    "export",
    "load_recipe",
    "open_artifact",
    "plan",
    "publish",
    "verify",
]
