"""Chooses how a whole model is held for inference: dtype, batch size, and whole or block by block.

The first placement that fits into free memory is used. On a GPU: whole in the checkpoint's dtype, then block by block
(every pass loads each block from the files). On a CPU: whole in float32, whole in bfloat16, block by block.
"""

from dataclasses import dataclass, replace

from exporter.device import Device
from exporter.dtypes import BFLOAT16, Dtype
from exporter.planning.whole_model import WholeModel

GIB = 2**30


@dataclass(frozen=True)
class Placement:
    """How a model is held in memory.

    dtype: of the weights. batch: samples per forward pass. streamed: whether blocks are loaded when they run and freed
    afterwards. bytes: weights and one batch together. fits: whether that is within free memory. note: how the placement
    differs from the requested one, and why; empty when it does not differ.
    """

    dtype: Dtype
    batch: int
    streamed: bool
    bytes: int
    fits: bool = True
    note: str = ""


def choose_placement(model: WholeModel, stored: Dtype, device: Device, room: int, batch: int) -> Placement:
    """The first placement that fits into free memory; when none does, the smallest one, with `fits` False.

    stored: dtype of the checkpoint's linears. room: free bytes of the device's memory. batch: the largest batch size.
    """
    dtype = device.compute_dtype(stored)
    requested = _placement(model, dtype, batch)
    candidates = (
        [(dtype, False), (dtype, True)] if device.is_cuda else [(dtype, False), (BFLOAT16, False), (dtype, True)]
    )
    for candidate, streamed in candidates:
        largest = min(batch, model.batch_within(room, candidate.itemsize, streamed))
        if largest:
            placement = _placement(model, candidate, largest, streamed)
            break
    else:
        placement = replace(_placement(model, dtype, 1, streamed=True), fits=False)
    return replace(placement, note=_note(requested, placement, device, room))


def _placement(model: WholeModel, dtype: Dtype, batch: int, streamed: bool = False) -> Placement:
    size = model.weight_bytes(dtype.itemsize, streamed) + batch * model.sample_bytes(dtype.itemsize)
    return Placement(dtype, batch, streamed, size)


def _note(requested: Placement, placement: Placement, device: Device, room: int) -> str:
    """A sentence about how `placement` differs from `requested`; empty when it does not."""
    changes = []
    if placement.dtype != requested.dtype:
        changes.append(f"in {placement.dtype}")
    if placement.streamed:
        changes.append("block by block, which is slow")
    if placement.batch != requested.batch:
        changes.append("one sample at a time" if placement.batch == 1 else f"{placement.batch} samples at a time")
    if not changes:
        return ""
    need = f"{requested.bytes / GIB:.1f} GiB for {requested.batch} samples at a time and {room / GIB:.1f} GiB are free"
    note = f"the whole model needs {need} on {device.name}: it runs {', '.join(changes)}"
    return note if placement.fits else f"{note}, and even that needs {placement.bytes / GIB:.1f} GiB"
