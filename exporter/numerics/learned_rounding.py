"""Rounding and ranges of one linear, learned by sign-gradient steps (SignRound, arXiv 2309.05516 and 2512.04746).

A code is `clamp(round(w / s + v) + z)`. The offset `v` of every weight and the range of every group move by a fixed
step against the sign of their gradient. Rounding counts as the identity in gradients. Gradients are computed in closed
form from that of the dequantized weight, so nothing but the offsets is kept in float32.
"""

import torch
from torch import Tensor

from exporter.numerics.quantized import QuantizedLinear, quantize
from exporter.numerics.ranges import stored_scale

MARGIN = 1e-3  # distance of a starting value from the edge of its code's cell, in steps of the grid
NARROWEST, WIDEST = 0.25, 2.0  # bounds of a range relative to its start
PIECE = 1 << 22  # weights per step of arithmetic, to bound the temporaries


class LearnedLinear:
    """The learned state of one linear, starting from a quantized one, whose codes it reproduces exactly.

    source: `[out, in]`, the weight to approximate, in any float dtype. Only integer schemes with groups or rows.
    """

    def __init__(self, source: Tensor, start: QuantizedLinear) -> None:
        self._source, self._scheme, self._dtype = source.contiguous(), start.scheme, start.scale.dtype
        self._has_kernels, self._width = source.is_cuda, start.scheme.columns_per_group(source.shape[1])
        self._scale, self._zero = start.scale.float(), start.zero.float()
        self._low = torch.ones_like(self._scale)  # of the lower end of each range; of the whole range when symmetric
        self._high = torch.ones_like(self._scale)
        self._offset = torch.empty(source.shape, dtype=torch.float32, device=source.device)
        for part in self._parts():
            scale, zero = self._expanded(start.scale[part].float()), self._expanded(start.zero[part].float())
            ratio, code = source[part].float() / scale, start.codes[part].float() - zero
            edge = 0.5 - MARGIN
            inside = ratio.clamp(code - edge, code + edge)
            beyond = ((code + zero == 0) & (ratio < code)) | ((code + zero == self._scheme.levels) & (ratio > code))
            self._offset[part] = torch.where(beyond, 0.0, inside - ratio)  # clipped codes need no offset

    def quantized(self) -> QuantizedLinear:
        """The linear as it is rounded now."""
        scale, zero = self._grid()
        codes = torch.empty(self._source.shape, dtype=torch.uint8, device=self._source.device)
        for part in self._parts():
            shifted = self._source[part].float() + self._offset[part] * self._expanded(scale[part].float())
            codes[part] = quantize(shifted, scale[part], zero[part], self._scheme)
        return QuantizedLinear(self._scheme, codes, scale, zero)

    def served(self, dtype: torch.dtype) -> Tensor:
        """The weight `[out, in]` that vLLM multiplies by, as it is rounded now, in `dtype`."""
        if not self._has_kernels or self._scheme.mixed:
            return self.quantized().as_served().to(dtype)
        from exporter.numerics.learned_rounding_kernel import rounded_fast

        scale, zero = self._grid()
        return rounded_fast(self._source, self._offset, scale, zero, self._scheme.levels, self._width, dtype)

    def step(self, gradient: Tensor, rounding: float, ranges: float) -> None:
        """Move offsets by `rounding` and ranges by `ranges`, against the sign of their gradients.

        gradient: `[out, in]`, of the loss with respect to the dequantized weight.
        """
        if self._has_kernels:
            from exporter.numerics.learned_rounding_kernel import move_fast

            grid, levels = self._grid(), self._scheme.levels
            sums = move_fast(self._source, self._offset, gradient, grid, levels, self._width, rounding)
            self._step_ranges(slice(None), *sums, ranges)
        else:
            self._step_plain(gradient, rounding, ranges)

    def _step_plain(self, gradient: Tensor, rounding: float, ranges: float) -> None:
        """`step` in torch."""
        scale, zero = self._grid()
        for part in self._parts():
            steps, zeros = self._expanded(scale[part].float()), self._expanded(zero[part].float())
            slope = gradient[part].float().nan_to_num_()
            ratio = self._source[part].float() / steps
            code = (ratio + self._offset[part]).round_() + zeros
            inside = (code >= 0) & (code <= self._scheme.levels)
            by_scale = slope * (code.clamp_(0, self._scheme.levels) - zeros - torch.where(inside, ratio, 0.0))
            self._offset[part] -= rounding * (slope * steps).sign() * inside
            by_zero = torch.where(inside, 0.0, -slope * steps)
            self._step_ranges(part, self._summed(by_scale), self._summed(by_zero), ranges)

    def _step_ranges(self, part: slice, by_scale: Tensor, by_zero: Tensor, step: float) -> None:
        """Move the ranges of some rows. by_scale, by_zero: gradients of scales and zero points, `[rows, groups]`."""
        if self._scheme.symmetric:
            self._low[part] = (self._low[part] - step * (by_scale * self._scale[part]).sign()).clamp_(NARROWEST, WIDEST)
            return
        least, most = self._ends(part)
        low, high, levels = self._low[part], self._high[part], self._scheme.levels
        scale = ((most * high - least * low) / levels).clamp_min(torch.finfo(self._dtype).tiny)
        zero_by_scale = least * low / scale.square()  # of zero = -least * low / scale
        to_scale = by_scale + by_zero * zero_by_scale
        low_slope = -to_scale * least / levels - by_zero * least / scale
        high_slope = to_scale * most / levels
        self._low[part] = (low - step * low_slope.sign()).clamp_(NARROWEST, WIDEST)
        self._high[part] = (high - step * high_slope.sign()).clamp_(NARROWEST, WIDEST)

    def _ends(self, part: slice) -> tuple[Tensor, Tensor]:
        """Both ends of the starting ranges, `[rows, groups]`."""
        return -self._zero[part] * self._scale[part], (self._scheme.levels - self._zero[part]) * self._scale[part]

    def _grid(self) -> tuple[Tensor, Tensor]:
        """Scales as stored, and zero points, `[out, groups]`."""
        if self._scheme.symmetric:
            return stored_scale(self._scale * self._low, self._dtype), self._zero.to(torch.uint8)
        least, most = self._ends(slice(None))
        scale = stored_scale((most * self._high - least * self._low) / self._scheme.levels, self._dtype)
        zero = (-least * self._low / scale.float()).round_().clamp_(0, self._scheme.levels)
        return scale, zero.to(torch.uint8)

    def _parts(self) -> list[slice]:
        """Slices of rows."""
        rows = max(1, PIECE // self._source.shape[1])
        return [slice(start, start + rows) for start in range(0, len(self._source), rows)]

    def _expanded(self, per_group: Tensor) -> Tensor:
        """`[rows, groups]` repeated to columns, `[rows, in]`."""
        columns = self._source.shape[1]
        return per_group.repeat_interleave(self._scheme.columns_per_group(columns), dim=1)[:, :columns]

    def _summed(self, per_weight: Tensor) -> Tensor:
        """Sums over the columns of each group, `[rows, groups]`."""
        rows, columns = per_weight.shape
        groups, width = self._scheme.groups(columns), self._scheme.columns_per_group(columns)
        return torch.nn.functional.pad(per_weight, (0, groups * width - columns)).view(rows, groups, width).sum(-1)
