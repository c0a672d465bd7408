"""The quantization phase alone, its time by term and its memory; used by `bench/quantize.py`."""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

from torch import Tensor

from bench.memory import Watch
from exporter.device import Device, exact_math, peak_bytes, release, reset_peak, synchronize
from exporter.events import ignore
from exporter.methods import awq, gptq, rtn
from exporter.model.inference.predict import batches
from exporter.model.processors.processor import load_processor
from exporter.numerics import hessian
from exporter.pipeline.preparation import prepare
from exporter.pipeline.samples import calibration_samples
from exporter.planning.plan import Plan
from exporter.planning.recipe import Recipe
from exporter.quantization import block, block_inputs, block_io, calibrate, smoothing
from exporter.quantization.workdir import Workdir

TERMS: tuple[tuple[str, Any, str], ...] = (
    ("forward passes", block_inputs.BlockInputs, "run"),
    ("Hessians", hessian.Statistics, "update"),
    ("errors for the report", hessian.Statistics, "energy"),
    ("comparison with the source", block, "source_error"),
    ("factorizations", gptq, "inverse_factor"),
    ("ranges", gptq, "fit_scale"),
    ("ranges", rtn, "fit_scale"),
    ("column loops", gptq, "_codes_of_columns"),
    ("descent", gptq, "descend_"),
    ("search of scales", awq, "find_scales"),
    ("search of scales", awq, "_clip"),
    ("folds", smoothing, "fold"),
    ("inputs of components", calibrate, "first_block_inputs"),
    ("reading weights", block_io.BlockIO, "read"),
    ("writing units", block_io.BlockIO, "settle"),
)
GIB = 2**30


class Terms:
    """Seconds of each term, without those of the terms inside it."""

    def __init__(self, device: Device) -> None:
        self._device = device
        self._open: list[str] = []
        self._last = 0.0
        self.seconds: dict[str, float] = {}

    def _lap(self) -> None:
        synchronize(self._device)
        now = time.perf_counter()
        name = self._open[-1] if self._open else "the rest"
        self.seconds[name] = self.seconds.get(name, 0.0) + now - self._last
        self._last = now

    def around(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """The function, with its time added to `name`."""

        def timed(*args: Any, **kwargs: Any) -> Any:
            self._lap()
            self._open.append(name)
            try:
                return function(*args, **kwargs)
            finally:
                self._lap()
                self._open.pop()

        return timed

    @contextmanager
    def running(self) -> Iterator[None]:
        """Time everything inside the block."""
        with ExitStack() as stack:
            for name, owner, attribute in TERMS:
                timed = self.around(name, getattr(owner, attribute))
                stack.enter_context(mock.patch.object(owner, attribute, timed))
            synchronize(self._device)
            self._last = time.perf_counter()
            yield
            self._lap()


def phase(
    recipe: Recipe, inputs: Sequence[dict[str, Tensor]], device: Device, work: Path, terms: Terms | None = None
) -> dict[str, Any]:
    """The quantization phase once: seconds, peaks, and the worst and mean error of linears on their own inputs."""
    plan, checkpoint = prepare(recipe, device)
    workdir = Workdir.open(work, {"bench": str(work)})
    release(device)
    reset_peak(device)
    resident = peak_bytes(device)[0]  # of other objects, e.g. the model of the comparison
    with Watch() as host, exact_math(0), ExitStack() as stack:
        if terms:
            stack.enter_context(terms.running())
        start = time.perf_counter()
        calibrate.run(plan, checkpoint, workdir, inputs, device, ignore)
        synchronize(device)
        seconds = time.perf_counter() - start
    errors = [error for unit in plan.units for error in workdir.read_notes(unit)[0].values()]
    return {
        "seconds": seconds,
        "device_gib": (peak_bytes(device)[0] - resident) / GIB,
        "device_predicted_gib": plan.memory.device_bytes / GIB,
        "host_gib": host.peak / GIB,
        "mean_error": sum(errors) / len(errors),
        "worst_error": max(errors),
    }


def inputs_of(recipe: Recipe, device: Device) -> tuple[Plan, list[dict[str, Tensor]]]:
    """The recipe's plan and calibration batches."""
    plan, checkpoint = prepare(recipe, device)
    samples = calibration_samples(plan, ())
    return plan, batches(load_processor(checkpoint.folder), plan.family, samples, recipe.calibration.batch)
