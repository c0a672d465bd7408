"""Quantization methods: pure functions of tensors, one file each.

To add one, write `methods/NAME.py` with what `Method` asks for and add a line to `METHODS`.
"""

from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor

from exporter.methods import awq, gptq, rtn
from exporter.quantized import QuantizedLinear, Scheme


class Method(Protocol):
    """A module that turns one weight into a `QuantizedLinear`."""

    Options: ClassVar[type]  # frozen pydantic model of the recipe's `options:`
    Statistics: ClassVar[type | None]  # `moments.Statistics`, or None: the method needs no calibration data
    VERSION: ClassVar[int]  # raised whenever results change; part of the job's fingerprint
    SMOOTHS: ClassVar[bool]  # whether `find_scales` moves scales between linears before they are quantized

    def quantize_linear(
        self, weight: Tensor, statistics: Any, scheme: Scheme, options: Any, scale_dtype: torch.dtype
    ) -> tuple[QuantizedLinear, tuple[str, ...]]:
        """Quantize `weight` f32 `[out, in]`; also returns notes the user should read (empty when all went well)."""


METHODS: dict[str, Any] = {"rtn": rtn, "gptq": gptq, "awq": awq}
