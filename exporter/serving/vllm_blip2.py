"""vLLM plugin (`vllm.general_plugins`) that loads packed Q-Former and projection linears of BLIP-2.

vLLM builds both from plain `torch.nn.Linear` and its ViT without a name prefix (`models/blip2.py`, 0.26 to 0.33), so a
quantization config cannot match their linears. The class below derives from vLLM's class and replaces the linears that
the config names. The plugin is active only when MMQ_VLLM_PLUGIN is 1; `mmq serve` and `mmq check` set it for artifacts
that need it. This file imports nothing from mmq, because vLLM's environment may not have mmq installed.
"""

import os
from functools import partial
from typing import Any

ARCHITECTURE = "Blip2ForConditionalGeneration"
SWITCH = "MMQ_VLLM_PLUGIN"
OLDEST, NEWEST = (0, 26), (0, 33)


def register() -> None:
    """Register the model class; vLLM calls this in each process. RuntimeError for an unsupported version of vLLM."""
    if os.environ.get(SWITCH) != "1":
        return
    import vllm
    from vllm import ModelRegistry

    refuse(vllm.__version__)
    ModelRegistry.register_model(ARCHITECTURE, f"{__name__}:PackedBlip2")


def refuse(version: str) -> None:
    """RuntimeError unless the plugin supports this version of vLLM."""
    release = tuple(int(part) for part in version.split("+")[0].split(".")[:2] if part.isdigit())
    if not OLDEST <= release <= NEWEST:
        supported = " to ".join(f"{major}.{minor}" for major, minor in (OLDEST, NEWEST))
        raise RuntimeError(
            f"mmq's BLIP-2 plugin supports vLLM {supported}, this is {version}: it cannot serve an artifact with a "
            "packed Q-Former or projection. Export with `store: dequantized` for those components"
        )


def __getattr__(name: str) -> Any:
    """Create the model class when vLLM loads it, so that the import of this file does not import vLLM."""
    if name != "PackedBlip2":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = model = _make()
    return model


def _make() -> Any:
    from vllm.model_executor.models import blip2

    missing = [part for part in ("BlipVisionModel", ARCHITECTURE) if not hasattr(blip2, part)]
    if missing:
        raise RuntimeError(f"mmq's BLIP-2 plugin: vLLM's blip2.py has no {' and no '.join(missing)}")

    class PackedBlip2(getattr(blip2, ARCHITECTURE)):  # type: ignore[misc]
        """vLLM's BLIP-2 with quantized linears wherever the quantization config names them."""

        def __init__(self, *, vllm_config: Any, prefix: str = "") -> None:
            original = blip2.BlipVisionModel
            blip2.BlipVisionModel = partial(original, prefix="vision_model")
            try:
                super().__init__(vllm_config=vllm_config, prefix=prefix)
            finally:
                blip2.BlipVisionModel = original
            if vllm_config.quant_config is not None:
                for part in ("qformer", "language_projection"):
                    replace_linears(self, part, vllm_config.quant_config)

    PackedBlip2.__module__ = __name__
    return PackedBlip2


def replace_linears(model: Any, part: str, quant_config: Any) -> list[str]:
    """Replace the plain linears below `part` that the config quantizes by vLLM's linears; return their names."""
    from torch import nn
    from vllm.model_executor.layers.linear import ReplicatedLinear, UnquantizedLinearMethod

    replaced = []
    for name, plain in list(model.named_modules()):
        if type(plain) is not nn.Linear or not f"{name}.".startswith(f"{part}."):
            continue
        linear = ReplicatedLinear(
            plain.in_features,
            plain.out_features,
            bias=plain.bias is not None,
            quant_config=quant_config,
            prefix=name,
            return_bias=False,
        )
        if not isinstance(linear.quant_method, UnquantizedLinearMethod):
            model.set_submodule(name, linear)
            replaced.append(name)
    return replaced
