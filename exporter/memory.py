"""Predicted peak memory of an export, from shapes alone.

The terms are those that `calibrate` really holds at once; docs/architecture.md compares them with measured peaks.
"""

from collections.abc import Collection
from dataclasses import dataclass

from exporter.checkpoint import SHARD_BYTES, Checkpoint
from exporter.device import Device
from exporter.families import Component, Family
from exporter.recipe import Calibration

SOLVE_BYTES = 6 * 4  # float32 squares of the inputs: Hessian, its factor, the inverse, and what the solvers copy
WEIGHT_BYTES = 17  # float32: the weights, their stack, what compensation changes, a product; and one byte of code
RUNTIME_BYTES = 400 * 2**20  # torch, transformers and their libraries, resident in the host process
CUDA_BYTES = 1.2 * 2**30  # what CUDA and its libraries add there


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
        phases = _phases(checkpoint, component)
        block = _block_elements(checkpoint, component, 0) * itemsize
        peaks["one block"] = max(peaks["one block"], block + WEIGHT_BYTES * max(n for _, n in phases))
        if component.name not in statistics:
            continue
        hidden, widest = phases[0][0], max(width for width, _ in phases)
        tokens = component.tokens(checkpoint.config)
        kept = calibration.samples * tokens * hidden * itemsize
        batch = calibration.batch * tokens * (6 * hidden + 3 * widest) * itemsize
        solve = max(SOLVE_BYTES * width * width + WEIGHT_BYTES * elements for width, elements in phases)
        upstream = _upstream(checkpoint, family, component) * itemsize
        peaks[f"{component.name}: statistics of one block"] = kept + block + max(batch, solve)
        peaks[f"{component.name}: upstream forward"] = kept + upstream + batch
        activations = max(activations, kept)
    largest = max(peaks, key=lambda name: peaks[name])
    on_device = peaks[largest]
    shard = min(SHARD_BYTES, sum(info.bytes for info in checkpoint.tensors.values()))
    host = RUNTIME_BYTES + shard + (CUDA_BYTES if device.is_cuda else on_device)
    return Memory(on_device, int(host), activations, largest)


def _phases(checkpoint: Checkpoint, component: Component) -> list[tuple[int, int]]:
    """(inputs, elements of all weights together) of each group of linears that share an input."""
    found, config = [], checkpoint.config
    for phase in component.phases:
        names = [f"{component.module(0, linear)}.weight" for linear in phase if component.has(config, 0, linear)]
        infos = [checkpoint.tensors[name] for name in names if len(checkpoint.tensors[name].shape) == 2]
        if infos:
            found.append((infos[0].shape[1], sum(info.size for info in infos)))
    return found


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
