"""The quantized linear, independent of any file format: schemes, codes, scales, zero points.

Shapes are `[out, in]`; `groups = ceil(in / group_size)`. A method computes the integers once; a format only rearranges
them. Scales are rounded to their stored dtype *before* codes are computed, so the reference `dequantize` uses exactly
the values that vLLM uses.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

from exporter.lazy_torch import torch
from exporter.numerics.float_grids import FP8_MAX, GRIDS, FloatGrid, WeightNumber, common_factor

if TYPE_CHECKING:
    from torch import Tensor


GroupSize = int | Literal["row", "tensor", "block"]
Activations = Literal["int8", "fp8"]
InputRounding = Literal["int8", "fp8", "fp8-groups"]

BLOCK = 128  # rows and columns that share a scale under group_size "block"
FLOAT_GROUPS = {"nvfp4": (4, 16), "mxfp4": (4, 32), "mxfp8": (8, 32)}  # number -> bits and group size
FP8_MIN_SCALE = 1 / (512 * FP8_MAX)  # vLLM's smallest scale of a dynamic float8 row


@dataclass(frozen=True)
class Scheme:
    """How one linear is quantized.

    bits: bits per code, 2 to 8.
    group_size: number of columns that share a scale; "row" is one scale per output row, "tensor" one for all, "block"
        one for 128 rows and 128 columns (of number fp8; its scales are powers of two).
    symmetric: the zero point is fixed at the middle code, `2**(bits-1)`.
    number: "int" (uniform integers), or a float grid without zero point: "fp8" (float8 e4m3), "mxfp8" and "mxfp4"
        (float8 and float4, groups of 32, scales are powers of two), "nvfp4" (float4, groups of 16, float8 scales).
    activations: None (weight only), or the dynamic quantization of the input at run time, per token. int8 requires
        integers; fp8 requires float8 weights or 4 bits (see `mixed`). fp8 with "block" is per token and 128 inputs.
    """

    bits: int
    group_size: GroupSize
    symmetric: bool = True
    number: WeightNumber = "int"
    activations: Activations | None = None

    @property
    def grid(self) -> FloatGrid | None:
        """The float grid of the codes; None for integers."""
        return GRIDS.get(self.number)

    @property
    def zero_code(self) -> int:
        """The code of 0 in a symmetric scheme, which is its zero point."""
        return 0 if self.grid else self.middle

    @property
    def as_int8(self) -> bool:
        """Whether 8-bit integers with int8 inputs are stored as int8 numbers, for kernels that multiply int8 by int8.

        Other integers with int8 inputs are packed like those with 16-bit inputs, and their kernel unpacks them.
        """
        plain = self.bits == 8 and self.symmetric and self.group_size in ("row", "tensor")
        return self.number == "int" and self.activations == "int8" and plain

    @property
    def input_rounding(self) -> InputRounding | None:
        """How inputs are rounded at run time; None for 16 bits."""
        in_groups = self.activations == "fp8" and self.group_size == "block"
        return "fp8-groups" if in_groups else self.activations

    @property
    def powers_of_two(self) -> bool:
        """Whether all scales are powers of two. (For "block", kernels of vLLM round them to powers of two.)"""
        return self.number in ("mxfp4", "mxfp8") or self.group_size == "block"

    def invalid(self) -> str | None:
        """Why bits, groups and inputs do not fit together, or None."""
        if self.number in FLOAT_GROUPS:
            bits, size = FLOAT_GROUPS[self.number]
            if (self.bits, self.group_size, self.symmetric, self.activations) != (bits, size, True, None):
                return f"number: {self.number} needs bits: {bits}, group_size: {size}, symmetric: true, no activations"
        elif self.number == "fp8":
            if self.bits != 8 or not self.symmetric or self.group_size not in ("row", "tensor", "block"):
                return "number: fp8 needs bits: 8, symmetric: true and group_size: row, tensor or block"
            if self.activations == "int8":
                return "number: fp8 needs activations: fp8, or none"
        elif self.group_size == "block":
            return "group_size: block needs number: fp8"
        elif self.activations == "int8" and not self.symmetric:
            return "activations: int8 needs symmetric: true"  # vLLM 0.26 ignores zero points beside int8 inputs
        elif self.activations == "fp8" and not self.mixed:
            return "activations: fp8 needs number: fp8, or bits: 4, symmetric: true and group_size: 128"
        return None

    @property
    def levels(self) -> int:
        """Largest code, `2**bits - 1`."""
        return (1 << self.bits) - 1

    @property
    def middle(self) -> int:
        """The zero point of a symmetric scheme, `2**(bits-1)`."""
        return 1 << (self.bits - 1)

    @property
    def mixed(self) -> bool:
        """4-bit integer weights with float8 inputs, the only mixed types that a vLLM kernel multiplies (on Hopper)."""
        integers = self.bits == 4 and self.symmetric and self.number == "int"
        return self.activations == "fp8" and integers and self.group_size == 128

    def columns_per_group(self, columns: int) -> int:
        """Number of columns that share a scale in a linear of `columns` inputs."""
        width = BLOCK if self.group_size == "block" else self.group_size
        return min(width, columns) if isinstance(width, int) else columns

    def groups(self, columns: int) -> int:
        """Number of scales per row, `ceil(in / group_size)`."""
        return -(-columns // self.columns_per_group(columns))

    def label(self) -> str:
        """Short name for tables: `W4 g128`, `W8 row A8`, `FP8 row`."""
        name = self.number.upper() if self.grid else f"W{self.bits}"
        group = f"g{self.group_size}" if isinstance(self.group_size, int) else self.group_size
        extra = "" if self.symmetric else " asym"
        acts = {None: "", "int8": " A8", "fp8": " A-FP8"}[self.activations]
        return f"{name} {group}{extra}{acts}"


@dataclass(frozen=True)
class QuantizedLinear:
    """Codes, scales and zero points of one linear.

    codes: uint8 `[out, in]`, values `0..2**bits-1` (for float grids: the bits of each number).
    scale: floating point, `[out, groups]`, in the dtype that the artifact stores ("tensor" and "block" schemes repeat
        values); f32 for nvfp4, mxfp4 and mxfp8.
    zero: uint8 `[out, groups]`; `2**(bits-1)` everywhere when symmetric; all 0 for float grids.
    factor: of nvfp4: the power of two that makes float8 numbers of the scales. 0 means that it follows from them.
        Linears that vLLM fuses need the same, so `split` sets it.
    """

    scheme: Scheme
    codes: Tensor
    scale: Tensor
    zero: Tensor
    factor: float = 0.0

    @property
    def scale_factor(self) -> float:
        """The power of two by which nvfp4 scales are multiplied before they are stored as float8 numbers."""
        return self.factor or common_factor(float(self.scale.max()))

    def dequantize(self, dtype: torch.dtype | None = None) -> Tensor:
        """`(codes - zero) * scale` in float32, `[out, in]`, then cast to `dtype`."""
        weight = dequantize(self.codes, self.scale, self.zero, self.scheme)
        return weight if dtype is None else weight.to(dtype)

    def as_served(self) -> Tensor:
        """The float32 weight `[out, in]` that vLLM multiplies by: `dequantize`, except for `mixed` schemes.

        For these, vLLM's kernel has no 16-bit scales: it rounds every scale to float8, relative to the largest of its
        row, and every product of scale and code too (`convert_bf16_scales_to_fp8`, Cutlass' `packed_scale_t`).
        """
        if not self.scheme.mixed:
            return self.dequantize()
        eighths, row = float8_scales(self.scale)
        signed = self.codes.float() - self.scheme.middle
        products = signed.mul_(expand_groups(eighths, self.codes.shape[1], self.scheme))  # at most 448
        return products.to(torch.float8_e4m3fn).float().mul_(8 * row)

    def split(self, rows: Sequence[int]) -> list[QuantizedLinear]:
        """Split a stacked linear into linears of `rows` output rows each."""
        parts = zip(
            self.codes.split(list(rows)), self.scale.split(list(rows)), self.zero.split(list(rows)), strict=True
        )
        factor = self.scale_factor if self.scheme.number == "nvfp4" else 0.0
        return [QuantizedLinear(self.scheme, *part, factor) for part in parts]

    def to(self, device: torch.device | str) -> QuantizedLinear:
        """The same linear on another device."""
        return replace(self, codes=self.codes.to(device), scale=self.scale.to(device), zero=self.zero.to(device))


def expand_groups(per_group: Tensor, columns: int, scheme: Scheme) -> Tensor:
    """Repeat a per-group tensor `[out, groups]` to its columns, `[out, in]`; the last group may be short."""
    return per_group.repeat_interleave(scheme.columns_per_group(columns), dim=1)[:, :columns]


def float8_scales(scale: Tensor) -> tuple[Tensor, Tensor]:
    """`scale` `[out, groups]` as vLLM rounds it for `mixed` schemes: eighths of a float8 number, and a factor per row.

    Returns float32 `[out, groups]` (float8 e4m3 values) and `[out, 1]`; a scale is about `8 * eighths * row`.
    """
    wide = scale.float()
    row = (wide.amax(dim=1, keepdim=True) / FP8_MAX).clamp_min(FP8_MIN_SCALE)
    rounded = (wide / row).clamp_max(FP8_MAX).to(torch.float8_e4m3fn).float()
    return (rounded / 8).to(torch.float8_e4m3fn).float(), row


def quantize(weight: Tensor, scale: Tensor, zero: Tensor, scheme: Scheme) -> Tensor:
    """Nearest codes (ties to even) of `weight` f32 `[out, in]` for `scale` and `zero` `[out, groups]`.

    Returns uint8 `[out, in]`. A zero scale (of an all-zero group) gives the zero point.
    """
    columns = weight.shape[1]
    steps = expand_groups(scale.float(), columns, scheme)
    empty = steps == 0
    ratio = (weight / steps).masked_fill_(empty, 0.0)
    del steps, empty  # each is as large as the weight
    if scheme.grid:
        return scheme.grid.encode(scheme.grid.round(ratio))
    return ratio.round_().add_(expand_groups(zero.float(), columns, scheme)).clamp_(0, scheme.levels).to(torch.uint8)


def dequantize(codes: Tensor, scale: Tensor, zero: Tensor, scheme: Scheme) -> Tensor:
    """The float32 weight `[out, in]` of `codes`."""
    columns = codes.shape[1]
    if scheme.grid:
        return scheme.grid.decode(codes) * expand_groups(scale.float(), columns, scheme)
    weight = codes.float().sub_(expand_groups(zero.float(), columns, scheme))
    return weight.mul_(expand_groups(scale.float(), columns, scheme))  # in place, to hold at most two matrices


@dataclass(frozen=True)
class ColumnGrid:
    """Scales and zero points of a linear's columns, in the order in which GPTQ quantizes them.

    scale, zero: `[out, groups]`, as in `QuantizedLinear`. group: int64 `[in]`, the group of each column.
    """

    scheme: Scheme
    scale: Tensor
    zero: Tensor
    group: Tensor

    def part(self, columns: slice) -> ColumnGrid:
        """The grid of these columns."""
        return ColumnGrid(self.scheme, self.scale, self.zero, self.group[columns])

    def expanded(self) -> tuple[Tensor, Tensor, Scheme]:
        """Scale and zero of every column, `[out, in]`, and the scheme with groups of 1, for `quantize`."""
        single = Scheme(self.scheme.bits, 1, self.scheme.symmetric, self.scheme.number)
        return self.scale.index_select(1, self.group), self.zero.index_select(1, self.group), single

    @property
    def steps(self) -> tuple[Tensor, Tensor, Tensor]:
        """Scale, zero and group: the arguments of a kernel."""
        return self.scale, self.zero, self.group

    @property
    def has_kernels(self) -> bool:
        """Whether Triton's kernels support it: on a CUDA device, with integers."""
        return self.scale.is_cuda and self.scheme.number == "int"
