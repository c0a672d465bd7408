"""Floating-point grids of weights: the numbers that a code of 4 or 8 bits can be, and how numbers are rounded to them.

float8 e4m3 has 1 sign bit, 4 bits of exponent and 3 of fraction, up to 448; float4 e2m1 has 0, 0.5, 1, 1.5, 2, 3, 4 and
6 with either sign. A code is the stored byte, or the stored half byte (sign in the top bit).

`nvfp4`, `mxfp4` and `mxfp8` differ in their scales: a float8 number for 16 weights with a common factor, or a power of
two for 32 weights (OCP Microscaling Formats 1.0; NVIDIA, *Introducing NVFP4*, 2025).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from exporter.lazy_torch import torch

if TYPE_CHECKING:
    from torch import Tensor

WeightNumber = Literal["int", "fp8", "nvfp4", "mxfp4", "mxfp8"]

FP8_MAX = 448.0
FP4_MAX = 6.0
FP4_VALUES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
SIGN = 8  # the bit of a float4 code that is its sign
LEAST_POWER = -100  # the smallest power of two that is used as a scale; far below any weight of 16 bits


@dataclass(frozen=True)
class FloatGrid:
    """A set of numbers. All functions are elementwise.

    largest: the largest number. fraction: bits of fraction. least: the smallest positive number. round: f32 numbers,
    rounded to the nearest of the set (ties to even), and clipped. encode: f32 numbers of the set to codes, uint8;
    decode: the inverse.
    """

    largest: float
    fraction: int
    least: float
    round: Callable[[Tensor], Tensor]
    encode: Callable[[Tensor], Tensor]
    decode: Callable[[Tensor], Tensor]

    @property
    def steps(self) -> float:
        """The range from the smallest to the largest number, in steps of the smallest size."""
        return 2 * self.largest / self.least

    @property
    def variance(self) -> float:
        """Variance of the error of a number from 1 to 2."""
        return 4.0**-self.fraction / 12


def round_float8(x: Tensor) -> Tensor:
    """Numbers f32 rounded to float8 e4m3, as f32."""
    return x.clamp(-FP8_MAX, FP8_MAX).to(torch.float8_e4m3fn).float()


def round_float4(x: Tensor) -> Tensor:
    """Numbers f32 rounded to float4 e2m1, as f32; negative numbers that become 0 become -0."""
    size = x.abs()
    step = torch.where(size < 2, 0.5, torch.where(size < 4, 1.0, 2.0))
    return (x / step).round_().mul_(step).clamp_(-FP4_MAX, FP4_MAX)


def encode_float8(values: Tensor) -> Tensor:
    """The bytes of float8 numbers."""
    return values.to(torch.float8_e4m3fn).view(torch.uint8)


def decode_float8(codes: Tensor) -> Tensor:
    """The numbers f32 of bytes."""
    return codes.view(torch.float8_e4m3fn).float()


def encode_float4(values: Tensor) -> Tensor:
    """The half bytes of float4 numbers: the place in `FP4_VALUES`, and the sign."""
    places = torch.bucketize(values.abs(), torch.tensor(FP4_VALUES, device=values.device))
    return (places + SIGN * torch.signbit(values)).to(torch.uint8)


def decode_float4(codes: Tensor) -> Tensor:
    """The numbers f32 of half bytes."""
    table = torch.tensor([*FP4_VALUES, *(-value for value in FP4_VALUES)], device=codes.device)
    return table[codes.int()]


FLOAT8 = FloatGrid(FP8_MAX, 3, 2.0**-9, round_float8, encode_float8, decode_float8)
FLOAT4 = FloatGrid(FP4_MAX, 1, 0.5, round_float4, encode_float4, decode_float4)
GRIDS: Mapping[str, FloatGrid] = {"fp8": FLOAT8, "nvfp4": FLOAT4, "mxfp4": FLOAT4, "mxfp8": FLOAT8}


def power_of_two(scale: Tensor) -> Tensor:
    """The smallest powers of two that are at least `scale`, f32."""
    fraction, exponent = torch.frexp(scale.float().clamp_min(2.0**LEAST_POWER))
    exponent = torch.where(fraction > 0.5, exponent, exponent - 1)
    return torch.ldexp(torch.ones_like(fraction), exponent)


def four_digits(scale: Tensor) -> Tensor:
    """`scale` rounded to 4 binary digits, f32: a float8 number times some power of two."""
    fraction, exponent = torch.frexp(scale.float().clamp_min(2.0**LEAST_POWER))
    return torch.ldexp((fraction * 16).round_().div_(16), exponent)


def float8_multiples(scale: Tensor, factor: float) -> Tensor:
    """`scale` `[out, groups]` rounded to float8 numbers divided by `factor`, f32, at least the smallest normal one."""
    return (scale.float() * factor).clamp(2.0**-6, FP8_MAX).to(torch.float8_e4m3fn).float() / factor


def common_factor(largest: float) -> float:
    """The power of two with which the scale `largest` becomes a float8 number above 224, at most 448.

    Products of it and float8 numbers are exact, so the scales of several linears can share it.
    """
    if largest <= 0:
        return 1.0
    exponent = torch.frexp(torch.tensor(FP8_MAX / largest, dtype=torch.float64))[1]
    return float(2.0 ** min(int(exponent) - 1, -LEAST_POWER))
