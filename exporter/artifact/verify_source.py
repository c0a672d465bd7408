"""Compare the weights that an artifact serves with those of the source, row by row.

Digests prove that an artifact holds the computed integers; this comparison proves that they represent the source's
weights. Folds scale rows and columns, and calibrated methods move weights that no input uses. The comparison therefore
fits column scales first and then takes the cosine of each row. Rounding to 2 bits leaves cosines above 0.6; a lost or
exchanged row has a cosine near 0.
"""

from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor

from exporter.artifact.artifact import Artifact
from exporter.model.checkpoint import Checkpoint
from exporter.numerics.quantized import QuantizedLinear

MIN_COSINE = 0.3  # between a served row and the source's row
FIT_ITERATIONS = 2  # each fits column scales, then row scales
THREADS = 4  # each thread holds one linear


def unlike_source(artifact: Artifact, source: Checkpoint, rows: int | None = None) -> list[str]:
    """One line per linear with rows that do not match the source's.

    rows: number of evenly spaced rows to compare per linear; None: all rows.
    """
    with ThreadPoolExecutor(THREADS) as pool:
        problems = pool.map(lambda module: _problem(artifact, source, module, rows), artifact.manifest.errors)
        return [problem for problem in problems if problem]


def _problem(artifact: Artifact, source: Checkpoint, module: str, rows: int | None) -> str:
    """Description of how a linear differs from the source's; empty when its rows match."""
    name = f"{module}.weight"
    if name not in source.tensors:
        return f"{module}: the source has no such linear"
    weight = source.read(name)
    step = max(1, len(weight) // rows) if rows else 1
    expected = weight[::step].to(artifact.device).float()
    served = _served_rows(artifact, module, step)
    if expected.shape != served.shape:
        return f"{module} differs in shape from the source's {list(weight.shape)}"
    cosines = row_cosines(expected, served)
    low = int((cosines < MIN_COSINE).sum())
    return f"{module}: {low} of {len(cosines)} compared rows do not match the source's" if low else ""


def _served_rows(artifact: Artifact, module: str, step: int) -> Tensor:
    """Every `step`-th row of a linear as vLLM serves it, f32 `[rows, in]`; only these rows are dequantized."""
    if module not in artifact.manifest.linears:
        return artifact.read(f"{module}.weight")[::step].to(artifact.device).float()
    whole = artifact.linear(module)
    return QuantizedLinear(whole.scheme, whole.codes[::step], whole.scale[::step], whole.zero[::step]).as_served()


def row_cosines(weight: Tensor, served: Tensor) -> Tensor:
    """Cosine, f32 `[rows]`, between the rows of `served` and `weight`, f32 `[rows, in]`, after fitting column scales.

    1 where the source's row is zero; 0 where only the served row is zero.
    """
    tiny = torch.finfo(torch.float32).tiny
    weight = weight / weight.abs().amax().clamp_min(tiny)  # prevents underflow of the squares of small weights
    served = served / served.abs().amax().clamp_min(tiny)
    rows = torch.ones(len(weight), 1, device=weight.device)
    scaled = weight
    for _ in range(FIT_ITERATIONS):
        scaled_rows = weight * rows
        columns = (served * scaled_rows).sum(0) / scaled_rows.square().sum(0).clamp_min(tiny)
        scaled = weight * columns
        rows = (served * scaled).sum(1, keepdim=True) / scaled.square().sum(1, keepdim=True).clamp_min(tiny)
    lengths = served.norm(dim=1) * scaled.norm(dim=1)
    cosines = (served * scaled).sum(1).abs() / lengths.clamp_min(tiny)
    return torch.where((weight == 0).all(1), 1.0, cosines)
