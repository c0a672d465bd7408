"""Does the serving engine answer as the artifact's dequantized weights do in transformers?

The engine answers questions about images, greedily, with log-probabilities, and `reference` is the yardstick. A
control shows that the comparison would notice: a copy of the artifact in which one component's scales are doubled
must answer far from the reference, and close to a reference that has the same doubled scales. The engine's log says
which scheme it gave each linear.
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
from exporter.device import Device, release
from exporter.evaluation.report_file import ServingRecord, read_report, write_report
from exporter.events import Event, Listener
from exporter.inference.openai_client import png
from exporter.inference.predict import prompt_text
from exporter.planning.vllm_rules import engine_classes
from exporter.serving.launch import Program, launch
from exporter.serving.negative_control import disturbed, double_scales
from exporter.serving.plugin import with_plugin
from exporter.serving.preflight import hardware, needs_plugin, refuse_unservable
from exporter.serving.reference import BOUND, Compared, Distance, Reference
from exporter.serving.vllm_engine import Engine, Reply, free_port
from exporter.tasks.sample import Sample, task_of

MOVES = 5.0  # times the mean that is allowed that doubled scales must move the answers by


@dataclass(frozen=True)
class Control:
    """component: whose scales were doubled. moved: that engine beside the true reference; restored: beside one with
    the same doubled scales.
    """

    component: str
    moved: Distance
    restored: Compared


@dataclass(frozen=True)
class Checked:
    """What a check found. problems: why it failed.

    schemes: class of the engine -> linears, as its log says. kernels: `kernel for scheme`, from there too.
    """

    engine: str
    build: str
    questions: int
    bound: float
    compared: Compared | None
    control: Control | None
    schemes: Mapping[str, int]
    kernels: tuple[str, ...]
    startup_seconds: float
    problems: tuple[str, ...]

    @property
    def passed(self) -> bool:
        """Whether nothing was found."""
        return not self.problems


@dataclass(frozen=True)
class Session:
    """What a check needs of the outside: the program, how to start it, where to compute the reference, whom to tell.

    logs: folder that keeps what the engine said, `engine.log` and the control's `doubled.log` (None: nothing is kept).
    disturb: the component whose scales the control doubles (None: the first that has packed linears).
    """

    program: Program
    device: Device
    on_event: Listener
    tensor_parallel: int = 1
    extra: tuple[str, ...] = ()
    start_seconds: float = 900.0
    bound: float = BOUND
    logs: Path | None = None
    disturb: str | None = None


@dataclass(frozen=True)
class EngineRun:
    """What one start of the engine gave. schemes: of every linear by its log. seconds: until it was ready."""

    replies: list[Reply]
    schemes: Mapping[str, str]
    kernels: tuple[str, ...]
    seconds: float


@dataclass(frozen=True)
class Doubled:
    """The control's copy of an artifact: whose scales are doubled in it, and what the engine answered with it."""

    component: str
    folder: Path
    replies: list[Reply]


def check(folder: Path, samples: Sequence[Sample], processor: Any, session: Session, control: bool = True) -> Checked:
    """Serve `folder`, ask it about `samples`, compare (ServeError when the engine does not run or answer)."""
    artifact = Artifact.open(folder)
    refuse_unservable(artifact, hardware(session.program), session.tensor_parallel)
    component = disturbed(artifact, session.disturb)
    with tempfile.TemporaryDirectory(prefix="mmq-check-") as temporary:
        scratch = Path(temporary)
        logs = session.logs or scratch
        logs.mkdir(parents=True, exist_ok=True)
        asked = _ask_engine(folder, artifact, samples, session, logs / "engine.log")
        replies, told = asked.replies, artifact.manifest.format == "compressed_tensors"
        problems = scheme_problems(artifact, asked.schemes) if told else []
        doubled = None
        if control and component and not problems:
            copy = double_scales(artifact, folder, component, scratch / folder.resolve().name)
            note, log = f" with the scales of {component} doubled", logs / "doubled.log"
            doubled = Doubled(component, copy, _ask_engine(copy, artifact, samples, session, log, note).replies)
        compared, found = None, None
        if not problems:
            compared, found, problems = judge(artifact, samples, replies, doubled, processor, session)
    return _checked(session, asked, compared, found, problems)


def judge(
    artifact: Artifact,
    samples: Sequence[Sample],
    replies: Sequence[Reply],
    doubled: Doubled | None,
    processor: Any,
    session: Session,
) -> tuple[Compared | None, Control | None, list[str]]:
    """The replies beside the reference, the control, and what is wrong; uses the session's device and bound."""
    gpu = not session.program.cpu
    reference = Reference(artifact, processor, session.device, gpu)
    problems = reference.prompt_problems(samples, replies)
    if problems:
        return None, None, problems
    compared, control = reference.compare(samples, replies), None
    if doubled:
        far = reference.distance(samples, doubled.replies)
        del reference
        release(session.device)
        same = Reference(Artifact.open(doubled.folder), processor, session.device, gpu).compare(
            samples, doubled.replies
        )
        control = Control(doubled.component, far, same)
    return compared, control, distance_problems(compared, control, session.bound)


def _checked(
    session: Session, asked: EngineRun, compared: Compared | None, control: Control | None, problems: Sequence[str]
) -> Checked:
    return Checked(
        session.program.version,
        "cpu" if session.program.cpu else "gpu",
        len(asked.replies),
        session.bound,
        compared,
        control,
        dict(Counter(asked.schemes.values())),
        asked.kernels,
        asked.seconds,
        tuple(problems),
    )


def _ask_engine(
    folder: Path, artifact: Artifact, samples: Sequence[Sample], session: Session, log: Path, note: str = ""
) -> EngineRun:
    made = launch(
        folder,
        artifact.checkpoint.config,
        session.program,
        port=free_port(),
        fallback_prompt=artifact.family.fallback_prompt,
        tensor_parallel=session.tensor_parallel,
        extra=session.extra,
    )
    made = with_plugin(made, session.program.version) if needs_plugin(artifact) else made
    session.on_event(Event("note", 0, 0, f"starting vllm {session.program.version} on {folder.name}{note}"))
    with Engine(made, log, debug=True) as engine:
        seconds = engine.wait_healthy(session.start_seconds)
        replies = []
        for i, sample in enumerate(samples):
            longest = artifact.family.max_new_tokens[task_of(sample)]
            replies.append(engine.ask(prompt_text(artifact.family, sample), png(sample.image()), longest))
            session.on_event(Event("ask", i + 1, len(samples), folder.name))
    return EngineRun(replies, engine.schemes(), engine.kernels(), seconds)


def scheme_problems(artifact: Artifact, log: Mapping[str, str]) -> list[str]:
    """Linears that the engine gave another scheme than the artifact's, or none."""
    problems = []
    for module in artifact.manifest.linears:
        name = artifact.family.engine_name(module)
        expected, found = engine_classes(artifact.scheme_of(module)), log.get(name) or log.get(module)
        if found not in expected:
            said = found or "none (it runs unquantized, or under another name)"
            problems.append(f"{name}: vllm's log gives it the scheme {said}, expected {' or '.join(expected)}")
    return sorted(set(problems), key=problems.index)


def distance_problems(compared: Compared, control: Control | None, bound: float) -> list[str]:
    """What is too far, and what the control did not show."""
    problems = []
    if not compared.close(bound):
        problems.append(f"log-probabilities are too far from the reference's: {_said(compared, bound)}")
    if control and not control.moved.mean >= MOVES * compared.allowed(bound)[1]:
        said = f"moved the answers by {control.moved.mean:.4f} on average"
        problems.append(f"doubling the scales of {control.component} {said}: the comparison would not notice an error")
    if control and not control.restored.close(bound):
        said = _said(control.restored, bound)
        problems.append(f"with the scales of {control.component} doubled on both sides they are too far apart: {said}")
    return problems


def _said(compared: Compared, bound: float) -> str:
    d, (largest, mean) = compared.distance, compared.allowed(bound)
    return f"mean {d.mean:.4f} of {mean:.4f} allowed, largest {d.largest:.4f} of {largest:.4f} allowed"


def keep(folder: Path, checked: Checked, weights: str) -> None:
    """Put what a check measured into the artifact's report, and its verdict into the manifest, both under `serving`.

    weights: `backends.weights_digest` of what was served, so that no other artifact can claim the check.
    """
    report, _ = read_report(folder)
    plain = _finite({"passed": checked.passed, **asdict(checked), "weights": weights})
    write_report(folder, report, ServingRecord.model_validate(plain, strict=False))
    verdict = ServingVerdict(engine=f"vllm {checked.engine}", build=checked.build, passed=checked.passed)
    write_manifest(folder, read_manifest(folder).model_copy(update={"serving": verdict}))


def _finite(value: Any) -> Any:
    """Plain data with None for numbers that are not finite: an engine may answer such log-probabilities."""
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value


def as_plain(checked: Checked) -> dict[str, Any]:
    """Plain data for files and `--json`."""
    return {"passed": checked.passed, **asdict(checked)}
