"""What a serving engine does to the inputs of linears whose scheme has 8-bit activations, in a transformers model.

Dynamic, one scale a token: int8 rounds to 127 steps either side of zero, fp8 to float8 e4m3 (vLLM's
`scaled_int8_quant` and `scaled_fp8_quant` with per-token scales).
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from exporter.quantized import FP8, FP8_MAX, Activations

INT8_MAX = 127.0


def round_rows(x: Tensor, kind: Activations) -> Tensor:
    """`x` `[..., in]` as 8 bits hold it, one scale a row; in its own dtype. Rows of zeros stay zeros."""
    wide = x.float()
    largest = INT8_MAX if kind == "int8" else FP8_MAX
    scale = wide.abs().amax(dim=-1, keepdim=True) / largest
    steps = wide / torch.where(scale == 0, 1.0, scale)
    rounded = steps.round().clamp(-largest, largest) if kind == "int8" else steps.clamp(-largest, largest).to(FP8)
    return (rounded.float() * scale).to(x.dtype)


def round_inputs(model: nn.Module, linears: Mapping[str, Activations]) -> None:
    """From now on `model` rounds the input of each linear, given by its live name."""
    for name, kind in linears.items():

        def hook(module: nn.Module, args: tuple[Any, ...], kind: Activations = kind) -> tuple[Any, ...]:
            return (round_rows(args[0], kind), *args[1:])

        model.get_submodule(name).register_forward_pre_hook(hook)
