"""The Qwen2-VL (arXiv 2409.12191) and Qwen2.5-VL (arXiv 2502.13923) families.

Checkpoint names are those of `Qwen/Qwen2-VL-2B-Instruct` and `Qwen/Qwen2.5-VL-3B-Instruct`, whose config.json has the
text model's keys at the top level. vLLM: models/qwen2_vl.py, qwen2_5_vl.py.
"""

from exporter.model.families.parts.qwen_vision import QWEN2, QWEN25
from exporter.model.families.parts.text import QWEN2_VL
from exporter.model.families.qwen_shared import TINY, Qwen, tiny_processor

_TEXTS = dict.fromkeys(("qwen2_5_vl_text", "qwen2_vl_text", "qwen2_5_vl", "qwen2_vl"), QWEN2_VL)
_PARTS_2 = {"vision_config": dict.fromkeys(("qwen2_vl_vision", "qwen2_vl"), QWEN2), "text_config": _TEXTS}
_PARTS_25 = {"vision_config": dict.fromkeys(("qwen2_5_vl_vision", "qwen2_5_vl"), QWEN25), "text_config": _TEXTS}
_TWO = Qwen(_PARTS_2, "visual", "model", "hidden_size", "embed_dim", ("mlp.0", "mlp.2"), "ln_q")
_TWO_FIVE = Qwen(_PARTS_25, "visual", "model", "out_hidden_size", "hidden_size", ("mlp.0", "mlp.2"), "ln_q")

FAMILY = _TWO_FIVE.family(
    name="qwen2.5-vl",
    models="Qwen2.5-VL",
    architectures=("Qwen2_5_VLForConditionalGeneration",),
    config_class="Qwen2_5_VLConfig",
    flat=("text_config",),
    tiny=TINY | {"model_type": "qwen2_5_vl"},
    tiny_processor=tiny_processor("Qwen2_5_VLProcessor"),
)
QWEN2_FAMILY = _TWO.family(
    name="qwen2-vl",
    models="Qwen2-VL",
    architectures=("Qwen2VLForConditionalGeneration",),
    config_class="Qwen2VLConfig",
    flat=("text_config",),
    tiny=TINY | {"model_type": "qwen2_vl"},
    tiny_processor=tiny_processor("Qwen2VLProcessor"),
)
