"""Write the artifact's shards from finished units; reading ahead, hashing and writing run in parallel."""

import hashlib
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from exporter.artifact.artifact_config import cache_scales
from exporter.events import Event, Listener
from exporter.files.shard_writer import SHARD_BYTES, ShardWriter
from exporter.formats import FORMATS
from exporter.model.checkpoint import Checkpoint
from exporter.numerics.bit_packing import pack_bits
from exporter.numerics.quantized import QuantizedLinear
from exporter.planning.plan import Plan, PlanRow, Unit, stored_scale_dtype
from exporter.quantization.block_io import require_finite
from exporter.quantization.workdir import UnitResult, Workdir

HASHING = 4  # threads; hashlib releases the GIL, and each thread holds one linear in host memory


@dataclass(frozen=True)
class WrittenShards:
    """Hashes of the shards on disk. files: shard -> sha256. digests: module of a packed linear -> `digest`."""

    files: dict[str, str]
    digests: dict[str, str]


def write_tensors(
    plan: Plan,
    checkpoint: Checkpoint,
    workdir: Workdir,
    folder: Path,
    device: torch.device,
    on_event: Listener,
    shard_bytes: int = SHARD_BYTES,
) -> WrittenShards:
    """Write every tensor of the source, packed or unchanged (CheckpointError when a source tensor is not finite)."""
    writer = ShardWriter(folder, shard_bytes)
    for row in plan.rows:
        if not any(_inside(row, unit) for unit in plan.units):
            writer.add(row.tensor.name, require_finite(checkpoint, row.tensor.name, checkpoint.read(row.tensor.name)))
    for name in cache_scales(plan):
        writer.add(name, torch.ones(1, dtype=torch.bfloat16))
    digests: dict[str, Future[str]] = {}
    with ThreadPoolExecutor(1 + HASHING, "unit") as pool:
        ahead = {unit.index: pool.submit(workdir.read, unit, device) for unit in plan.units[:1]}
        for unit, following in zip(plan.units, (*plan.units[1:], None), strict=True):
            result = ahead.pop(unit.index).result()
            if following:
                ahead[following.index] = pool.submit(workdir.read, following, device)
            on_event(Event("write", unit.index + 1, len(plan.units), unit.block))
            packed = [row.module for row in unit.rows if row.decision == "packed"]
            hashing = {module: pool.submit(digest, result.linears[module]) for module in packed}
            for row in plan.rows:
                if _inside(row, unit):
                    for name, tensor in _stored_tensors(plan, checkpoint, row, result).items():
                        writer.add(name, tensor.cpu())
            for future in hashing.values():
                future.result()  # waits here, so that at most two units are in memory
            digests |= hashing
    return WrittenShards(writer.finish(), {module: future.result() for module, future in digests.items()})


def _inside(row: PlanRow, unit: Unit) -> bool:
    """Whether a tensor belongs to a unit's block: linears, norms and biases."""
    return row.tensor.name.startswith(unit.block + ".")


def _stored_tensors(plan: Plan, checkpoint: Checkpoint, row: PlanRow, result: UnitResult) -> dict[str, Tensor]:
    """Stored name -> tensor, of everything that the artifact stores for one tensor of a finished block."""
    name = row.tensor.name
    if row.decision == "packed":
        return FORMATS[plan.recipe.format].pack(row.module, result.linears[row.module])
    if row.decision == "dequantized":
        return {name: result.linears[row.module].dequantize(stored_scale_dtype(row.tensor.dtype).torch)}
    tensor = result.altered[name] if name in result.altered else checkpoint.read(name)
    return {name: require_finite(checkpoint, name, tensor)}


def digest(linear: QuantizedLinear) -> str:
    """sha256 over codes, scales and zero points: the identity of a quantized linear in any format."""
    hasher = hashlib.sha256()
    for tensor in (pack_bits(linear.codes, linear.scheme.bits), linear.scale, linear.zero):
        hasher.update(tensor.cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return hasher.hexdigest()
