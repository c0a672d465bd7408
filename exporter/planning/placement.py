"""How a whole model is held while it answers: in which numbers, how many samples at a time, whole or block by block.

The first way that fits into free memory is taken. On a GPU: whole, in the checkpoint's own numbers; else block by
block, each fetched from the files for every pass. On a CPU: whole in float32; whole in bfloat16; block by block.
"""

from dataclasses import dataclass, replace

import torch

from exporter.device import Device
from exporter.planning.whole_model import WholeModel

GIB = 2**30


@dataclass(frozen=True)
class Placement:
    """A way to hold a model.

    batch: samples at a time. streamed: blocks come and go. bytes: what weights and a batch take together.
    fits: whether free memory holds that. note: how it differs from what was asked for, and why; empty when it does not.
    """

    dtype: torch.dtype
    batch: int
    streamed: bool
    bytes: int
    fits: bool = True
    note: str = ""


def place(model: WholeModel, stored: torch.dtype, device: Device, room: int, batch: int) -> Placement:
    """The first way that fits; when none does, the smallest one, which says so.

    stored: dtype of the checkpoint's linears. room: free bytes of the device's memory. batch: the most samples at once.
    """
    dtype = device.compute_dtype(stored)
    usual = _way(model, dtype, batch)
    ways = (
        [(dtype, False), (dtype, True)] if device.is_cuda else [(dtype, False), (torch.bfloat16, False), (dtype, True)]
    )
    for numbers, streamed in ways:
        most = min(batch, model.batch_within(room, numbers.itemsize, streamed))
        if most:
            chosen = _way(model, numbers, most, streamed)
            break
    else:
        chosen = replace(_way(model, dtype, 1, streamed=True), fits=False)
    return replace(chosen, note=_note(usual, chosen, device, room))


def _way(model: WholeModel, dtype: torch.dtype, batch: int, streamed: bool = False) -> Placement:
    size = model.weight_bytes(dtype.itemsize, streamed) + batch * model.sample_bytes(dtype.itemsize)
    return Placement(dtype, batch, streamed, size)


def _note(usual: Placement, chosen: Placement, device: Device, room: int) -> str:
    """The difference between two ways in words."""
    changes = []
    if chosen.dtype != usual.dtype:
        changes.append(f"in {str(chosen.dtype).removeprefix('torch.')}")
    if chosen.streamed:
        changes.append("block by block, which is slow")
    if chosen.batch != usual.batch:
        changes.append("one sample at a time" if chosen.batch == 1 else f"{chosen.batch} samples at a time")
    if not changes:
        return ""
    need = f"{usual.bytes / GIB:.1f} GiB for {usual.batch} samples at a time and {room / GIB:.1f} GiB are free"
    said = f"the whole model takes {need} on {device.name}: it runs {', '.join(changes)}"
    return said if chosen.fits else f"{said}, and even that takes {chosen.bytes / GIB:.1f} GiB"
