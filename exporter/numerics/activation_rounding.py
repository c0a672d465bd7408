"""What a serving engine rounds while it computes, done to a transformers model: inputs of linears, keys and values.

Inputs of linears whose scheme has 8-bit activations: dynamic, one scale a token. int8 rounds to 127 steps either side
of zero, fp8 to float8 e4m3 (vLLM's `scaled_int8_quant` and `scaled_fp8_quant` with per-token scales).

Keys and values of a float8 cache: to float8 e4m3 as they are, with a scale of 1. On a GPU flash attention multiplies
float8 by float8, so queries are rounded too (vLLM's `Attention.query_quant`); what it rounds inside its softmax is not
done here. vLLM's CPU build cuts instead of rounding to nearest, and leaves queries alone (measured with 0.32).
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from exporter.numerics.quantized import FP8, FP8_LEAST, FP8_MAX, Activations

INT8_MAX = 127.0


@dataclass(frozen=True)
class Rounded:
    """What an engine rounds. linears: live name -> kind of its inputs; kv_cache: "fp8", or None for 16 bits."""

    linears: Mapping[str, Activations] = field(default_factory=dict)
    kv_cache: str | None = None

    def described(self) -> dict[str, Any]:
        """Only what is rounded, as plain data."""
        inputs = {"activations": dict(self.linears)} if self.linears else {}
        return inputs | ({"kv_cache": self.kv_cache} if self.kv_cache else {})


EXACT = Rounded()


def round_as_served(model: nn.Module, rounded: Rounded, gpu: bool) -> None:
    """From now on `model` rounds what an engine on a GPU or on a CPU would."""
    round_inputs(model, rounded.linears)
    if rounded.kv_cache:
        round_cache(model, gpu)


def round_rows(x: Tensor, kind: Activations) -> Tensor:
    """`x` `[..., in]` as 8 bits hold it, one scale a row; in its own dtype. Rows of zeros stay zeros."""
    wide = x.float()
    largest = INT8_MAX if kind == "int8" else FP8_MAX
    scale = wide.abs().amax(dim=-1, keepdim=True) / largest
    scale = scale if kind == "int8" else scale.clamp_min(FP8_LEAST)
    steps = wide / torch.where(scale == 0, 1.0, scale)
    rounded = steps.round().clamp(-largest, largest) if kind == "int8" else steps.clamp(-largest, largest).to(FP8)
    return (rounded.float() * scale).to(x.dtype)


def round_inputs(model: nn.Module, linears: Mapping[str, Activations]) -> None:
    """From now on `model` rounds the input of each linear, given by its live name."""
    for name, kind in linears.items():

        def hook(module: nn.Module, args: tuple[Any, ...], kind: Activations = kind) -> tuple[Any, ...]:
            return (round_rows(args[0], kind), *args[1:])

        model.get_submodule(name).register_forward_pre_hook(hook)


def to_float8(x: Tensor) -> Tensor:
    """`x` as float8 e4m3 holds it, in its own dtype; what is beyond 448 becomes 448."""
    return x.clamp(-FP8_MAX, FP8_MAX).to(FP8).to(x.dtype)


def cut_to_float8(x: Tensor) -> Tensor:
    """The float8 e4m3 value next to `x` towards zero, in its own dtype: what vLLM 0.32's CPU build stores."""
    inside = x.clamp(-FP8_MAX, FP8_MAX)
    nearest = inside.to(FP8)
    beyond = nearest.float().abs() > inside.float().abs()
    return (nearest.view(torch.uint8) - beyond.to(torch.uint8)).view(FP8).to(x.dtype)


def round_cache(model: nn.Module, gpu: bool) -> None:
    """From now on every causal self-attention of `model` sees keys and values as a float8 cache holds them.

    They are rounded where attention reads them, behind any rotation, on every pass, whether or not a cache is used.
    """
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.integrations.sdpa_attention import sdpa_attention_forward
    from transformers.masking_utils import sdpa_mask

    name = f"mmq_float8_cache_{'gpu' if gpu else 'cpu'}"
    AttentionInterface.register(name, _rounded_attention(sdpa_attention_forward, gpu))
    AttentionMaskInterface.register(name, sdpa_mask)
    for module in model.modules():
        config: Any = getattr(module, "config", None)
        if config is not None and getattr(module, "is_causal", False):
            config._attn_implementation = name


def _rounded_attention(attention: Callable[..., Any], gpu: bool) -> Callable[..., Any]:
    hold = to_float8 if gpu else cut_to_float8

    def rounded(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> Any:
        return attention(module, to_float8(query) if gpu else query, hold(key), hold(value), *args, **kwargs)

    return rounded
