"""Tensor reads and unit writes of a calibration, both in the background while the device computes."""

from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import Executor, Future

import torch
from torch import Tensor

from exporter.device import Device
from exporter.dtypes import FLOAT16, Dtype
from exporter.events import Event, Listener, notice
from exporter.model.checkpoint import Checkpoint
from exporter.model.stream import Stream
from exporter.planning.plan import Plan, Unit
from exporter.quantization.workdir import UnitResult, Workdir

SMALLEST_PEAK = 2.0**-17  # matrices of smaller values lose more than 1 % as float16, whose steps are 2^-24 there


class BlockIO:
    """Reads tensors and stores finished units; holds the plan, device, event listener and live model of a calibration.

    finished: the number of leading units of the plan that the work folder holds or is about to hold.
    """

    def __init__(
        self,
        plan: Plan,
        checkpoint: Checkpoint,
        workdir: Workdir,
        device: Device,
        on_event: Listener,
        pool: Executor,
    ) -> None:
        self.plan = plan
        self.checkpoint = checkpoint
        self.workdir = workdir
        self.device = device
        self.on_event = on_event
        dtype = device.compute_dtype(stored_dtype(plan))
        self.stream = Stream(plan.family, checkpoint.config, device.torch_device, dtype.torch)
        self.finished = workdir.done(plan.units)
        self._unit_of = {name: unit for unit in plan.units for name in self.tensors_under(unit.block)}
        self._planned = {row.tensor.name for unit in plan.units for row in unit.rows}
        self._cached: tuple[int, UnitResult] | None = None
        self._pool = pool
        self._writing: tuple[Unit, tuple[Mapping[str, float], Sequence[str]], Future[None]] | None = None
        self._ahead: dict[str, Future[Tensor]] = {}

    def read(self, name: str) -> Tensor:
        """A tensor as the artifact will provide it: dequantized or folded once its unit is finished."""
        unit = self._unit_of.get(name)
        if unit is None or unit.index >= self.finished:
            pending = self._ahead.pop(name, None)
            tensor = pending.result() if pending else self.checkpoint.read(name)
            # Weights to quantize are checked on the device, when `Block` reads them.
            return tensor if name in self._planned else require_finite(self.checkpoint, name, tensor)
        if self._cached is None or self._cached[0] != unit.index:
            self.settle()
            self._cached = (unit.index, self.workdir.read(unit, self.device.torch_device))
        result, module = self._cached[1], name.removesuffix(".weight")
        if module in result.linears and name.endswith(".weight"):
            return result.linears[module].as_served()
        return result.altered[name] if name in result.altered else self.checkpoint.read(name)

    def is_finished(self, block: str) -> bool:
        """Whether `read` gives the quantized weights of this block."""
        return any(unit.block == block and unit.index < self.finished for unit in self.plan.units)

    def name_inside(self, block: str, name: str) -> str:
        """The name inside the live block of the tensor with this checkpoint name."""
        live = self.plan.family.live_name
        return live(name).removeprefix(live(block) + ".")

    def tensors_under(self, prefix: str) -> list[str]:
        """Names of the checkpoint's tensors that start with this prefix and a dot."""
        return [name for name in self.checkpoint.tensors if name.startswith(prefix + ".")]

    def read_ahead(self, names: Iterable[str]) -> None:
        """Start reading tensors from disk into pinned host memory in the background; does nothing without a GPU."""
        if not self.device.is_cuda:
            return
        for name in names:
            unit = self._unit_of.get(name)
            if unit is None or unit.index >= self.finished:
                self._ahead[name] = self._pool.submit(self._read_pinned, name)

    def _read_pinned(self, name: str) -> Tensor:
        return self.checkpoint.read(name).pin_memory()

    def commit(self, unit: Unit, result: UnitResult) -> None:
        """Write a finished unit to the work folder in the background, after the previous write has ended."""
        self.settle()
        summary = (result.errors, result.notes)  # not `result`, so that its codes are freed once they are written
        self._writing = (unit, summary, self._pool.submit(self.workdir.commit, unit, result))
        self.finished = unit.index + 1

    def settle(self) -> None:
        """Wait until the last committed unit is on disk, then send its events."""
        if self._writing is None:
            return
        (unit, (errors, notes), writing), self._writing = self._writing, None
        writing.result()
        total, worst = len(self.plan.units), max(errors.values(), default=0.0)
        self.on_event(Event("quantize", unit.index + 1, total, unit.block, {"error": worst}))
        for note in notes:
            self.on_event(notice(note))


def require_finite(checkpoint: Checkpoint, name: str, tensor: Tensor) -> Tensor:
    """The given tensor; CheckpointError when it has an infinity or a NaN, or is a matrix that float16 made zero."""
    if tensor.is_floating_point() and tensor.itemsize > 1 and tensor.numel():
        extremes = torch.stack(torch.aminmax(tensor))  # NaN if one value is NaN; needs no mask as large as the tensor
        if not torch.isfinite(extremes).all():
            raise checkpoint.not_finite(name)
        narrow = tensor.dim() == 2 and checkpoint.tensors[name].dtype == FLOAT16
        if narrow and float(extremes.abs().max()) < SMALLEST_PEAK:
            checkpoint.refuse_vanished(name)
    return tensor


def stored_dtype(plan: Plan) -> Dtype:
    """The checkpoint's dtype of the linears."""
    return next(row.tensor.dtype for row in plan.rows if row.linear)
