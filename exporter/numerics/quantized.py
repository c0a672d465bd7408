"""The one numeric type: what a quantized linear is, before any file format.

Shapes are `[out, in]`; `groups = ceil(in / group_size)`. Integers are computed once, by a method; a format
only translates them. Scales are rounded to the dtype they are stored in *before* codes are computed, so the
reference `dequantize` sees exactly what a runtime sees.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import gcd
from typing import Literal

import torch
from torch import Tensor

GroupSize = int | Literal["row", "tensor"]
Activations = Literal["int8", "fp8"]

FP8 = torch.float8_e4m3fn
FP8_MAX = 448.0
FP8_LEAST = 1 / (512 * FP8_MAX)  # vLLM's least scale of a dynamic float8 row


@dataclass(frozen=True)
class Scheme:
    """How one linear is stored.

    bits: 2 to 8, bits of one code.
    group_size: columns that share a scale; "row" is one scale an output row, "tensor" one for all.
    symmetric: the zero point is fixed at the middle code, `2**(bits-1)`.
    number: "int" (uniform integers) or "fp8" (float8 e4m3; 8 bits, symmetric, no zero point).
    activations: None (weight only), or the dynamic per-token quantization the runtime applies to the input.
        int8 goes with 8-bit integers, fp8 with float8 weights or with 4 bits (see `mixed`).
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
        """4-bit integers that meet float8 inputs: the one pair of unlike types that a kernel multiplies (Hopper's)."""
        integers = self.bits == 4 and self.symmetric and self.number == "int"
        return self.activations == "fp8" and integers and self.group_size == 128

    def columns_per_group(self, columns: int) -> int:
        """Columns sharing one scale in a linear of `columns` inputs."""
        return min(self.group_size, columns) if isinstance(self.group_size, int) else columns

    def groups(self, columns: int) -> int:
        """Number of scales along one row, `ceil(in / group_size)`."""
        return -(-columns // self.columns_per_group(columns))

    def label(self) -> str:
        """Short name used in tables: `W4 g128`, `W8 row A8`, `FP8 row`."""
        name = "FP8" if self.number == "fp8" else f"W{self.bits}"
        group = f"g{self.group_size}" if isinstance(self.group_size, int) else self.group_size
        extra = "" if self.symmetric else " asym"
        acts = {None: "", "int8": " A8", "fp8": " A-FP8"}[self.activations]
        return f"{name} {group}{extra}{acts}"


@dataclass(frozen=True)
class QuantizedLinear:
    """Codes, scales and zero points of one linear.

    codes: uint8 `[out, in]`, values `0..2**bits-1` (for fp8: the byte of each float8 e4m3 value).
    scale: floating, `[out, groups]`, in the dtype the artifact stores ("tensor" schemes repeat one value).
    zero: uint8 `[out, groups]`; `2**(bits-1)` everywhere when symmetric; all 0 for fp8.
    """

    scheme: Scheme
    codes: Tensor
    scale: Tensor
    zero: Tensor

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """`(codes - zero) * scale` in float32, `[out, in]`, then cast to `dtype`."""
        return dequantize(self.codes, self.scale, self.zero, self.scheme).to(dtype)

    def as_served(self) -> Tensor:
        """The float32 weight `[out, in]` that an engine multiplies by; `dequantize` but for `mixed` schemes.

        vLLM's kernel for these has no 16-bit scales: it makes a float8 number of every scale, relative to the largest
        of its row, and another of every product of scale and code (`convert_bf16_scales_to_fp8`, Cutlass'
        `packed_scale_t`).
        """
        if not self.scheme.mixed:
            return self.dequantize()
        eighths, row = float8_scales(self.scale)
        signed = self.codes.float() - self.scheme.middle
        products = signed.mul_(spread(eighths, self.codes.shape[1], self.scheme)).to(FP8)  # at most 8 eighths of 448
        return products.float().mul_(8 * row)

    def split(self, rows: Sequence[int]) -> list["QuantizedLinear"]:
        """The linears of `rows` output rows each that this one is made of."""
        parts = zip(
            self.codes.split(list(rows)), self.scale.split(list(rows)), self.zero.split(list(rows)), strict=True
        )
        return [QuantizedLinear(self.scheme, *part) for part in parts]

    def to(self, device: torch.device | str) -> "QuantizedLinear":
        """The same linear on another device."""
        return QuantizedLinear(self.scheme, self.codes.to(device), self.scale.to(device), self.zero.to(device))


def spread(per_group: Tensor, columns: int, scheme: Scheme) -> Tensor:
    """Repeat a per-group tensor `[out, groups]` to its columns, `[out, in]`; the last group may be short."""
    return per_group.repeat_interleave(scheme.columns_per_group(columns), dim=1)[:, :columns]


def float8_scales(scale: Tensor) -> tuple[Tensor, Tensor]:
    """`scale` `[out, groups]` as `mixed` schemes are served: eighths of a float8 number, and a factor for each row.

    Returns float32 `[out, groups]` (values of float8 e4m3) and `[out, 1]`; a scale is about `8 * eighths * row`.
    """
    wide = scale.float()
    row = (wide.amax(dim=1, keepdim=True) / FP8_MAX).clamp_min(FP8_LEAST)
    whole = (wide / row).clamp_max(FP8_MAX).to(FP8).float()
    return (whole / 8).to(FP8).float(), row


def quantize(weight: Tensor, scale: Tensor, zero: Tensor, scheme: Scheme) -> Tensor:
    """Nearest codes (ties to even) of `weight` f32 `[out, in]` under `scale`, `zero` `[out, groups]`.

    Returns uint8 `[out, in]`. A zero scale (an all-zero group) gives the zero point.
    """
    columns = weight.shape[1]
    steps = spread(scale.float(), columns, scheme)
    nothing = steps == 0
    ratio = (weight / steps).masked_fill_(nothing, 0.0)
    del steps, nothing  # a matrix each
    if scheme.number == "fp8":
        return ratio.clamp_(-FP8_MAX, FP8_MAX).to(FP8).view(torch.uint8)
    return ratio.round_().add_(spread(zero.float(), columns, scheme)).clamp_(0, scheme.levels).to(torch.uint8)


def dequantize(codes: Tensor, scale: Tensor, zero: Tensor, scheme: Scheme) -> Tensor:
    """The float32 weight `[out, in]` that `codes` stand for."""
    columns = codes.shape[1]
    if scheme.number == "fp8":
        return codes.view(FP8).float() * spread(scale.float(), columns, scheme)
    weight = codes.float().sub_(spread(zero.float(), columns, scheme))
    return weight.mul_(spread(scale.float(), columns, scheme))  # in place: never more than two matrices at once


@dataclass(frozen=True)
class ColumnGrid:
    """What the columns of a linear are rounded to, in the order in which they are walked.

    scale, zero: `[out, groups]`, as in `QuantizedLinear`. group: int64 `[in]`, of each column.
    """

    scheme: Scheme
    scale: Tensor
    zero: Tensor
    group: Tensor

    def part(self, here: slice) -> "ColumnGrid":
        """The grid of some columns."""
        return ColumnGrid(self.scheme, self.scale, self.zero, self.group[here])

    def spread(self) -> tuple[Tensor, Tensor, Scheme]:
        """Scale and zero of every column, `[out, in]`, and the scheme with one a column: as `quantize` takes them."""
        single = Scheme(self.scheme.bits, 1, self.scheme.symmetric, self.scheme.number)
        return self.scale.index_select(1, self.group), self.zero.index_select(1, self.group), single

    @property
    def steps(self) -> tuple[Tensor, Tensor, Tensor]:
        """Scale, zero and group: what a kernel is told."""
        return self.scale, self.zero, self.group

    @property
    def has_kernels(self) -> bool:
        """Whether Triton's kernels can round to it."""
        return self.scale.is_cuda and self.scheme.number == "int"


def packed_words(count: int, bits: int) -> int:
    """Words of 32 bits in one row of what `pack_bits` makes of `count` codes."""
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
    """How codes lie across bytes: `period` codes fill `octets` bytes exactly, and then the pattern repeats.

    Returns period, octets and every `(code, octet, left shift of the code)` of the pair that shares bits.
    """
    period, octets = 8 // gcd(8, bits), bits // gcd(8, bits)
    pairs = [(code, octet, code * bits - octet * 8) for code in range(period) for octet in range(octets)]
    return period, octets, [pair for pair in pairs if -bits < pair[2] < 8]


def _shifted(octets: Tensor, left: int) -> Tensor:
    """Bytes shifted left, or right when negative; bits that leave the byte are lost."""
    return octets << left if left >= 0 else octets >> -left
