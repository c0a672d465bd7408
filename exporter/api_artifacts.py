"""The functions of the Python API on a finished artifact: verify, evaluate, check, publish, open."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from exporter import data as sources
from exporter.artifact import verify as verification
from exporter.artifact.verify import Load, Verification
from exporter.device import Device, choose
from exporter.evaluation.answers import Store
from exporter.evaluation.opened_artifact import OpenedArtifact
from exporter.evaluation.report_file import Report
from exporter.events import Listener, ignore
from exporter.model.source import open_source
from exporter.pipeline.measurement import default_store
from exporter.pipeline.reevaluation import Reevaluation
from exporter.pipeline.serving_check import check_artifact, program_for
from exporter.pipeline.serving_check import questions as test_questions
from exporter.planning.overrides import adjusted
from exporter.planning.recipe_file import load_recipe
from exporter.publishing.card import CardDeclarations
from exporter.publishing.publication import PublishRequest, benchmark, publish_artifact
from exporter.publishing.upload import Publication
from exporter.serving.check import CheckResult
from exporter.serving.comparison import CheckSettings
from exporter.serving.launch import START_SECONDS
from exporter.serving.reference import BOUND

Data = str | Path | Sequence[str | Path]


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
    return verification.verify(Path(artifact), as_device(device), on_event, load, original)


def evaluate(
    artifact: str | Path,
    *,
    baseline: str | Path | None = None,
    adapter: str | Path | None = None,
    other_baseline: bool = False,
    data: Data = (),
    eval_samples: int | None = None,
    eval_batch: int | None = None,
    prompts: Mapping[str, str] | None = None,
    max_new_tokens: Mapping[str, int] | None = None,
    answers: str | Path | None = None,
    fresh: bool = False,
    device: str | Device = "auto",
    on_event: Listener = ignore,
) -> Report:
    """Measure an artifact beside its full-precision model in this process, and decide the gates of its recipe.

    A failed gate raises nothing: read `verdict` of the report. The report replaces the artifact's report.

    baseline, adapter: the full-precision model; None means the source in the recipe.
    other_baseline: allow a model that the artifact was not made from.
    data, eval_samples, eval_batch, prompts, max_new_tokens: replace the values of the recipe.
    answers: folder of stored answers; None means `.mmq-answers` beside the artifact.
    fresh: store and reuse no answers.
    """
    folder = Path(artifact)
    artifact_recipe = load_recipe(str(folder / "recipe.yaml"))
    final_recipe = adjusted(
        artifact_recipe,
        baseline,
        adapter=adapter,
        eval_samples=eval_samples,
        eval_batch=eval_batch,
        data=data,
        prompts=prompts,
        max_new_tokens=max_new_tokens,
    )
    store = None if fresh else Store(Path(answers)) if answers else default_store(folder)
    data_sources, target = sources.places(data), as_device(device)
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
    session = CheckSettings(
        program_for(folder, vllm),
        as_device(device),
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
        PublishRequest(Path(artifact), repo, revision, *options, declared), as_device(device), on_event
    )
    sizes = result.package.sizes()
    return result.publication or Publication("", "", len(sizes), sum(sizes.values()))


def open_artifact(artifact: str | Path, *, device: str | Device = "cpu") -> OpenedArtifact:
    """Open an artifact: a read-only mapping of the source's tensor names to dequantized tensors.

    It reads headers, manifest and report; a tensor is read when it is accessed, and is not cached.

    device: where packed tensors are dequantized, and where all tensors are returned.
    """
    return OpenedArtifact(Path(artifact), as_device(device))


def as_device(device: str | Device) -> Device:
    """The device itself, or the device with a name like `cuda:1`."""
    return device if isinstance(device, Device) else choose(device)
