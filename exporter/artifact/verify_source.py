"""Compare the weights that an artifact serves with those of the source, row by row.

Digests prove that an artifact holds what was computed; this shows that what was computed is still the source's weight.
A fold may have scaled rows and columns, and methods with calibration data move weights that no input uses, so that the
direction of each row is compared after the best scales of columns were taken out. Rounding to 2 bits leaves cosines
above 0.6, a lost or exchanged row one near 0.
"""

from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor

from exporter.artifact.artifact import Artifact
from exporter.model.checkpoint import Checkpoint
from exporter.numerics.quantized import QuantizedLinear

LEAST = 0.3  # cosine of a row and the source's
TURNS = 2  # of fitting scales of columns, then of rows
THREADS = 4  # each holds a linear


def unlike_source(artifact: Artifact, source: Checkpoint, rows: int | None = None) -> list[str]:
    """A sentence for every linear that has rows unlike the source's.

    rows: how many of each linear are compared, evenly spread; None: all.
    """
    with ThreadPoolExecutor(THREADS) as pool:
        problems = pool.map(lambda module: _unlike(artifact, source, module, rows), artifact.manifest.errors)
        return [problem for problem in problems if problem]


def _unlike(artifact: Artifact, source: Checkpoint, module: str, rows: int | None) -> str:
    name = f"{module}.weight"
    if name not in source.tensors:
        return f"{module}: the source has no such linear"
    weight = source.read(name)
    step = max(1, len(weight) // rows) if rows else 1
    taken = weight[::step].to(artifact.device).float()
    served = _served_rows(artifact, module, step)
    if taken.shape != served.shape:
        return f"{module} has another shape than the source's, {list(weight.shape)}"
    cosines = row_cosines(taken, served)
    low = int((cosines < LEAST).sum())
    return f"{module}: {low} of {len(cosines)} compared rows are unlike the source's" if low else ""


def _served_rows(artifact: Artifact, module: str, step: int) -> Tensor:
    """Every `step`-th row of a linear as an engine multiplies by it, f32, dequantized after it is chosen."""
    if module not in artifact.manifest.linears:
        return artifact.read(f"{module}.weight")[::step].to(artifact.device).float()
    whole = artifact.linear(module)
    return QuantizedLinear(whole.scheme, whole.codes[::step], whole.scale[::step], whole.zero[::step]).as_served()


def row_cosines(weight: Tensor, served: Tensor) -> Tensor:
    """Cosine f32 `[rows]` of each row of `served` and `weight`, f32 `[rows, in]`, after the best scales of columns.

    1 where the source's row is zero; 0 where only the served one is.
    """
    tiny = torch.finfo(torch.float32).tiny
    weight = weight / weight.abs().amax().clamp_min(tiny)  # squares of small weights would vanish
    served = served / served.abs().amax().clamp_min(tiny)
    rows = torch.ones(len(weight), 1, device=weight.device)
    scaled = weight
    for _ in range(TURNS):
        ours = weight * rows
        columns = (served * ours).sum(0) / ours.square().sum(0).clamp_min(tiny)
        scaled = weight * columns
        rows = (served * scaled).sum(1, keepdim=True) / scaled.square().sum(1, keepdim=True).clamp_min(tiny)
    lengths = served.norm(dim=1) * scaled.norm(dim=1)
    cosines = (served * scaled).sum(1).abs() / lengths.clamp_min(tiny)
    return torch.where((weight == 0).all(1), 1.0, cosines)
