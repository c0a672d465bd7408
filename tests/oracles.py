"""Naive twins of optimized code: slow, short, and easy to believe."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from exporter.numerics.quantized import ColumnGrid, Scheme, dequantize, quantize
from exporter.numerics.ranges import fit_scale


def naive_paired_bootstrap(
    before: Sequence[float], after: Sequence[float], seed: int, resamples: int
) -> tuple[float, float]:
    """95 % percentile interval of the mean of after - before, one drawn sample at a time."""
    generator = np.random.default_rng(seed)
    means = []
    for _ in range(resamples):
        drawn = generator.choice(len(before), len(before), replace=True)
        means.append(sum(after[i] - before[i] for i in drawn) / len(before))
    means.sort()
    return means[round(0.025 * resamples)], means[round(0.975 * resamples) - 1]


def naive_log_likelihood(model: Any, inputs: Mapping[str, Tensor], first: int) -> float:
    """Mean log-probability of tokens `first`.. of one unpadded text: each token asked for in a pass of its own."""
    tokens = inputs["input_ids"]
    rest = {name: value for name, value in inputs.items() if name not in ("input_ids", "attention_mask")}
    total = 0.0
    for position in range(first, tokens.shape[1]):
        with torch.no_grad():
            scores = model(input_ids=tokens[:, :position], **rest).logits[0, -1].double()
        total += float(scores[tokens[0, position]] - torch.logsumexp(scores, 0))
    return total / (tokens.shape[1] - first)


def columns_by_hand(weight: Tensor, upper: Tensor, grid: ColumnGrid) -> tuple[Tensor, Tensor]:
    """Codes and errors of GPTQ's column loop, each column by `quantize` and `dequantize` with its own scale."""
    weight, errors = weight.clone(), torch.empty_like(weight)
    codes = torch.empty_like(weight, dtype=torch.uint8)
    scale, zero, single = grid.expanded()
    for i in range(weight.shape[1]):
        column, later = slice(i, i + 1), slice(i + 1, None)
        step = (scale[:, column], zero[:, column], single)
        codes[:, column] = quantize(weight[:, column], *step)
        errors[:, column] = (weight[:, column] - dequantize(codes[:, column], *step)) / upper[i, i]
        weight[:, later].addmm_(errors[:, column], upper[column, later], alpha=-1)
    return codes, errors


def descent_columns_by_hand(
    weight: Tensor, gradient: Tensor, hessian: Tensor, diagonal: Tensor, grid: ColumnGrid, errors: Tensor
) -> tuple[Tensor, Tensor]:
    """Codes and errors after one round of coordinate descent, each column by `quantize` and `dequantize`."""
    best, errors = weight + gradient / diagonal, errors.clone()
    codes = torch.empty_like(weight, dtype=torch.uint8)
    update = hessian.float() / diagonal
    scale, zero, single = grid.expanded()
    for i in range(weight.shape[1]):
        column, later = slice(i, i + 1), slice(i + 1, None)
        step = (scale[:, column], zero[:, column], single)
        codes[:, column] = quantize(best[:, column], *step)
        error = weight[:, column] - dequantize(codes[:, column], *step)
        best[:, later].addmm_(error - errors[:, column], update[column, later])
        errors[:, column] = error
    return codes, errors


def gptq_by_inversion(
    weight: torch.Tensor,
    hessian: torch.Tensor,
    scheme: Scheme,
    scale: torch.Tensor,
    zero: torch.Tensor,
    damping: float,
    order: list[int],
    fit: Callable[[torch.Tensor], tuple[torch.Tensor, torch.Tensor]] | None = None,
) -> torch.Tensor:
    """GPTQ as the paper derives it: invert what is left of the Hessian again at every column, in float64.

    fit: when given, the scale of a group is taken from its weights as they are when its first column is reached.
    Returns the codes; `scale` and `zero` `[out, groups]` are rewritten when `fit` is given.
    """
    rest, single = weight.double().clone(), Scheme(scheme.bits, 1, scheme.symmetric, scheme.number)
    width = scheme.columns_per_group(weight.shape[1])
    damped = hessian.double() + torch.eye(len(hessian)) * damping * hessian.diagonal().double().mean()
    codes = torch.zeros(weight.shape, dtype=torch.uint8)
    for step, column in enumerate(order):
        left = order[step:]
        group = slice(column // width, column // width + 1)
        if fit and column % width == 0:
            scale[:, group], zero[:, group] = fit(rest[:, column : column + width].float())
        now = rest[:, column : column + 1]
        code = quantize(now.float(), scale[:, group], zero[:, group], single)
        codes[:, column : column + 1] = code
        inverse = torch.linalg.inv(damped[left][:, left])
        error = (now - dequantize(code, scale[:, group], zero[:, group], single).double()) / inverse[0, 0]
        rest[:, left] -= error @ inverse[:1]
    return codes


def descent_by_hand(
    weight: torch.Tensor, codes: torch.Tensor, steps: torch.Tensor, zero: torch.Tensor, levels: int, damped: Tensor
) -> torch.Tensor:
    """Coordinate descent: every code in turn, columns by falling diagonal, becomes the one with the least error.

    All are tried, in float64. steps, zero: `[out, in]`, scale and zero of every weight. Returns the codes.
    """
    codes = codes.clone()
    for row in range(len(weight)):
        for column in damped.diagonal().argsort(descending=True, stable=True).tolist():
            errors = []
            for code in range(levels + 1):
                codes[row, column] = code
                off = weight[row].double() - (codes[row].double() - zero[row]) * steps[row].double()
                errors.append(float(off @ damped.double() @ off))
            codes[row, column] = errors.index(min(errors))
    return codes


def pack_bits_by_integers(row: list[int], bits: int) -> list[int]:
    """One row of codes as one large integer, cut into signed 32-bit words."""
    stream = sum(code << (i * bits) for i, code in enumerate(row))
    words = -(-len(row) * bits // 32)
    unsigned = [stream >> (32 * i) & 0xFFFFFFFF for i in range(words)]
    return [word - 2**32 if word >= 2**31 else word for word in unsigned]


def naive_pack_bits(rows: Sequence[Sequence[int]], bits: int) -> list[list[int]]:
    """Each row as one big integer, code i at bit `i*bits`, cut into signed 32-bit words."""
    packed = []
    for row in rows:
        stream = sum(code << (i * bits) for i, code in enumerate(row))
        count = -(-len(row) * bits // 32)
        words = [(stream >> (32 * i)) & 0xFFFFFFFF for i in range(count)]
        packed.append([word - (1 << 32) if word >> 31 else word for word in words])
    return packed


def awq_candidates_by_hand(weights: Sequence[Tensor], x: Tensor, scheme: Scheme, points: int = 20) -> list[list[float]]:
    """The scales that AWQ tries, column by column: none, then one set for each exponent."""
    columns = x.shape[1]
    width = scheme.columns_per_group(columns)
    sizes = [float(x[:, j].square().mean()) ** 0.5 for j in range(columns)]
    reach = []
    for j in range(columns):
        group = slice(j // width * width, j // width * width + width)
        shares = [float(row[j].abs() / row[group].abs().max()) for weight in weights for row in weight]
        reach.append(sum(shares) / len(shares))
    candidates = [[1.0] * columns]
    for ratio in (i / points for i in range(points)):
        raw = [sizes[j] ** ratio / reach[j] ** (1 - ratio) for j in range(columns)]
        candidates.append([s / (max(raw) * min(raw)) ** 0.5 for s in raw])
    return candidates


def awq_scales_by_hand(weights: Sequence[Tensor], x: Tensor, scheme: Scheme, scale_dtype: torch.dtype) -> Tensor:
    """AWQ's search for scales, weight by weight, with inputs really divided."""
    candidates, errors = awq_candidates_by_hand(weights, x, scheme), []
    for scales in map(torch.tensor, candidates):
        error = 0.0
        for weight in weights:
            scale, zero = fit_scale(weight * scales, scheme, scale_dtype)
            stored = dequantize(quantize(weight * scales, scale, zero, scheme), scale, zero, scheme)
            error += float(((x / scales) @ stored.T - x @ weight.T).double().square().sum())
        errors.append(error)
    return torch.tensor(candidates[errors.index(min(errors))])


def awq_clip_by_hand(weight: Tensor, x: Tensor, scheme: Scheme, scale_dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """AWQ's search for ranges, one group of one row at a time, by its part of the output of every input.

    Returns scale and zero `[out, groups]`. A row whose whole output is no better than with full ranges keeps those.
    """
    width = scheme.columns_per_group(weight.shape[1])
    alone = Scheme(scheme.bits, "row", scheme.symmetric, scheme.number)

    def ranges(part: Tensor) -> list[tuple[Tensor, Tensor]]:
        ends = [torch.stack([part.min().clamp_max(0), part.max().clamp_min(0)])[None] * (1 - i / 20) for i in range(11)]
        return [fit_scale(end, alone, scale_dtype) for end in ends]

    def output(part: Tensor, inputs: Tensor, scale_zero: tuple[Tensor, Tensor]) -> Tensor:
        lost = dequantize(quantize(part, *scale_zero, alone), *scale_zero, alone) - part
        return inputs.double() @ lost[0].double()

    scale, zero = fit_scale(weight, scheme, scale_dtype)
    for o, row in enumerate(weight):
        pieces = list(zip(row[None].split(width, dim=1), x.split(width, dim=1), strict=True))
        best = [min(ranges(part), key=lambda found: float(output(part, y, found).square().sum())) for part, y in pieces]
        whole = [
            sum(output(part, y, found) for (part, y), found in zip(pieces, some, strict=True)).square().sum()
            for some in (best, [ranges(part)[0] for part, _ in pieces])
        ]
        if whole[0] < whole[1]:
            scale[o] = torch.cat([found[0][0] for found in best])
            zero[o] = torch.cat([found[1][0] for found in best])
    return scale, zero
