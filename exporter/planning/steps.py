"""Predicts for each step of an export the peaks of device and host memory and the seconds; lists memory shortages.

The export measures the same quantities with `clock`, and shows them next to the predictions.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from exporter.device import Device, free_host_bytes
from exporter.errors import PlanError
from exporter.files.shard_writer import SHARD_BYTES
from exporter.model.checkpoint import Checkpoint
from exporter.model.families import Family
from exporter.model.inference.row_store import BOUND
from exporter.planning.decisions import PlanRow
from exporter.planning.durations import check_seconds, evaluate_seconds, quantize_seconds
from exporter.planning.memory import Memory
from exporter.planning.placement import GIB, Placement, choose_placement
from exporter.planning.rates import IMPORTS, PICTURE, rates
from exporter.planning.recipe import Recipe
from exporter.planning.whole_model import ROOM_FOR_ACTIVATIONS, WholeModel, whole_model

LIBRARIES = 400 * 2**20  # host bytes of torch, transformers and their dependencies
CUDA_LIBRARIES = int(1.45 * GIB)  # additional host bytes of CUDA and its libraries
SHARDS = 1.5  # shards in memory while one is filled and the previous one is written
FREED = 200 * 2**20  # host bytes that the allocator keeps after the threads that write shards freed them
UNITS = 2  # units with codes on the device while one is packed and the next one is read
PACKING = 5  # bytes per weight of a linear while three threads pack or hash codes
HASHING = 16  # bytes per weight of a linear while four threads unpack and hash codes
RECONSTRUCTING = 9  # bytes per weight of a linear while compressed-tensors unpacks it
PIXEL_BYTES = 4  # bytes per pixel and color: float32
NEEDED = ("quantize", "write", "verify")
ON_CPU = "--device cpu"
REMEDIES: dict[str, tuple[str, ...]] = {  # step -> what needs less memory
    "read data": ("fewer --samples",),
    "quantize": ("fewer --samples", "a smaller calibration.batch in the recipe", ON_CPU),
    "evaluate": ("a smaller --eval-batch", ON_CPU, "--skip-evaluation"),
    "evaluate again": ("a smaller --eval-batch", "fewer --eval-samples", ON_CPU),
    "check": (ON_CPU,),
}


@dataclass(frozen=True)
class Step:
    """One step of an export with its peak memory in bytes.

    device_bytes: on the GPU; 0 on a CPU. host_bytes: of the process, without page cache; on a CPU it includes the
    tensors of the computation. seconds: approximate when predicted. note: how the step is done. warning: how that
    differs from the request.
    """

    name: str
    device_bytes: int
    host_bytes: int
    seconds: float
    note: str = ""
    warning: str = ""

    def as_json(self) -> dict[str, Any]:
        """JSON-compatible data for `--json`."""
        return {
            "name": self.name,
            "device_bytes": self.device_bytes,
            "host_bytes": self.host_bytes,
            "seconds": round(self.seconds, 3),
            "note": self.note,
        }


def predict_steps(
    recipe: Recipe, checkpoint: Checkpoint, family: Family, rows: Sequence[PlanRow], memory: Memory, device: Device
) -> tuple[Step, ...]:
    """Every step of an export in order, and last the reference of `mmq check` for families that vLLM serves."""
    samples = recipe.calibration.samples if memory.activation_bytes else 0
    pixels = samples * 3 * _side(checkpoint.config) ** 2 * PIXEL_BYTES
    speed, size = rates(device), sum(row.bytes_after for row in rows)
    planned = [row for row in rows if row.rule]
    largest = max((row.tensor.size for row in planned), default=0)
    unit = max(_sizes(planned).values(), default=0)
    itemsize = 2 if device.is_cuda else 4
    whole = whole_model(checkpoint.tensors, family, checkpoint.config)
    stored = next((row.tensor.dtype for row in rows if row.linear), rows[0].tensor.dtype)
    placement = choose_placement(whole, stored, device, device.free_bytes, recipe.evaluation.batch)
    verify = max(HASHING * largest, 2 * whole.block * itemsize + RECONSTRUCTING * largest)
    shard_bytes = int(SHARDS * min(SHARD_BYTES, size)) + FREED
    seconds = quantize_seconds(recipe, checkpoint, family, planned, device)
    steps = [
        Step("plan", 0, LIBRARIES // 2, 1.0),
        Step("read data", 0, LIBRARIES + pixels, IMPORTS + samples * PICTURE),
        _computed("quantize", memory.device_bytes, pixels, seconds, device, memory.largest),
        _computed("write", UNITS * unit + PACKING * largest, shard_bytes, size / speed.write, device),
        _computed("verify", verify, 0, size / speed.verify, device),
        _evaluation(recipe, checkpoint, family, whole, placement, device),
    ]
    return tuple(steps if family.unserved else [*steps, _check(whole, device)])


def _computed(name: str, working: int, host: int, seconds: float, device: Device, note: str = "") -> Step:
    """A step that uses `working` bytes on the compute device and `host` additional bytes in the process."""
    if device.is_cuda:
        return Step(name, working, LIBRARIES + CUDA_LIBRARIES + host, seconds, note)
    return Step(name, 0, LIBRARIES + host + working, seconds, note)


def _evaluation(
    recipe: Recipe, checkpoint: Checkpoint, family: Family, whole: WholeModel, placement: Placement, device: Device
) -> Step:
    """The evaluation step: both models are loaded in turn, the first is freed before the second is loaded."""
    host = placement.batch * 3 * _side(checkpoint.config) ** 2 * PIXEL_BYTES
    if "retrieval" in family.tasks:
        host += _retrieval_bytes(recipe.evaluation.samples, family, checkpoint.config, placement)
    how = ", block by block" if placement.streamed else ""
    note = f"both models in turn, {placement.dtype}, batch {placement.batch}{how}"
    seconds = evaluate_seconds(recipe, family, whole, placement, device)
    warning = (
        f"evaluate: {placement.note} (change this with --eval-batch, --device or --skip-evaluation)"
        if placement.note
        else ""
    )
    return replace(_computed("evaluate", placement.bytes, host, seconds, device, note), warning=warning)


def _retrieval_bytes(pictures: int, family: Family, config: Mapping[str, Any], placement: Placement) -> int:
    """Host bytes of retrieval: features of all pictures (at most `BOUND`), and a float32 score of every pair."""
    vision = family.components[0]
    features = pictures * family.component("qformer").context(config) // 2 * placement.dtype.itemsize
    texts = 5 * pictures
    assert vision.name == "vision"
    return min(BOUND, features) + pictures * texts * 4


def _check(whole: WholeModel, device: Device) -> Step:
    """The reference of `mmq check`: float32 if that fits into memory, else 16 bits; one sample at a time."""
    wide = 4 * whole.parameters * ROOM_FOR_ACTIVATIONS < device.free_bytes
    itemsize = 4 if wide else 2
    size = whole.weight_bytes(itemsize) + whole.sample_bytes(itemsize)
    return _computed("check", size, 0, check_seconds(whole, device), device, "the reference of `mmq check`")


def _side(config: Mapping[str, Any]) -> int:
    """Side length of the model's input pictures in pixels."""
    return int(config["vision_config"].get("image_size", 224))


def _sizes(rows: Sequence[PlanRow]) -> dict[str, int]:
    """Block -> number of its weights to quantize."""
    sizes: dict[str, int] = {}
    for row in rows:
        sizes[row.block] = sizes.get(row.block, 0) + row.tensor.size
    return sizes


def advice(step: str, device: Device) -> str:
    """What to do when a step runs out of memory on this device."""
    remedies = [remedy for remedy in REMEDIES.get(step, ()) if device.is_cuda or remedy != ON_CPU]
    if not remedies:
        return "close other programs that use memory, or use a machine with more"
    *others, last = remedies
    return f"use {', '.join(others)}{',' if len(others) > 1 else ''} or {last}" if others else f"use {last}"


def shortages(steps: Sequence[Step], device: Device) -> dict[str, str]:
    """Name of each step that does not fit into free memory -> a sentence with the sizes and a remedy."""
    problems, host = {}, free_host_bytes()
    for step in steps:
        places = [(device.name, step.device_bytes, device.free_bytes), ("the host", step.host_bytes, host)]
        short = [
            f"about {need / GIB:.1f} GiB on {name}, where {free / GIB:.1f} GiB are free"
            for name, need, free in places
            if need > free
        ]
        if short:
            problems[step.name] = f"{step.name} needs {' and '.join(short)}: {advice(step.name, device)}"
    return problems


def step_warnings(steps: Sequence[Step], device: Device, skip_evaluation: bool = False) -> list[str]:
    """Warnings about steps that do not fit into free memory, or that run differently than requested."""
    skipped = ("evaluate",) if skip_evaluation else ()
    changed = [step.warning for step in steps if step.warning and step.name not in skipped]
    return changed + [problem for name, problem in shortages(steps, device).items() if name not in skipped]


def refuse_shortage(steps: Sequence[Step], device: Device) -> None:
    """PlanError when the steps that make the artifact do not fit into free memory."""
    problems = shortages(steps, device)
    if needed := [problems[name] for name in NEEDED if name in problems]:
        raise PlanError("\n".join(needed))
