"""Predicted peak memory of quantizing, from shapes alone.

The terms are those that `calibrate` really holds at once; docs/measurements/quantization-time.md compares them with
measured peaks.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

from exporter.device import Device
from exporter.model.checkpoint import Checkpoint, TensorInfo
from exporter.model.families import Component, Family
from exporter.model.families.family import Config
from exporter.numerics.inverse_cholesky import PANEL
from exporter.planning.recipe import Calibration

SQUARE_BYTES = 4  # float32: a square matrix of the inputs; a Hessian, or its factor
HALF_BYTES = 2  # bfloat16
STRIP_BYTES = 3 * 4 * PANEL  # strips of the factorization, for every input
FLOAT_BYTES = 4  # of every weight: float32
CODE_BYTES = 1  # of every weight: its code
ROUND_BYTES = 9  # of every weight while all are rounded at once: steps, where these are 0, the ratio
REPORT_BYTES = 14  # of every weight of one linear, for its error: what it became, the difference, products
SMOOTH_BYTES = 28  # of every weight of one linear: what a candidate for scales makes of it


@dataclass(frozen=True)
class Memory:
    """Predicted peaks in bytes of quantizing, on the compute device. largest: what takes device_bytes.

    activation_bytes: inputs of a block, of all samples, which are kept from block to block.
    """

    device_bytes: int
    activation_bytes: int
    largest: str


def predict_memory(
    checkpoint: Checkpoint,
    family: Family,
    calibration: Calibration,
    planned: Collection[str],
    statistics: Mapping[str, bool],
    device: Device,
) -> Memory:
    """Peaks of quantizing the `planned` components: those named in `statistics` are calibrated, the others need the
    linears that share an input at a time.

    statistics: whether a method moves scales between the component's linears.
    """
    itemsize = 2 if device.is_cuda else 4
    peaks = {"one block": 0}
    activations = 0
    for component in family.components:
        if component.name not in planned:
            continue
        phases = _phases(checkpoint, component)
        if component.name not in statistics:
            peaks["one block"] = max(peaks["one block"], _solve(phases, False, device))
            continue
        size = FLOAT_BYTES if component.blocks.startswith(family.float32) else itemsize
        tokens = component.tokens(checkpoint.config)
        kept = calibration.samples * (tokens * phases[0][0] + component.context(checkpoint.config)) * size
        masks = calibration.samples * tokens * tokens if any(way.padded for way in component.passes) else 0
        batch = calibration.batch * pass_elements(checkpoint.tensors, component, checkpoint.config) * size
        block = _block_elements(checkpoint, component, 0) * size
        solve = _solve(phases, True, device)
        if statistics[component.name]:  # codes with scales and without, those of the block before; the block as it was
            solve = max(solve, 3 * CODE_BYTES * _weights(phases) + _smooth(phases)) + block
        upstream = _upstream(checkpoint, family, component) * itemsize
        peaks[f"{component.name}: statistics of one block"] = kept + masks + block + max(batch, solve)
        peaks[f"{component.name}: upstream forward"] = kept + upstream + batch
        activations = max(activations, kept)
    largest = max(peaks, key=lambda name: peaks[name])
    return Memory(peaks[largest], activations, largest)


def _solve(phases: Sequence[tuple[int, Sequence[int]]], calibrated: bool, device: Device) -> int:
    """Peak of quantizing one block beside its weights, phase by phase.

    The codes of earlier phases stay until the block is done, and those of the block before until they are written.
    """
    peaks, before = [], _weights(phases)
    for width, sizes in phases:
        peaks.append(CODE_BYTES * before + _quantize(width if calibrated else 0, sizes, device))
        before += sum(sizes)
    return max(peaks)


def _quantize(width: int, sizes: Sequence[int], device: Device) -> int:
    """Peak of quantizing linears of `sizes` weights that share `width` inputs (0: without a Hessian), beside the block.

    Weights are held in float32, linears that share an input also stacked.
    """
    count, square = sum(sizes), width * width
    held = FLOAT_BYTES * count * (2 if len(sizes) > 1 else 1)
    if not width:
        return held + ROUND_BYTES * count
    half = HALF_BYTES if device.is_cuda else FLOAT_BYTES
    spread = 0 if device.is_cuda else FLOAT_BYTES * count  # where no kernel does it, scales are written out
    factor = held + 2 * SQUARE_BYTES * square + STRIP_BYTES * width
    walk = held + 2 * SQUARE_BYTES * square + (FLOAT_BYTES + CODE_BYTES) * count + spread
    descent = held + (SQUARE_BYTES + half) * square + (FLOAT_BYTES + CODE_BYTES + half) * count + spread
    report = SQUARE_BYTES * square + (FLOAT_BYTES + CODE_BYTES) * count + REPORT_BYTES * max(sizes)
    return max(factor, walk, descent, report)


def _smooth(phases: Sequence[tuple[int, Sequence[int]]]) -> int:
    """Peak of a search for scales: every Hessian at once, and what a candidate makes of one linear."""
    squares = SQUARE_BYTES * sum(width * width for width, _ in phases)
    return squares + max(SMOOTH_BYTES * max(sizes) + FLOAT_BYTES * sum(sizes) for _, sizes in phases)


def pass_elements(tensors: Mapping[str, TensorInfo], component: Component, config: Config) -> int:
    """Elements that one sample's forward pass through a block of `component` holds at its widest point.

    Attention: its input, the normed input, queries, keys, values (repeated for every head that shares them), output
    and sum. Feed-forward: its input, sum and normed sum beside two branches and their product.
    """
    widths = [width for width, _ in _phases_of(tensors, component, config)]
    hidden, widest = widths[0], max(widths)
    return component.tokens(config) * max(7 * hidden, 3 * hidden + 3 * widest)


def _weights(phases: Sequence[tuple[int, Sequence[int]]]) -> int:
    return sum(sum(sizes) for _, sizes in phases)


def _phases(checkpoint: Checkpoint, component: Component) -> list[tuple[int, list[int]]]:
    return _phases_of(checkpoint.tensors, component, checkpoint.config)


def _phases_of(tensors: Mapping[str, TensorInfo], component: Component, config: Config) -> list[tuple[int, list[int]]]:
    """(inputs, how many weights each has) of each group of linears of the first block that share an input."""
    phases = []
    for phase in component.phases:
        names = [f"{component.module(0, linear)}.weight" for linear in phase if component.has(config, 0, linear)]
        infos = [tensors[name] for name in names if len(tensors[name].shape) == 2]
        if infos:
            phases.append((infos[0].shape[1], [info.size for info in infos]))
    return phases


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
