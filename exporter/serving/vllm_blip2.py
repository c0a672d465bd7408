"""A plugin of vLLM (`vllm.general_plugins`): BLIP-2's Q-Former and projection load packed, its ViT has its prefix.

vLLM builds both of plain `torch.nn.Linear` and its ViT without a name (`models/blip2.py`, 0.26 to 0.33), so nothing of
theirs can be found in a quantization config. The class below is vLLM's own with those linears replaced wherever the
config names them. Opt-in: nothing happens unless MMQ_VLLM_PLUGIN is 1, which `mmq serve` and `mmq check` set for
artifacts that need it. This file stands alone: they hand it to vLLM's environment, where mmq need not be installed.
"""

import os
from functools import partial
from typing import Any

ARCHITECTURE = "Blip2ForConditionalGeneration"
SWITCH = "MMQ_VLLM_PLUGIN"
OLDEST, NEWEST = (0, 26), (0, 33)


def register() -> None:
    """What vLLM calls in each of its processes. RuntimeError for a vLLM that this was not written for."""
    if os.environ.get(SWITCH) != "1":
        return
    import vllm
    from vllm import ModelRegistry

    refuse(vllm.__version__)
    ModelRegistry.register_model(ARCHITECTURE, f"{__name__}:PackedBlip2")


def refuse(version: str) -> None:
    """RuntimeError unless the plugin is made for this version of vLLM."""
    release = tuple(int(part) for part in version.split("+")[0].split(".")[:2] if part.isdigit())
    if not OLDEST <= release <= NEWEST:
        supported = " to ".join(f"{major}.{minor}" for major, minor in (OLDEST, NEWEST))
        raise RuntimeError(
            f"mmq's BLIP-2 plugin is for vLLM {supported}, and this is {version}: an artifact whose Q-Former or "
            "projection is packed is not served by it. Export with `store: dequantized` for those components"
        )


def __getattr__(name: str) -> Any:
    """The model class, made when vLLM loads it: importing this file imports nothing."""
    if name != "PackedBlip2":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = made = _make()
    return made


def _make() -> Any:
    from vllm.model_executor.models import blip2

    missing = [part for part in ("BlipVisionModel", ARCHITECTURE) if not hasattr(blip2, part)]
    if missing:
        raise RuntimeError(f"mmq's BLIP-2 plugin: vLLM's blip2.py has no {' and no '.join(missing)}")

    class PackedBlip2(getattr(blip2, ARCHITECTURE)):  # type: ignore[misc]
        """vLLM's BLIP-2 with every linear that the quantization config names."""

        def __init__(self, *, vllm_config: Any, prefix: str = "") -> None:
            nameless = blip2.BlipVisionModel
            blip2.BlipVisionModel = partial(nameless, prefix="vision_model")
            try:
                super().__init__(vllm_config=vllm_config, prefix=prefix)
            finally:
                blip2.BlipVisionModel = nameless
            if vllm_config.quant_config is not None:
                for part in ("qformer", "language_projection"):
                    replace_linears(self, part, vllm_config.quant_config)

    PackedBlip2.__module__ = __name__
    return PackedBlip2


def replace_linears(model: Any, part: str, quant_config: Any) -> list[str]:
    """Put vLLM's linears in place of the plain ones below `part` that the config quantizes; their names."""
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
