"""Variants of serving LLaVA-1.5-7B for `bench/serve.py`, by name."""

import argparse
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

TOKEN_FP8 = {"num_bits": 8, "type": "float", "symmetric": True, "strategy": "token", "dynamic": True}
FP8 = {"method": "rtn", "bits": 8, "group_size": "row", "number": "fp8", "activations": "fp8"}
INT8 = {"method": "rtn", "bits": 8, "group_size": "row", "activations": "int8"}
W4 = {"component": "language", "method": "gptq", "bits": 4, "group_size": 128}
VIT_FP8, VIT_INT8 = FP8 | {"component": "vision"}, INT8 | {"component": "vision"}
LANGUAGE_FP8 = FP8 | {"component": "language"}


@dataclass(frozen=True)
class Variant:
    """One variant. recipe: name of a built-in recipe; otherwise rules and kv_cache define one (no rules: 16 bits).

    change: functions that edit its quantization config. engine: arguments of vLLM.
    """

    rules: Sequence[Mapping[str, Any]] = ()
    change: tuple[Callable[[dict[str, Any]], None], ...] = ()
    engine: Mapping[str, Any] = field(default_factory=dict)
    environment: Mapping[str, str] = field(default_factory=dict)
    head_bits: int = 16
    kv_cache: str | None = None
    recipe: str = ""


def int8_activations(config: dict[str, Any]) -> None:
    """4-bit weights with int8 activations, which vLLM 0.26 treats as float8 on Hopper."""
    for group in config["config_groups"].values():
        if group["weights"]["num_bits"] == 4:
            group |= {"input_activations": TOKEN_FP8 | {"type": "int"}, "format": "pack-quantized"}


def head8(config: dict[str, Any]) -> None:
    """An 8-bit output head, weights only."""
    weights = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "group", "group_size": 128}
    group = {"targets": ["re:.*lm_head$"], "weights": weights | {"dynamic": False}, "format": "pack-quantized"}
    config["config_groups"]["group_head"] = group | {"input_activations": None, "output_activations": None}
    config["ignore"] = [name for name in config["ignore"] if not name.endswith("lm_head")]


VIT8 = {"component": "vision", "method": "rtn", "bits": 8, "group_size": "row"}
# FlashInfer reads a float8 cache with its XQA kernel; without a network, vLLM needs VLLM_HAS_FLASHINFER_CUBIN=1.
XQA = {"attention_backend": "FLASHINFER"}
MARLIN, HUMMING = {"linear_backend": "marlin"}, {"linear_backend": "humming"}
W4A8 = Variant([VIT_FP8, W4 | {"activations": "fp8"}])
FP8_CACHE8 = Variant([VIT_FP8, LANGUAGE_FP8], kv_cache="fp8")
VARIANTS = {
    "16 bits": Variant(),
    "w4-vit8": Variant([VIT8, W4]),
    "w4-vit8a8": Variant([VIT_INT8, W4]),
    "fp8": Variant([VIT_FP8, LANGUAGE_FP8]),
    "w4a8fp8": W4A8,
    "w4-cache8": Variant([VIT8, W4], kv_cache="fp8"),
    "fp8-cache8": FP8_CACHE8,
    "fp8-vit16-cache8": Variant(recipe="llava-fp8-vit16-cache8"),
    "w4a8fp8-cache8": Variant(recipe="llava-w4a8-vitfp8-cache8"),
    "w4-cache8-xqa": Variant([VIT8, W4], kv_cache="fp8", engine=XQA),
    "fp8-cache8-xqa": replace(FP8_CACHE8, engine=XQA),
    "fp8-vit16-cache8-xqa": Variant(recipe="llava-fp8-vit16-cache8", engine=XQA),
    "fp8-vit8a8-cache8-xqa": Variant([VIT_INT8, LANGUAGE_FP8], kv_cache="fp8", engine=XQA),
    "w4a8fp8-cache8-xqa": Variant(recipe="llava-w4a8-vitfp8-cache8", engine=XQA),
    "w4a8fp8-vit8a8-cache8-xqa": Variant([VIT_INT8, W4 | {"activations": "fp8"}], kv_cache="fp8", engine=XQA),
    "w4a8fp8-head8": replace(W4A8, change=(head8,), head_bits=8),
    "w4-head8": Variant([VIT_INT8, W4], (head8,), head_bits=8),
    "w4-marlin": Variant([VIT8, W4], engine=MARLIN),
    "w4-humming": Variant([VIT8, W4], engine=HUMMING),
    "w4-humming-cache8": Variant([VIT8, W4], kv_cache="fp8", engine=HUMMING),
    "w4-humming-cache8-xqa": Variant([VIT8, W4], kv_cache="fp8", engine=HUMMING | XQA),
    "w3": Variant([VIT8, W4 | {"bits": 3}]),
    "w8a8": Variant([VIT_INT8, INT8 | {"component": "language"}]),
    "w4a8int-cache8-xqa": Variant([VIT8, W4], (int8_activations,), kv_cache="fp8", engine=HUMMING | XQA),
}


@dataclass(frozen=True)
class ParallelVariant:
    """A variant on one or several GPUs. label: as on the command line, `VARIANT`, `VARIANT@tp2` or `VARIANT@dp2`."""

    label: str
    variant: str
    tensor_parallel: int = 1
    data_parallel: int = 1

    @classmethod
    def parse(cls, label: str) -> "ParallelVariant":
        """The variant of a label; ArgumentTypeError for an unknown one."""
        match = re.fullmatch(r"(.+?)(?:@(tp|dp)([2-9]))?", label)
        if not match or match[1] not in VARIANTS:
            raise argparse.ArgumentTypeError(f"unknown variant '{label}'; use {', '.join(VARIANTS)}, or NAME@tp2")
        kind, number = match[2], int(match[3] or 1)
        return cls(label, match[1], number if kind == "tp" else 1, number if kind == "dp" else 1)
