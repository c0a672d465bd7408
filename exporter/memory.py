"""Predicted peak memory of an export, from shapes alone.

The terms are those that `calibrate` really holds at once; docs/architecture.md compares them with measured peaks.
"""

from collections.abc import Collection
from dataclasses import dataclass

from exporter.checkpoint import Checkpoint
from exporter.device import Device
from exporter.families import Component, Family
from exporter.recipe import Calibration

RUNTIME_BYTES = 500 * 2**20  # torch, transformers and their libraries, resident in the host process


@dataclass(frozen=True)
class Memory:
    """Predicted peaks in bytes. device_bytes: on the compute device; host_bytes: of the process, page cache aside."""

    device_bytes: int
    host_bytes: int
    activation_bytes: int
    largest: str

    def advice(self) -> str:
        """What to do when the device is too small."""
        return (
            f"the export needs about {self.device_bytes / 2**30:.1f} GiB ({self.largest}): "
            "lower calibration.samples or calibration.batch, or use --device cpu"
        )


def predict_memory(
    checkpoint: Checkpoint, family: Family, calibration: Calibration, statistics: Collection[str], device: Device
) -> Memory:
    """Peaks of calibrating the components named in `statistics`; the others need one block at a time."""
    itemsize = 2 if device.is_cuda else 4
    peaks = {"one block": 0}
    activations = 0
    for component in family.components:
        block = _block_elements(checkpoint, component, 0)
        width = max((n for _, n in _shapes(checkpoint, component)), default=0)
        peaks["one block"] = max(peaks["one block"], block * itemsize + 12 * _widest(checkpoint, component))
        if component.name not in statistics:
            continue
        hidden = next(iter(_shapes(checkpoint, component)), (0, 0))[1]
        tokens = component.tokens(checkpoint.config)
        kept = calibration.samples * tokens * hidden * itemsize
        batch = calibration.batch * tokens * (6 * hidden + 3 * width) * itemsize
        solve = 4 * 4 * width * width + 16 * _widest(checkpoint, component)
        peaks[f"{component.name}: statistics of one block"] = kept + batch + solve + block * itemsize
        peaks[f"{component.name}: upstream forward"] = (
            _upstream(checkpoint, family, component) * itemsize + kept + batch
        )
        activations = max(activations, kept)
    largest = max(peaks, key=lambda name: peaks[name])
    on_device = peaks[largest]
    host = RUNTIME_BYTES + (on_device if not device.is_cuda else 2**30)
    return Memory(on_device, host, activations, largest)


def _shapes(checkpoint: Checkpoint, component: Component) -> list[tuple[int, int]]:
    names = [f"{component.block(0)}.{linear}.weight" for linear in component.linears]
    found = [checkpoint.tensors[name].shape for name in names if name in checkpoint.tensors]
    return [(shape[0], shape[1]) for shape in found if len(shape) == 2]


def _widest(checkpoint: Checkpoint, component: Component) -> int:
    """Elements of the largest stack of linears that share an input."""
    stacks = [0]
    for phase in component.phases:
        names = [f"{component.block(0)}.{linear}.weight" for linear in phase]
        stacks.append(sum(checkpoint.tensors[name].size for name in names if name in checkpoint.tensors))
    return max(stacks)


def _block_elements(checkpoint: Checkpoint, component: Component, index: int) -> int:
    prefix = component.block(index) + "."
    return sum(info.size for name, info in checkpoint.tensors.items() if name.startswith(prefix))


def _upstream(checkpoint: Checkpoint, family: Family, component: Component) -> int:
    """Elements of everything that runs before the component's first block."""
    names = [other.name for other in family.components]
    before = family.components[: names.index(component.name)]
    prefixes = tuple(other.blocks.partition(".")[0] + "." for other in before)
    embeddings = sum(info.size for name, info in checkpoint.tensors.items() if "embed" in name)
    return embeddings + sum(info.size for name, info in checkpoint.tensors.items() if name.startswith(prefixes))
