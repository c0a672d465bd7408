"""Applies vLLM's rounding of activations to a transformers model: inputs of linears, and keys and values of the cache.

Inputs of linears whose scheme has 8-bit activations: dynamic, one scale per token. Where tensor parallelism divides a
linear along its inputs, every GPU rounds its part of a token with a scale of its own. int8 rounds to 127 steps on both
sides of zero, fp8 to float8 e4m3 (vLLM's `scaled_int8_quant` and `scaled_fp8_quant` with per-token scales); fp8-groups
has one scale for 128 inputs of a token (`per_token_group_quant_fp8`).

Keys and values of a float8 cache: to float8 e4m3 with a scale of 1. On a GPU, flash attention multiplies float8 by
float8, so queries are rounded too (vLLM's `Attention.query_quant`); rounding inside its softmax is not reproduced here.
vLLM's CPU build truncates instead of rounding to nearest, and does not round queries (measured with 0.32). Caches with
one scale per token and head: see `kv_caches`; queries stay as they are.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from exporter.numerics.float_grids import FP8_MAX
from exporter.numerics.kv_caches import BY_FLAG, rounded_per_head
from exporter.numerics.quantized import BLOCK, FP8_MIN_SCALE, InputRounding

FP8 = torch.float8_e4m3fn
INT8_MAX = 127.0


@dataclass(frozen=True)
class ServedRounding:
    """The activations that vLLM rounds. linears: live name -> number type. kv_cache: None for 16 bits.

    parts: live name -> number of GPUs among which the inputs of a linear are divided; 1 for other linears.
    """

    linears: Mapping[str, InputRounding] = field(default_factory=dict)
    kv_cache: str | None = None
    parts: Mapping[str, int] = field(default_factory=dict)

    def described(self) -> dict[str, Any]:
        """JSON-compatible data with only the rounded activations."""
        inputs = {"activations": dict(self.linears)} if self.linears else {}
        return inputs | ({"kv_cache": self.kv_cache} if self.kv_cache else {})


EXACT = ServedRounding()


def round_as_served(model: nn.Module, rounded: ServedRounding, gpu: bool) -> None:
    """Add vLLM's rounding, on a GPU or on a CPU, to all later forward passes of `model`."""
    round_inputs(model, rounded)
    if rounded.kv_cache:
        round_cache(model, rounded.kv_cache, gpu)


def round_rows(x: Tensor, kind: InputRounding) -> Tensor:
    """`x` `[..., in]` rounded to 8 bits with one scale per row, in its own dtype. Rows of zeros stay zeros.

    fp8-groups: one scale for 128 numbers of a row.
    """
    if kind == "fp8-groups":
        return round_rows(x.unflatten(-1, (-1, BLOCK)), "fp8").flatten(-2)
    wide = x.float()
    largest = INT8_MAX if kind == "int8" else FP8_MAX
    scale = wide.abs().amax(dim=-1, keepdim=True) / largest
    scale = scale if kind == "int8" else scale.clamp_min(FP8_MIN_SCALE)
    steps = wide / torch.where(scale == 0, 1.0, scale)
    rounded = steps.round().clamp(-largest, largest) if kind == "int8" else steps.clamp(-largest, largest).to(FP8)
    return (rounded.float() * scale).to(x.dtype)


def round_inputs(model: nn.Module, rounded: ServedRounding) -> None:
    """Round the inputs of `rounded.linears` in all later forward passes of `model`."""
    for name, kind in rounded.linears.items():
        model.get_submodule(name).register_forward_pre_hook(partial(_rounded_input, kind, rounded.parts.get(name, 1)))


def _rounded_input(kind: InputRounding, parts: int, module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
    return (round_rows(args[0].unflatten(-1, (parts, -1)), kind).flatten(-2), *args[1:])


def to_float8(x: Tensor) -> Tensor:
    """`x` rounded to float8 e4m3, in its own dtype; values beyond 448 become 448."""
    return x.clamp(-FP8_MAX, FP8_MAX).to(FP8).to(x.dtype)


def truncate_to_float8(x: Tensor) -> Tensor:
    """`x` truncated to float8 e4m3 (towards zero), in its own dtype, as vLLM 0.32's CPU build does."""
    inside = x.clamp(-FP8_MAX, FP8_MAX)
    nearest = inside.to(FP8)
    too_large = nearest.float().abs() > inside.float().abs()
    return (nearest.view(torch.uint8) - too_large.to(torch.uint8)).view(FP8).to(x.dtype)


def round_cache(model: nn.Module, cache: str, gpu: bool) -> None:
    """Round keys and values like `cache` of vLLM, in all causal self-attentions and later forward passes of `model`.

    They are rounded where attention reads them, after rotary embedding, in every pass, with or without a cache.
    """
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.integrations.sdpa_attention import sdpa_attention_forward
    from transformers.masking_utils import sdpa_mask

    name = f"mmq_cache_{cache}_{'gpu' if gpu else 'cpu'}"
    AttentionInterface.register(name, _rounded_attention(sdpa_attention_forward, cache, gpu))
    AttentionMaskInterface.register(name, sdpa_mask)
    for module in model.modules():
        config: Any = getattr(module, "config", None)
        if config is not None and getattr(module, "is_causal", False):
            config._attn_implementation = name


def _rounded_attention(attention: Callable[..., Any], cache: str, gpu: bool) -> Callable[..., Any]:
    rounds_queries, store = gpu and cache not in BY_FLAG, to_float8 if gpu else truncate_to_float8

    def rounded(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> Any:
        kept = [rounded_per_head(x, cache) if cache in BY_FLAG else store(x) for x in (key, value)]
        return attention(module, to_float8(query) if rounds_queries else query, *kept, *args, **kwargs)

    return rounded
