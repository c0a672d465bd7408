"""Number types of vLLM's key-value cache, and the rounding of those with one scale per token and head.

vLLM reads "fp8" from an artifact's config. The others are run-time choices of its Triton attention, which only the flag
`--kv-cache-dtype` can ask for; the scales follow from each token's keys and values. Read in vLLM 0.26 and 0.32
(`triton_reshape_and_cache_flash.py`). vLLM's `int4_per_token_head` is not offered: `mmq check` failed on an H200.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Literal

from exporter.lazy_torch import torch
from exporter.numerics.float_grids import FP8_MAX

if TYPE_CHECKING:
    from torch import Tensor

KVCache = Literal["fp8", "fp8_per_token_head", "int8_per_token_head"]

BY_FLAG: Mapping[str, int] = {  # caches that only a flag of vLLM can ask for -> bits
    "fp8_per_token_head": 8,
    "int8_per_token_head": 8,
}
LEAST_HEAD = 32  # smallest head of vLLM's Triton attention
LEAST_SCALE = 1e-6
INT8_MAX = 127.0


def rounded_per_head(x: Tensor, cache: str) -> Tensor:
    """Keys or values `x` `[..., head size]` as vLLM reads them from `cache`, a key of `BY_FLAG`, in their own dtype."""
    wide = x.float()
    largest = INT8_MAX if cache == "int8_per_token_head" else FP8_MAX
    scale = (wide.abs().amax(-1, keepdim=True) / largest).clamp_min(LEAST_SCALE)
    steps = wide / scale
    if cache == "int8_per_token_head":
        steps = _half_away(steps)
    else:
        steps = steps.clamp(-largest, largest).to(torch.float8_e4m3fn).float()
    return (steps * scale).to(x.dtype)


def _half_away(x: Tensor) -> Tensor:
    """`x` rounded to the nearest integer, halves away from zero."""
    return (x + 0.5 * x.sign()).trunc_()
