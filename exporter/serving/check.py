"""`mmq check`: compare vLLM's answers with those of the artifact's dequantized weights in transformers.

The engine answers questions about images with greedy decoding and log-probabilities; `reference` computes the expected
values. A negative control proves that the comparison detects errors: a copy of the artifact with doubled scales in one
component must answer far from the reference, and close to a reference with the same doubled scales. The engine's log
lists the scheme of each linear.
"""

import math
import tempfile
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from exporter.artifact.artifact import Artifact
from exporter.artifact.manifest import ServingVerdict, read_manifest, write_manifest
from exporter.artifact.output_folder import updating
from exporter.data.tasks.sample import Sample, task_of
from exporter.evaluation.report_file import ServingRecord, read_report, write_report
from exporter.events import Event, notice
from exporter.model.inference.openai_client import png
from exporter.model.inference.predict import prompt_text
from exporter.planning.vllm_rules import engine_classes
from exporter.serving.comparison import CheckSettings, Control, DoubledRun, judge
from exporter.serving.launch import launch
from exporter.serving.negative_control import disturbed_component, double_scales
from exporter.serving.plugin import with_plugin
from exporter.serving.preflight import hardware, needs_plugin, refuse_artifact_here, refuse_unservable
from exporter.serving.reference import EngineComparison, reference_placements
from exporter.serving.vllm_engine import Engine, Reply, free_port


@dataclass(frozen=True)
class CheckResult:
    """Result of a check. problems: reasons for its failure.

    schemes: scheme class of the engine -> number of linears, from its log. kernels: `kernel for scheme`, from its log.
    """

    engine: str
    build: str
    questions: int
    bound: float
    compared: EngineComparison | None
    control: Control | None
    schemes: Mapping[str, int]
    kernels: tuple[str, ...]
    startup_seconds: float
    problems: tuple[str, ...]

    @property
    def passed(self) -> bool:
        """Whether there are no problems."""
        return not self.problems


@dataclass(frozen=True)
class EngineRun:
    """Result of one run of the engine. schemes: runtime name -> scheme class. seconds: startup time."""

    replies: list[Reply]
    schemes: Mapping[str, str]
    kernels: tuple[str, ...]
    seconds: float


def check(
    folder: Path, samples: Sequence[Sample], processor: Any, settings: CheckSettings, control: bool = True
) -> CheckResult:
    """Serve `folder`, send it `samples` and compare; ServeError when the engine does not start or answer."""
    artifact = Artifact.open(folder)
    refuse_unservable(artifact, hardware(settings.program), settings.tensor_parallel)
    refuse_artifact_here(settings.program, artifact)
    component = disturbed_component(artifact, settings.disturb)
    reference_placements(artifact, settings.device)  # refuses what is too large before the engine starts
    with tempfile.TemporaryDirectory(prefix="mmq-check-") as temporary:
        scratch = Path(temporary)
        logs = settings.logs or scratch
        logs.mkdir(parents=True, exist_ok=True)
        run = _run_engine(folder, artifact, samples, settings, logs / "engine.log")
        logs_schemes = artifact.manifest.format == "compressed_tensors"
        problems = scheme_problems(artifact, run.schemes) if logs_schemes else []
        doubled = None
        if control and component and not problems:
            copy = double_scales(artifact, folder, component, scratch / folder.resolve().name)
            note, log = f" with the scales of {component} doubled", logs / "doubled.log"
            doubled = DoubledRun(component, copy, _run_engine(copy, artifact, samples, settings, log, note).replies)
        compared, control_result = None, None
        if not problems:
            compared, control_result, problems = judge(artifact, samples, run.replies, doubled, processor, settings)
    return _result(settings, run, compared, control_result, problems)


def _result(
    settings: CheckSettings,
    run: EngineRun,
    compared: EngineComparison | None,
    control: Control | None,
    problems: Sequence[str],
) -> CheckResult:
    return CheckResult(
        settings.program.version,
        "cpu" if settings.program.cpu else "gpu",
        len(run.replies),
        settings.bound,
        compared,
        control,
        dict(Counter(run.schemes.values())),
        run.kernels,
        run.seconds,
        tuple(problems),
    )


def _run_engine(
    folder: Path, artifact: Artifact, samples: Sequence[Sample], settings: CheckSettings, log: Path, note: str = ""
) -> EngineRun:
    command = launch(
        folder,
        artifact.checkpoint.config,
        settings.program,
        port=free_port(),
        family=artifact.family,
        tensor_parallel=settings.tensor_parallel,
        kv_cache=artifact.manifest.kv_cache,
        extra=settings.extra,
    )
    command = with_plugin(command, settings.program.version) if needs_plugin(artifact) else command
    settings.on_event(notice(f"starting vllm {settings.program.version} on {folder.name}{note}"))
    with Engine(command, log, debug=True) as engine:
        seconds = engine.wait_healthy(settings.start_seconds)
        replies = []
        for i, sample in enumerate(samples):
            longest = artifact.family.max_new_tokens[task_of(sample)]
            replies.append(engine.ask(prompt_text(artifact.family, sample), png(sample.image()), longest))
            settings.on_event(Event("ask", i + 1, len(samples), folder.name))
    return EngineRun(replies, engine.schemes(), engine.kernels(), seconds)


def scheme_problems(artifact: Artifact, log: Mapping[str, str]) -> list[str]:
    """One line per linear whose scheme in the engine's log differs from the artifact's, or is missing."""
    problems = []
    for module in artifact.manifest.linears:
        name = artifact.family.engine_name(module)
        expected, actual = engine_classes(artifact.scheme_of(module)), log.get(name) or log.get(module)
        if actual not in expected:
            text = actual or "none (the linear runs unquantized or under another name)"
            problems.append(f"{name}: the scheme in vllm's log is {text}; expected {' or '.join(expected)}")
    return sorted(set(problems), key=problems.index)


def store_result(folder: Path, checked: CheckResult, weights: str) -> None:
    """Write the result of a check into the artifact's report and its verdict into the manifest, both under `serving`.

    weights: `backends.weights_digest` of the served artifact, which ties the result to it.
    """
    plain = _finite({"passed": checked.passed, **asdict(checked), "weights": weights})
    record = ServingRecord.model_validate(plain, strict=False)
    verdict = ServingVerdict(engine=f"vllm {checked.engine}", build=checked.build, passed=checked.passed)
    with updating(folder):
        report, _ = read_report(folder)
        write_report(folder, report, record)
        write_manifest(folder, read_manifest(folder).model_copy(update={"serving": verdict}))


def _finite(value: Any) -> Any:
    """Plain data with None for non-finite numbers, because an engine may return non-finite log-probabilities."""
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value


def as_plain(checked: CheckResult) -> dict[str, Any]:
    """Plain data for files and `--json`."""
    return {"passed": checked.passed, **asdict(checked)}
