"""What each step of an export takes: peaks of device and host memory, and seconds.

Predicted before anything is read, measured by the export's clock (`clock`), and shown beside each other.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from exporter.device import Device, free_host_bytes
from exporter.errors import PlanError
from exporter.files.shard_writer import SHARD_BYTES
from exporter.inference.row_store import BOUND
from exporter.model.checkpoint import Checkpoint
from exporter.model.families import Family
from exporter.planning.decisions import PlanRow
from exporter.planning.durations import check_seconds, evaluate_seconds, quantize_seconds
from exporter.planning.memory import Memory
from exporter.planning.placement import GIB, Placement, place
from exporter.planning.rates import IMPORTS, PICTURE, rates
from exporter.planning.recipe import Recipe
from exporter.planning.whole_model import ROOM_FOR_ACTIVATIONS, WholeModel, whole_model

LIBRARIES = 400 * 2**20  # torch, transformers and what they need, in the process
CUDA_LIBRARIES = int(1.5 * GIB)  # what CUDA and its libraries add there
SHARDS = 1.5  # that are held while one is filled and the one before is written
UNITS = 2  # whose codes are on the device while one is packed and the next one is read
PACKING = 6  # bytes of every weight of a linear while three threads pack or hash codes
HASHING = 16  # bytes of every weight of a linear while four threads unpack and hash codes
RECONSTRUCTING = 10  # bytes of every weight of a linear while compressed-tensors unpacks it and mmq does
PIXEL_BYTES = 4  # float32, of three colors
NEEDED = ("quantize", "write", "verify")
OTHERS = "end other programs that hold memory"
ADVICE = {
    "plan": OTHERS,
    "read data": "use fewer --samples",
    "quantize": "use fewer --samples, a smaller calibration.batch in the recipe, or --device cpu",
    "write": OTHERS,
    "verify": OTHERS,
    "evaluate": "use a smaller --eval-batch, --device cpu, or --skip-evaluation",
    "check": "use --device cpu",
}


@dataclass(frozen=True)
class Step:
    """One step, and its peaks in bytes.

    device_bytes: on the GPU; 0 on a CPU. host_bytes: of the process, page cache aside; on a CPU what it computes with
    is in it. seconds: about, when predicted. note: how it is done. warning: how that differs from what was asked for.
    """

    name: str
    device_bytes: int
    host_bytes: int
    seconds: float
    note: str = ""
    warning: str = ""

    def as_json(self) -> dict[str, Any]:
        """Plain data for `--json`."""
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
    """Every step of an export in order, and last the reference of `mmq check`."""
    samples = recipe.calibration.samples if memory.activation_bytes else 0
    pixels = samples * 3 * _side(checkpoint.config) ** 2 * PIXEL_BYTES
    speed, after = rates(device), sum(row.bytes_after for row in rows)
    planned = [row for row in rows if row.rule]
    largest = max((row.tensor.size for row in planned), default=0)
    unit = max(_sizes(planned).values(), default=0)
    itemsize = 2 if device.is_cuda else 4
    whole = whole_model(checkpoint.tensors, family, checkpoint.config)
    stored = next((row.tensor.dtype for row in rows if row.linear), rows[0].tensor.dtype)
    held = place(whole, stored, device, device.free_bytes, recipe.evaluation.batch)
    verify = max(HASHING * largest, whole.block * itemsize + RECONSTRUCTING * largest)
    shard = int(SHARDS * min(SHARD_BYTES, after))
    seconds = quantize_seconds(recipe, checkpoint, family, planned, device)
    steps = [
        Step("plan", 0, LIBRARIES // 2, 1.0),
        Step("read data", 0, LIBRARIES + pixels, IMPORTS + samples * PICTURE),
        _computed("quantize", memory.device_bytes, pixels, seconds, device, memory.largest),
        _computed("write", UNITS * unit + PACKING * largest, shard, after / speed.write, device),
        _computed("verify", verify, 0, after / speed.verify, device),
        _evaluation(recipe, checkpoint, family, whole, held, device),
    ]
    return tuple(steps if family.unserved else [*steps, _check(whole, device)])


def _computed(name: str, working: int, host: int, seconds: float, device: Device, note: str = "") -> Step:
    """A step that works with `working` bytes where it computes and `host` bytes in the process besides."""
    if device.is_cuda:
        return Step(name, working, LIBRARIES + CUDA_LIBRARIES + host, seconds, note)
    return Step(name, 0, LIBRARIES + host + working, seconds, note)


def _evaluation(
    recipe: Recipe, checkpoint: Checkpoint, family: Family, whole: WholeModel, held: Placement, device: Device
) -> Step:
    """Both models in turn: the first is gone before the second comes."""
    host = held.batch * 3 * _side(checkpoint.config) ** 2 * PIXEL_BYTES
    if "retrieval" in family.tasks:
        host += _searched_bytes(recipe.evaluation.samples, family, checkpoint.config, held)
    numbers = str(held.dtype).removeprefix("torch.")
    how = f"both models in turn, {numbers}, batch {held.batch}{', block by block' if held.streamed else ''}"
    seconds = evaluate_seconds(recipe, family, whole, held, device)
    warning = f"evaluate: {held.note} (--eval-batch, --device and --skip-evaluation change that)" if held.note else ""
    return replace(_computed("evaluate", held.bytes, host, seconds, device, how), warning=warning)


def _searched_bytes(pictures: int, family: Family, config: Mapping[str, Any], held: Placement) -> int:
    """What a search keeps on the host: features of all pictures, within a bound, and a score of every pair."""
    vision = family.components[0]
    features = pictures * family.component("qformer").context(config) // 2 * held.dtype.itemsize
    texts = 5 * pictures
    assert vision.name == "vision"
    return min(BOUND, features) + pictures * texts * 4


def _check(whole: WholeModel, device: Device) -> Step:
    """The reference of `mmq check`: float32 if that fits, else 16 bits, one sample at a time."""
    wide = 4 * whole.parameters * ROOM_FOR_ACTIVATIONS < device.free_bytes
    itemsize = 4 if wide else 2
    size = whole.weight_bytes(itemsize) + whole.sample_bytes(itemsize)
    return _computed("check", size, 0, check_seconds(whole, device), device, "the reference of `mmq check`")


def _side(config: Mapping[str, Any]) -> int:
    return int(config["vision_config"].get("image_size", 224))


def _sizes(rows: Sequence[PlanRow]) -> dict[str, int]:
    """Planned weights of every block."""
    sizes: dict[str, int] = {}
    for row in rows:
        sizes[row.block] = sizes.get(row.block, 0) + row.tensor.size
    return sizes


def shortages(steps: Sequence[Step], device: Device) -> dict[str, str]:
    """Name of each step that does not fit into free memory -> a sentence with the sizes and what makes it fit."""
    problems, host = {}, free_host_bytes()
    for step in steps:
        places = [(device.name, step.device_bytes, device.free_bytes), ("the host", step.host_bytes, host)]
        short = [
            f"about {need / GIB:.1f} GiB on {name}, where {free / GIB:.1f} are free"
            for name, need, free in places
            if need > free
        ]
        if short:
            problems[step.name] = f"{step.name} takes {' and '.join(short)}: {ADVICE[step.name]}"
    return problems


def step_warnings(steps: Sequence[Step], device: Device, skip_evaluation: bool = False) -> list[str]:
    """Steps that do not fit into free memory, or fit in another way than was asked for."""
    skipped = ("evaluate",) if skip_evaluation else ()
    changed = [step.warning for step in steps if step.warning and step.name not in skipped]
    return changed + [problem for name, problem in shortages(steps, device).items() if name not in skipped]


def refuse_shortage(steps: Sequence[Step], device: Device) -> None:
    """PlanError when the artifact cannot be made in the memory that is free."""
    problems = shortages(steps, device)
    if needed := [problems[name] for name in NEEDED if name in problems]:
        raise PlanError("\n".join(needed))
