"""Compares an engine's replies with the reference, and evaluates the negative control, in the memory that there is."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from exporter.artifact.artifact import Artifact
from exporter.data.tasks.sample import Sample
from exporter.device import Device, release
from exporter.events import Listener, notice
from exporter.out_of_memory import explain_shortage, is_shortage
from exporter.planning.whole_model import ROOM_FOR_ACTIVATIONS
from exporter.serving.launch import Program
from exporter.serving.reference import BOUND, Distance, EngineComparison, Reference, reference_placements
from exporter.serving.vllm_engine import Reply

P = TypeVar("P")
R = TypeVar("R")
MIN_MOVE_RATIO = 5.0  # doubled scales must move the answers by this multiple of the allowed mean difference
STEP = "the reference of the check"
ADVICE = "the artifact is not affected; close other programs that use memory, or use a machine with more"


@dataclass(frozen=True)
class Control:
    """Result of the negative control. component: the one with doubled scales.

    moved: distance from that engine to the unchanged reference. restored: comparison with the reference with the same
    doubled scales.
    """

    component: str
    moved: Distance
    restored: EngineComparison


@dataclass(frozen=True)
class CheckSettings:
    """Settings of a check: vLLM program, start options, device of the reference, event listener.

    logs: folder for the engine's `engine.log` and the control's `doubled.log` (None: logs are not kept).
    disturb: component whose scales the control doubles (None: the first with packed linears).
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
class DoubledRun:
    """Run of the control. component: the one with doubled scales. folder: the copy. replies: its answers."""

    component: str
    folder: Path
    replies: list[Reply]


def judge(
    artifact: Artifact,
    samples: Sequence[Sample],
    replies: Sequence[Reply],
    doubled: DoubledRun | None,
    processor: Any,
    settings: CheckSettings,
) -> tuple[EngineComparison | None, Control | None, list[str]]:
    """Compare replies with the reference, evaluate the control, and list the problems.

    Where the reference runs out of memory, the next placement is tried, so that the engine's replies are not lost.
    """

    def opened(folder: Artifact, placement: tuple[Device, Any]) -> Reference:
        return Reference(
            folder, processor, settings.device, not settings.program.cpu, placement, settings.tensor_parallel
        )

    def judged(placement: tuple[Device, Any]) -> tuple[EngineComparison | None, Control | None, list[str]]:
        reference = opened(artifact, placement)
        if problems := reference.prompt_problems(samples, replies):
            return None, None, problems
        compared, control = reference.compare(samples, replies), None
        if doubled:
            far = reference.distance(samples, doubled.replies)
            del reference
            release(settings.device)
            restored = opened(Artifact.open(doubled.folder), placement).compare(samples, doubled.replies)
            control = Control(doubled.component, far, restored)
        return compared, control, distance_problems(compared, control, settings.bound)

    *others, last = reference_placements(artifact, settings.device)
    for placement in others:
        if (result := _unless_short(judged, placement)) is not None:
            return result
        release(settings.device)
        note = f"{STEP} ran out of memory in {placement[1]} on {placement[0].name}: mmq tries it with less"
        settings.on_event(notice(note.replace("torch.", "")))
    needs = int(artifact.parameters() * last[1].itemsize * ROOM_FOR_ACTIVATIONS)
    with explain_shortage(STEP, last[0], (needs, needs), ADVICE):
        return judged(last)


def _unless_short(work: Callable[[P], R], placement: P) -> R | None:
    """The result of `work`; None when it runs out of memory."""
    try:
        return work(placement)
    except Exception as error:
        if not is_shortage(error):
            raise
    return None  # outside of the handler, because the error's frames hold references to the tensors


def distance_problems(compared: EngineComparison, control: Control | None, bound: float) -> list[str]:
    """Problems of the log-probabilities: distances above the bound, and a control that detects no error."""
    problems = []
    if not compared.close(bound):
        problems.append(f"log-probabilities are too far from the reference: {_distance_text(compared, bound)}")
    if control and not control.moved.mean >= MIN_MOVE_RATIO * compared.allowed(bound)[1]:
        move = f"moved the answers by only {control.moved.mean:.4f} on average"
        problems.append(f"doubling the scales of {control.component} {move}: the comparison cannot detect an error")
    if control and not control.restored.close(bound):
        text = _distance_text(control.restored, bound)
        problems.append(
            f"with doubled scales of {control.component} on both sides, the log-probabilities are too far apart: {text}"
        )
    return problems


def _distance_text(compared: EngineComparison, bound: float) -> str:
    d, (largest, mean) = compared.distance, compared.allowed(bound)
    return f"mean {d.mean:.4f} of {mean:.4f} allowed, largest {d.largest:.4f} of {largest:.4f} allowed"
