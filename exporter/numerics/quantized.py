"""The quantized linear, independent of any file format: schemes, codes, scales, zero points, bit packing.

Shapes are `[out, in]`; `groups = ceil(in / group_size)`. A method computes the integers once; a format only rearranges
them. Scales are rounded to their stored dtype *before* codes are computed, so the reference `dequantize` uses exactly
the values that vLLM uses.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import gcd
from typing import TYPE_CHECKING, Literal

from exporter.lazy_torch import torch

if TYPE_CHECKING:
    from torch import Tensor


GroupSize = int | Literal["row", "tensor"]
Activations = Literal["int8", "fp8"]

FP8_MAX = 448.0
FP8_MIN_SCALE = 1 / (512 * FP8_MAX)  # vLLM's smallest scale of a dynamic float8 row


@dataclass(frozen=True)
class Scheme:
    """How one linear is quantized.

    bits: bits per code, 2 to 8.
    group_size: number of columns that share a scale; "row" is one scale per output row, "tensor" one for all.
    symmetric: the zero point is fixed at the middle code, `2**(bits-1)`.
    number: "int" (uniform integers) or "fp8" (float8 e4m3; 8 bits, symmetric, no zero point).
    activations: None (weight only), or the dynamic per-token quantization of the input at run time. int8 requires 8-bit
        integers; fp8 requires float8 weights or 4 bits (see `mixed`).
    """

    bits: int
    group_size: GroupSize
    symmetric: bool = True
    number: Literal["int", "fp8"] = "int"
    activations: Activations | None = None

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
        return min(self.group_size, columns) if isinstance(self.group_size, int) else columns

    def groups(self, columns: int) -> int:
        """Number of scales per row, `ceil(in / group_size)`."""
        return -(-columns // self.columns_per_group(columns))

    def label(self) -> str:
        """Short name for tables: `W4 g128`, `W8 row A8`, `FP8 row`."""
        name = "FP8" if self.number == "fp8" else f"W{self.bits}"
        group = f"g{self.group_size}" if isinstance(self.group_size, int) else self.group_size
        extra = "" if self.symmetric else " asym"
        acts = {None: "", "int8": " A8", "fp8": " A-FP8"}[self.activations]
        return f"{name} {group}{extra}{acts}"


@dataclass(frozen=True)
class QuantizedLinear:
    """Codes, scales and zero points of one linear.

    codes: uint8 `[out, in]`, values `0..2**bits-1` (for fp8: the byte of each float8 e4m3 value).
    scale: floating point, `[out, groups]`, in the dtype that the artifact stores ("tensor" schemes repeat one value).
    zero: uint8 `[out, groups]`; `2**(bits-1)` everywhere when symmetric; all 0 for fp8.
    """

    scheme: Scheme
    codes: Tensor
    scale: Tensor
    zero: Tensor

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
        return [QuantizedLinear(self.scheme, *part) for part in parts]

    def to(self, device: torch.device | str) -> QuantizedLinear:
        """The same linear on another device."""
        return QuantizedLinear(self.scheme, self.codes.to(device), self.scale.to(device), self.zero.to(device))


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
    if scheme.number == "fp8":
        return ratio.clamp_(-FP8_MAX, FP8_MAX).to(torch.float8_e4m3fn).view(torch.uint8)
    return ratio.round_().add_(expand_groups(zero.float(), columns, scheme)).clamp_(0, scheme.levels).to(torch.uint8)


def dequantize(codes: Tensor, scale: Tensor, zero: Tensor, scheme: Scheme) -> Tensor:
    """The float32 weight `[out, in]` of `codes`."""
    columns = codes.shape[1]
    if scheme.number == "fp8":
        return codes.view(torch.float8_e4m3fn).float() * expand_groups(scale.float(), columns, scheme)
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


def packed_words(count: int, bits: int) -> int:
    """Number of 32-bit words in a row of `pack_bits` with `count` codes."""
    return -(-count * bits // 32)


def pack_bits(codes: Tensor, bits: int) -> Tensor:
    """Pack codes uint8 `[rows, n]`, all below `2**bits`, into a dense little-endian bit stream along the last axis.

    Element i of a row occupies bits `i*bits .. i*bits+bits-1` of the stream, least significant first; 32 stream
    bits make one int32. Returns int32 `[rows, ceil(n*bits/32)]`, unused high bits zero.
    """
    rows, n = codes.shape
    period, octets, parts = _overlaps(bits)
    padded = -n % 32  # 32 codes fill `bits` whole words
    codes = torch.nn.functional.pad(codes, (0, padded)) if padded else codes
    stream = torch.zeros(rows, (n + padded) * bits // 8, dtype=torch.uint8, device=codes.device)
    for code, octet, shift in parts:
        stream[:, octet::octets] |= _shifted(codes[:, code::period], shift)
    return stream.view(torch.int32)[:, : packed_words(n, bits)].contiguous()


def unpack_bits(packed: Tensor, bits: int, n: int) -> Tensor:
    """Inverse of `pack_bits`: int32 `[rows, words]` to uint8 `[rows, n]`."""
    rows, words = packed.shape
    period, octets, parts = _overlaps(bits)
    padded = -words % bits
    packed = torch.nn.functional.pad(packed, (0, padded)) if padded else packed.contiguous()
    stream = packed.view(torch.uint8)  # [rows, whole multiple of 4*bits]
    codes = torch.zeros(rows, stream.shape[1] * 8 // bits, dtype=torch.uint8, device=packed.device)
    for code, octet, shift in parts:
        codes[:, code::period] |= _shifted(stream[:, octet::octets], -shift)
    return codes[:, :n].bitwise_and_((1 << bits) - 1).contiguous()


def _overlaps(bits: int) -> tuple[int, int, list[tuple[int, int, int]]]:
    """How codes overlap bytes: `period` codes fill exactly `octets` bytes, then the pattern repeats.

    Returns period, octets, and `(code, octet, left shift of the code)` for every pair that shares bits.
    """
    period, octets = 8 // gcd(8, bits), bits // gcd(8, bits)
    pairs = [(code, octet, code * bits - octet * 8) for code in range(period) for octet in range(octets)]
    return period, octets, [pair for pair in pairs if -bits < pair[2] < 8]


def _shifted(octets: Tensor, left: int) -> Tensor:
    """Bytes shifted left, or right when negative; bits outside of the byte are dropped."""
    return octets << left if left >= 0 else octets >> -left
