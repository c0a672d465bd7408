"""Predicted peak memory of an export, from shapes alone.

The terms are those that `calibrate` really holds at once; docs/architecture.md compares them with measured peaks.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

from exporter.checkpoint import Checkpoint
from exporter.device import Device
from exporter.factor import PANEL
from exporter.families import Component, Family
from exporter.recipe import Calibration
from exporter.shards import SHARD_BYTES

SQUARES_BYTES = 2 * 4  # float32 squares of the inputs: the Hessian and its factor
STRIP_BYTES = 3 * 4 * PANEL  # strips of the factorization, for every input
WEIGHT_BYTES = 11  # float32: the weights, in both orders; bfloat16: what they are off by; their codes
SMOOTH_BYTES = 28  # of one linear: what a candidate makes of it; the weights of its stack are counted apart
STACK_BYTES = 4  # float32: weights that share an input, stacked
REPORT_BYTES = 15  # the error of one linear: weights, what they became, the difference, a product
CODE_BYTES = 2  # of every weight of a block: its codes, and those of the block before while they are written
RUNTIME_BYTES = 400 * 2**20  # torch, transformers and their libraries, resident in the host process
CUDA_BYTES = 1.5 * 2**30  # what CUDA and its libraries add there


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
    checkpoint: Checkpoint,
    family: Family,
    calibration: Calibration,
    planned: Collection[str],
    statistics: Mapping[str, bool],
    device: Device,
) -> Memory:
    """Peaks of quantizing the `planned` components: those named in `statistics` are calibrated, the others need one
    block at a time.

    statistics: whether a method moves scales between the component's linears.
    """
    itemsize = 2 if device.is_cuda else 4
    peaks = {"one block": 0}
    activations = 0
    for component in family.components:
        if component.name not in planned:
            continue
        phases = _phases(checkpoint, component)
        codes = CODE_BYTES * sum(sum(sizes) for _, sizes in phases)
        size = 4 if component.blocks.startswith(family.float32) else itemsize
        block = _block_elements(checkpoint, component, 0) * size + codes
        peaks["one block"] = max(peaks["one block"], block + max(_quantize(0, sizes) for _, sizes in phases))
        if component.name not in statistics:
            continue
        hidden, widest = phases[0][0], max(width for width, _ in phases)
        tokens = component.tokens(checkpoint.config)
        kept = calibration.samples * (tokens * hidden + component.context(checkpoint.config)) * size
        batch = calibration.batch * tokens * (6 * hidden + 3 * widest) * size
        solve = max(_quantize(width, sizes) for width, sizes in phases)
        if statistics[component.name]:
            solve = block - codes // 2 + max(solve, _smooth(phases))  # the block as it was, and codes without scales
        upstream = _upstream(checkpoint, family, component) * itemsize
        peaks[f"{component.name}: statistics of one block"] = kept + block + max(batch, solve)
        peaks[f"{component.name}: upstream forward"] = kept + upstream + batch
        activations = max(activations, kept)
    largest = max(peaks, key=lambda name: peaks[name])
    shard = 1.5 * min(SHARD_BYTES, sum(info.bytes for info in checkpoint.tensors.values()))  # the last one is written
    host = RUNTIME_BYTES + shard + (CUDA_BYTES if device.is_cuda else peaks[largest])
    return Memory(peaks[largest], int(host), activations, largest)


def _smooth(phases: Sequence[tuple[int, Sequence[int]]]) -> int:
    """Peak of a search for scales: every Hessian at once, and what a candidate makes of one linear."""
    squares = SQUARES_BYTES // 2 * sum(width * width for width, _ in phases)
    return squares + max(SMOOTH_BYTES * max(sizes) + STACK_BYTES * sum(sizes) for _, sizes in phases)


def _quantize(width: int, sizes: Sequence[int]) -> int:
    """Peak of quantizing linears of `sizes` weights that share `width` inputs, beside the block itself."""
    stacked = STACK_BYTES * sum(sizes) if len(sizes) > 1 else 0
    solve = SQUARES_BYTES * width * width + STRIP_BYTES * width + WEIGHT_BYTES * sum(sizes) + stacked
    report = SQUARES_BYTES // 2 * width * width + 5 * sum(sizes) + REPORT_BYTES * max(sizes)
    return max(solve, report)


def _phases(checkpoint: Checkpoint, component: Component) -> list[tuple[int, list[int]]]:
    """(inputs, how many weights each has) of each group of linears that share an input."""
    found, config = [], checkpoint.config
    for phase in component.phases:
        names = [f"{component.module(0, linear)}.weight" for linear in phase if component.has(config, 0, linear)]
        infos = [checkpoint.tensors[name] for name in names if len(checkpoint.tensors[name].shape) == 2]
        if infos:
            found.append((infos[0].shape[1], [info.size for info in infos]))
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
