"""The Qwen3-VL family, dense models: features of three blocks of the tower enter the text model too.

Checkpoint names are those of `Qwen/Qwen3-VL-4B-Instruct`; vLLM: models/qwen3_vl.py. The mergers of these features
(DeepStack) each read the output of a block of the tower, and the text model adds theirs between its first blocks.
"""

from exporter.model.families.component import Component, Config, stack
from exporter.model.families.parts.part import Smoothing, size_of
from exporter.model.families.parts.qwen_vision import QWEN3
from exporter.model.families.parts.text import QWEN3_VL
from exporter.model.families.qwen_shared import TINY, Qwen, tiny_processor

_LINEARS = ("linear_fc1", "linear_fc2")
_PARTS = {
    "vision_config": dict.fromkeys(("qwen3_vl_vision", "qwen3_vl"), QWEN3),
    "text_config": dict.fromkeys(("qwen3_vl_text", "qwen3_vl"), QWEN3_VL),
}
_THREE = Qwen(
    _PARTS, "model.visual", "model.language_model", "out_hidden_size", "hidden_size", _LINEARS, "norm", text_ties=False
)


def taps(config: Config) -> int:
    """Number of blocks of the tower whose features enter the text model."""
    return len(size_of(_PARTS, config, "vision_config", "deepstack_visual_indexes"))


def assemble(config: Config) -> tuple[Component, ...]:
    """The components for a config.json."""
    vision, projector, *others = _THREE.components(config)
    deepstack = stack(
        "deepstack",
        _PARTS,
        "vision_config",
        "model.visual",
        config,
        blocks="model.visual.deepstack_merger_list.{i}",
        used=taps,
        stored=taps,
        phases=tuple((name,) for name in _LINEARS),
        roles=dict.fromkeys(_LINEARS, "mlp"),
        smoothings=(Smoothing("norm", _LINEARS[:1]),),
        row_parallel=_LINEARS[1:],
        target=r"(?:model\.)?visual\.deepstack_merger_list\.{i}",
        tokens=_THREE.image_tokens,
        chained=False,
    )
    return vision, deepstack, projector, *others


FAMILY = _THREE.family(
    name="qwen3-vl",
    models="Qwen3-VL, dense models",
    architectures=("Qwen3VLForConditionalGeneration",),
    config_class="Qwen3VLConfig",
    assemble=assemble,
    tiny=TINY | {"model_type": "qwen3_vl"},
    tiny_processor=tiny_processor("Qwen3VLProcessor"),
)
