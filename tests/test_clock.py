"""The clock separates inner from outer steps, and finished work survives a memory shortage."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from exporter.device import choose
from exporter.errors import MemoryShortage
from exporter.events import Event
from exporter.pipeline.export import Export, export
from exporter.pipeline.step_clock import Clock, anonymous_bytes
from exporter.planning.recipe import Recipe
from exporter.planning.steps import NEEDED, Step
from tests.test_export import contents, quick_recipe

pytestmark = pytest.mark.usefixtures("unloaded")

CPU = choose("cpu")
MIB = 2**20


def test_an_inner_step_is_not_part_of_the_outer_one(monkeypatch: pytest.MonkeyPatch) -> None:
    ticks = iter([0.0, 1.0, 3.0, 6.0, 10.0, 15.0, 21.0])
    monkeypatch.setattr("exporter.pipeline.step_clock.time.monotonic", lambda: next(ticks))
    clock = Clock(CPU)
    with clock.step("write"), clock.step("verify"):
        pass
    with clock.step("write"):
        pass
    assert {step.name: step.seconds for step in clock.steps} == {"write": 2 + 4 + 6, "verify": 3}


@pytest.mark.skipif(not anonymous_bytes(), reason="the system does not say what a process holds")
def test_a_memory_peak_counts_for_the_step_that_allocated_it() -> None:
    with Clock(CPU) as clock:
        with clock.step("plan"):
            before = anonymous_bytes()
        with clock.step("quantize"):
            allocated = np.ones(300 * MIB, dtype=np.uint8)
            looked = clock._over.wait(0.3)  # the thread looks meanwhile
            del allocated
        with clock.step("write"):
            pass
    peaks = {step.name: step.host_bytes for step in clock.steps}
    assert not looked
    assert peaks["quantize"] - before > 290 * MIB
    assert peaks["quantize"] - peaks["write"] > 200 * MIB
    assert peaks["quantize"] - peaks["plan"] > 200 * MIB
    assert not clock._watch.is_alive()


def test_a_memory_shortage_reports_the_prediction_and_the_finished_work() -> None:
    clock = Clock(CPU)
    clock.predicted = [Step("write", 0, 3 * 2**30, 1.0)]
    with pytest.raises(MemoryShortage) as caught, clock.step("write", "blocks are kept"):
        raise MemoryError
    assert caught.value.message.startswith("write: out of memory on the host: ")
    assert caught.value.message.endswith("the step was predicted to take 3.00 GiB")
    assert caught.value.hint == "blocks are kept; close other programs that use memory, or use a machine with more"


def failing(stage: str, done: int, error: Exception) -> Callable[[Event], None]:
    """A listener that raises at the first event of a stage with at least this progress."""

    def listen(event: Event) -> None:
        if event.stage == stage and event.done >= done:
            raise error

    return listen


def run(
    out: Path,
    listen: Callable[[Event], None] = lambda event: None,
    recipe: Recipe | None = None,
    skip_evaluation: bool = False,
) -> Export:
    """An export of the demo model, with an evaluation of four samples per task."""
    return export(recipe or quick_recipe(), out=out, device=CPU, on_event=listen, skip_evaluation=skip_evaluation)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Export:
    """An uninterrupted export."""
    return run(tmp_path_factory.mktemp("whole") / "out")


@pytest.mark.parametrize(
    ("stage", "error"),
    [
        ("quantize", torch.OutOfMemoryError("CUDA out of memory")),
        pytest.param("write", MemoryError(), marks=pytest.mark.slow),
        ("verify", torch.OutOfMemoryError("CUDA out of memory")),
        ("evaluate", RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 4096 bytes")),
    ],
)
def test_an_export_resumes_after_a_memory_shortage_with_identical_bytes(
    stage: str, error: Exception, whole: Export, finished: Path, tmp_path: Path
) -> None:
    out, measures = tmp_path / "out", stage == "evaluate"
    with pytest.raises(MemoryShortage, match=f"^{stage}: out of memory") as caught:
        run(out, failing(stage, 2, error), skip_evaluation=not measures)
    hint = str(caught.value.hint)
    assert (
        f"the verified artifact is in {out}" in hint if stage == "evaluate" else "finished blocks are kept in" in hint
    )
    units: list[int] = []
    listen = lambda event: units.append(event.done) if event.stage == "quantize" else None  # noqa: E731
    run(out, listen, skip_evaluation=not measures)
    assert 1 not in units  # the first unit was finished
    assert contents(out) == contents(whole.out if measures else finished)
    assert not (tmp_path / "out.work").exists()


def test_an_exports_steps_have_predictions(whole: Export) -> None:
    measured = [step.name for step in whole.measured]
    assert measured == ["plan", "read data", "quantize", "write", "verify", "evaluate"]
    assert set(measured) <= {step.name for step in whole.plan.steps}
    assert set(NEEDED) < set(measured)
    assert all(step.seconds >= 0 for step in whole.measured)
