"""Predicts the peak memory of quantizing, from tensor shapes alone.

The terms are the tensors that `calibrate` holds at the same time; docs/measurements/quantization-time.md compares the
predictions with measured peaks.
"""

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass

from exporter.device import Device
from exporter.model.checkpoint import Checkpoint, TensorInfo
from exporter.model.families import Component, Family
from exporter.model.families.component import Config
from exporter.numerics.inverse_cholesky import PANEL
from exporter.numerics.mismatch import PIECE
from exporter.planning.recipe import Calibration

SQUARE_BYTES = 4  # per element of an [in, in] matrix: a float32 Hessian or its factor
HALF_BYTES = 2  # per bfloat16 element
STRIP_BYTES = 3 * 4 * PANEL  # per input: strips of the factorization
FLOAT_BYTES = 4  # per weight: its float32 value
CODE_BYTES = 1  # per weight: its code
ROUND_BYTES = 9  # per weight while all are rounded at once: the scales, a mask of zero scales, the ratios
REPORT_BYTES = 14  # per weight of one linear, to compute its error: the dequantized weight, the difference, products
OFFSET_BYTES = 4  # per weight: what learned rounding adds to it before it is rounded, in float32
LEARNED_BYTES = 24  # per weight of one linear: the temporaries of rounding it in one step, freed before the passes
BACKWARD = 3  # outputs inside a block that a backward pass holds, over those that a forward pass holds at a time
SMOOTH_BYTES = 28  # per weight of one linear: the temporaries of one candidate for the column scales


@dataclass(frozen=True)
class Memory:
    """Predicted peaks of quantizing, in bytes on the compute device.

    device_bytes: the highest peak. largest: the phase that has it. activation_bytes: the block inputs of all samples,
    which stay in memory from block to block.
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
    tuned: Collection[str] = (),
    corrected: Collection[str] = (),
) -> Memory:
    """Predict the peaks of quantizing the `planned` components.

    statistics: components that are calibrated -> whether a method moves scales between their linears. The other
    components hold only the linears that share an input at a time. tuned: components with learned rounding.
    corrected: components whose weights are corrected for earlier errors.
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
        inputs = calibration.samples * (tokens * phases[0][0] + component.context(checkpoint.config)) * size
        masks = calibration.samples * tokens * tokens if any(entry.padded for entry in component.passes) else 0
        batch = calibration.batch * pass_elements(checkpoint.tensors, component, checkpoint.config) * size
        block = _block_elements(checkpoint, component, 0) * size
        solve = _solve(phases, True, device)
        if statistics[component.name]:  # codes with and without folded scales, codes of the last block, original block
            solve = max(solve, 3 * CODE_BYTES * _weights(phases) + _smooth(phases)) + block
        if component.name in corrected:
            solve = max(solve, _correct(phases, calibration.batch * tokens, size, batch))
        if component.name in tuned or component.name in corrected:
            inputs, masks, solve = 3 * inputs, 2 * masks, solve + block  # inputs, outputs and block of the source
        if component.name in tuned:
            learned = OFFSET_BYTES + 2 * size + 3 * CODE_BYTES
            # A GPU rounds and steps by kernels without temporaries.
            temporaries = 0 if device.is_cuda else LEARNED_BYTES * max(max(sizes) for _, sizes in phases)
            peaks[f"{component.name}: learned rounding of one block"] = (
                inputs + masks + 2 * block + learned * _weights(phases) + max(temporaries, BACKWARD * batch)
            )
        names = upstream_tensors(checkpoint.tensors, family, checkpoint.config, component)
        upstream = sum(checkpoint.tensors[name].size for name in names) * itemsize
        peaks[f"{component.name}: statistics of one block"] = inputs + masks + block + max(batch, solve)
        peaks[f"{component.name}: upstream forward"] = inputs + upstream + batch
        activations = max(activations, inputs)
    largest = max(peaks, key=lambda name: peaks[name])
    return Memory(peaks[largest], activations, largest)


def _solve(phases: Sequence[tuple[int, Sequence[int]]], calibrated: bool, device: Device) -> int:
    """Peak bytes of quantizing one block phase by phase, without the block's own weights.

    The codes of earlier phases stay until the block is finished, and those of the previous block until they are
    written.
    """
    peaks, codes = [], _weights(phases)
    for width, sizes in phases:
        peaks.append(CODE_BYTES * codes + _quantize(width if calibrated else 0, sizes, device))
        codes += sum(sizes)
    return max(peaks)


def _quantize(width: int, sizes: Sequence[int], device: Device) -> int:
    """Peak bytes of quantizing linears that share an input, without the block's own weights.

    width: the number of inputs, 0 when no Hessian is used. sizes: the number of weights of each linear. Weights are
    weights in float32; linears that share an input are also weights concatenated.
    """
    count, square = sum(sizes), width * width
    weights = FLOAT_BYTES * count * (2 if len(sizes) > 1 else 1)
    if not width:
        return weights + ROUND_BYTES * count
    half = HALF_BYTES if device.is_cuda else FLOAT_BYTES
    expanded_scales = (
        0 if device.is_cuda else FLOAT_BYTES * count
    )  # without a kernel, scales are expanded to every weight
    factor = weights + 2 * SQUARE_BYTES * square + STRIP_BYTES * width
    column_loop = weights + 2 * SQUARE_BYTES * square + (FLOAT_BYTES + CODE_BYTES) * count + expanded_scales
    descent = weights + (SQUARE_BYTES + half) * square + (FLOAT_BYTES + CODE_BYTES + half) * count + expanded_scales
    report = SQUARE_BYTES * square + (FLOAT_BYTES + CODE_BYTES) * count + REPORT_BYTES * max(sizes)
    return max(factor, column_loop, descent, report)


def _correct(phases: Sequence[tuple[int, Sequence[int]]], rows: int, size: int, batch: int) -> int:
    """Peak bytes of correcting weights, without the block's own weights and those of the source.

    rows: input rows of a batch. size: bytes of one of their elements. batch: bytes of a forward pass.
    """
    return CODE_BYTES * _weights(phases) + max(
        max(_correction(width, sum(sizes), rows, size, batch).values()) for width, sizes in phases
    )


def _correction(width: int, count: int, rows: int, size: int, batch: int) -> dict[str, int]:
    """Peak bytes of each step of correcting `count` weights of `width` inputs."""
    square, weights, pair = SQUARE_BYTES * width * width, FLOAT_BYTES * count, 3 * rows * width * size
    piece = min(PIECE, count // width)  # rows of the weight
    return {
        "collect": 2 * square + batch + pair,  # the Hessian and the mismatch
        "factor": weights + 3 * square + STRIP_BYTES * width,  # and the factor
        "shift": 2 * weights + 3 * square + 2 * FLOAT_BYTES * piece * width,
        "share": 2 * weights + square + batch + pair + 2 * FLOAT_BYTES * piece * rows,
    }


def _smooth(phases: Sequence[tuple[int, Sequence[int]]]) -> int:
    """Peak bytes of a search for column scales: all Hessians, and one candidate's temporaries for one linear."""
    squares = SQUARE_BYTES * sum(width * width for width, _ in phases)
    return squares + max(SMOOTH_BYTES * max(sizes) + FLOAT_BYTES * sum(sizes) for _, sizes in phases)


def pass_elements(tensors: Mapping[str, TensorInfo], component: Component, config: Config) -> int:
    """The largest number of elements that a forward pass of one sample through a block of `component` holds.

    Attention: its input, the normed input, queries, keys, values (repeated for every head that shares them), output
    and sum. Feed-forward: its input, sum and normed sum beside two branches and their product.
    """
    widths = [width for width, _ in _phases_of(tensors, component, config)]
    hidden, widest = widths[0], max(widths)
    return component.tokens(config) * max(7 * hidden, 3 * hidden + 3 * widest)


def _weights(phases: Sequence[tuple[int, Sequence[int]]]) -> int:
    """The number of weights of all phases."""
    return sum(sum(sizes) for _, sizes in phases)


def _phases(checkpoint: Checkpoint, component: Component) -> list[tuple[int, list[int]]]:
    return _phases_of(checkpoint.tensors, component, checkpoint.config)


def _phases_of(tensors: Mapping[str, TensorInfo], component: Component, config: Config) -> list[tuple[int, list[int]]]:
    """(number of inputs, weights of each linear) for each group of the first block's linears that share an input."""
    phases = []
    for phase in component.phases:
        names = [f"{component.module(0, linear)}.weight" for linear in phase if component.has(config, 0, linear)]
        infos = [tensors[name] for name in names if len(tensors[name].shape) == 2]
        if infos:
            phases.append((infos[0].shape[1], [info.size for info in infos]))
    return phases


def _block_elements(checkpoint: Checkpoint, component: Component, index: int) -> int:
    """Elements of all tensors of block `index`."""
    prefix = component.block(index) + "."
    return sum(info.size for name, info in checkpoint.tensors.items() if name.startswith(prefix))


def upstream_tensors(names: Iterable[str], family: Family, config: Config, component: Component) -> list[str]:
    """The tensors, by name, that the model needs up to the component's first block."""
    position = family.components.index(component)
    unused = [f"{part.block(i)}." for part in family.components[:position] for i in _unused(part, config)]
    downstream = [part.blocks.partition("{i}")[0] for part in family.components[position:]]
    skipped = (*downstream, *unused)
    return [
        name for name in names if not name.startswith(skipped) and not family.reason_kept(name.removesuffix(".weight"))
    ]


def _unused(component: Component, config: Config) -> range:
    """Numbers of the stored blocks that the model does not run."""
    return range(component.used(config), component.stored(config))
