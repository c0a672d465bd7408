"""Number types of vLLM's key-value cache, and the rounding of those with one scale per token and head.

vLLM reads "fp8" from an artifact's config. The others are run-time choices of its Triton attention, which only the flag
`--kv-cache-dtype` can ask for; the scales follow from each token's keys and values. Read in vLLM 0.26 and 0.32
(`triton_reshape_and_cache_flash.py`, `int4_per_token_head.py`), which agree for heads that are powers of two.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Literal

from exporter.lazy_torch import torch
from exporter.numerics.float_grids import FP8_MAX

if TYPE_CHECKING:
    from torch import Tensor

KVCache = Literal["fp8", "fp8_per_token_head", "int8_per_token_head", "int4_per_token_head"]

BY_FLAG: Mapping[str, int] = {  # caches that only a flag of vLLM can ask for -> bits
    "fp8_per_token_head": 8,
    "int8_per_token_head": 8,
    "int4_per_token_head": 4,
}
LEAST_HEAD = 32  # smallest head of vLLM's Triton attention
LEAST_SCALE = 1e-6
SIGNS_SEED = 0x9E3779B9  # of the signs that vLLM draws for its Hadamard transform
INT8_MAX = 127.0
INT4_MAX = 15.0


def rounded_per_head(x: Tensor, cache: str) -> Tensor:
    """Keys or values `x` `[..., head size]` as vLLM reads them from `cache`, a key of `BY_FLAG`, in their own dtype."""
    wide = x.float()
    if cache == "int4_per_token_head":
        return _four_bits(wide).to(x.dtype)
    largest = INT8_MAX if cache == "int8_per_token_head" else FP8_MAX
    scale = (wide.abs().amax(-1, keepdim=True) / largest).clamp_min(LEAST_SCALE)
    steps = wide / scale
    if cache == "int8_per_token_head":
        steps = _half_away(steps)
    else:
        steps = steps.clamp(-largest, largest).to(torch.float8_e4m3fn).float()
    return (steps * scale).to(x.dtype)


def _four_bits(x: Tensor) -> Tensor:
    """`x` f32 `[..., head size]` rounded to 16 levels with a zero point, behind a Hadamard transform with random signs.

    The last four bits of a stored scale hold the zero point, so they are lost. The transform is undone here; vLLM
    transforms the queries instead.
    """
    signs = _signs(x.shape[-1]).to(x.device)
    turned = hadamard(x * signs)
    low, high = turned.amin(-1, keepdim=True), turned.amax(-1, keepdim=True)
    scale = ((high - low) / INT4_MAX).clamp_min(LEAST_SCALE)
    zero = _half_away(-low / scale).clamp(0, INT4_MAX)
    codes = _half_away(turned / scale + zero).clamp(0, INT4_MAX)
    stored = (scale.view(torch.int32) & ~15).view(torch.float32)
    return hadamard((codes - zero) * stored) * signs / x.shape[-1]


def hadamard(x: Tensor) -> Tensor:
    """The Hadamard matrix (entries 1 and -1) times the last axis of `x` `[..., n]`; n is a power of two."""
    size, half = x.shape[-1], 1
    while half < size:
        pairs = x.unflatten(-1, (-1, 2, half))
        first, second = pairs.unbind(-2)
        x = torch.stack([first + second, first - second], -2).flatten(-3)
        half *= 2
    return x


def _signs(size: int) -> Tensor:
    """vLLM's random signs for heads of this size, f32 `[size]`."""
    generator = torch.Generator().manual_seed(SIGNS_SEED)
    return 2 * torch.bernoulli(torch.full((size,), 0.5), generator=generator) - 1


def _half_away(x: Tensor) -> Tensor:
    """`x` rounded to the nearest integer, halves away from zero."""
    return (x + 0.5 * x.sign()).trunc_()
