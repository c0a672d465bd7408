"""Checks that mmq supports a checkpoint: its config.json is valid, its model is known, its tensors match the config.

Uses only config.json and the headers, before a plan is made.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from exporter.errors import PlanError
from exporter.files.strict_json import kind
from exporter.model.adapter import SETTINGS as ADAPTER
from exporter.model.checkpoint import Checkpoint
from exporter.model.families import FAMILIES, Family

MAX_LISTED = 5  # problems of one kind that an error lists
# Buffers that older versions of transformers stored and newer versions compute from the config and ignore.
STORED_BUFFERS = re.compile(r"(^|\.)(position_ids|rotary_emb\.inv_freq)$")
# Known architectures that mmq does not support, with the reason.
REFUSED = {
    "InstructBlipForConditionalGeneration": "vLLM has no InstructBLIP, and its processor needs a second tokenizer",
    "MllamaForConditionalGeneration": "vLLM no longer has Llama 3.2 Vision",
    "Qwen3VLMoeForConditionalGeneration": "its experts are three-dimensional parameters, not linears",
    "VipLlavaForConditionalGeneration": "vLLM has no VipLLaVA",
}
QUANTIZED = ("quantization_config", "compression_config")
SUPPORTED = "mmq supports " + "; ".join(
    f"{family.name}: {', '.join(family.architectures)}" for family in FAMILIES.values()
)


def known_family(config: Mapping[str, Any], where: str) -> Family:
    """The family of a model, with the components of its parts.

    PlanError when mmq does not support it, or when config.json has invalid values. where: the file, for messages.
    """
    family = _family_of(config, where)
    refusal = family.refuses(config)  # before the fields: those of a refused model may have other names
    problems = [refusal] if refusal else family.read(config)[1]
    if problems:
        raise PlanError(_listed(f"{where}: mmq does not support this model", problems), SUPPORTED)
    return family.of(config)


def _family_of(config: Mapping[str, Any], where: str) -> Family:
    architectures = config.get("architectures")
    supported = [name for family in FAMILIES.values() for name in family.architectures]
    hint = f'add a line like "architectures": ["{supported[0]}"]; mmq supports {", ".join(supported)}'
    if architectures is None or architectures == []:
        raise PlanError(f"{where}: `architectures` is missing or empty", hint)
    if not isinstance(architectures, list) or not all(isinstance(name, str) for name in architectures):
        raise PlanError(f"{where}: `architectures` must be a list of texts, got {kind(architectures)}", hint)
    for name in architectures:  # vLLM takes the first one that it supports
        for family in FAMILIES.values():
            if name in family.architectures:
                return family
    reasons = [f": {REFUSED[name]}" for name in architectures if name in REFUSED][:1]
    message = f"{where}: mmq does not support {', '.join(architectures)}{''.join(reasons)}"
    raise PlanError(message, f"supported: {', '.join(supported)}")


def without_buffers(checkpoint: Checkpoint, family: Family) -> Checkpoint:
    """The checkpoint without stored buffers that no model reads; their names become its `ignored`."""
    expected = family.shapes(family.read(checkpoint.config)[0])
    ignored = tuple(name for name in checkpoint.tensors if name not in expected and STORED_BUFFERS.search(name))
    if not ignored:
        return checkpoint
    tensors = {name: info for name, info in checkpoint.tensors.items() if name not in ignored}
    return checkpoint.changed(tensors=tensors, ignored=ignored)


def refuse_misfit(checkpoint: Checkpoint, family: Family) -> None:
    """PlanError unless the checkpoint has exactly the unquantized tensors that its config.json describes."""
    if refusal := family.refuses(checkpoint.config):
        raise PlanError(f"{checkpoint.origin}: {refusal}", SUPPORTED)
    if (checkpoint.folder / ADAPTER).exists() and checkpoint.adapter is None:
        raise PlanError(
            f"{checkpoint.folder}: the folder contains both weights and an adapter ({ADAPTER})",
            f"pass `--adapter {checkpoint.folder}` to merge it, or move it away to quantize only the base model",
        )
    if place := next(_quantized(checkpoint.config), None):
        raise PlanError(
            f"{checkpoint.origin} is already quantized: its config.json has {place}",
            "use the full-precision model",
        )
    if problems := _misfits(checkpoint, family):
        raise PlanError(
            _listed(f"{checkpoint.origin}: config.json does not match the stored tensors", problems),
            "use the config.json that was saved with these weights",
        )


def _quantized(config: Mapping[str, Any], place: str = "") -> Iterator[str]:
    """Keys of config.json that describe quantized weights, in any object."""
    for key, value in config.items():
        if key in QUANTIZED and value is not None:
            yield f"{place}{key}"
        if isinstance(value, dict):
            yield from _quantized(value, f"{place}{key}.")


def _misfits(checkpoint: Checkpoint, family: Family) -> list[str]:
    """Tensors that are missing, unexpected, or of a wrong shape or dtype, at most `MAX_LISTED` of each kind."""
    expected, stored = family.shapes(family.read(checkpoint.config)[0]), checkpoint.tensors
    if not expected:
        return []
    absent = [f"{name}: missing, expected {list(shape)}" for name, shape in expected.items() if name not in stored]
    typed = [
        f"{name}: stored as {info.dtype}, expected 16-bit or 32-bit floating point"
        for name, info in stored.items()
        if name in expected and not (info.dtype.is_floating_point and info.dtype.itemsize in (2, 4))
    ]
    for head, embedding in family.tied.items():
        expected.setdefault(head, expected[embedding])
    shaped = [
        f"{name}: the shape is {list(info.shape)}, but config.json requires {list(expected[name])}"
        for name, info in stored.items()
        if name in expected and info.shape != expected[name]
    ]
    foreign = [f"{name}: not a tensor of the model" for name in stored if name not in expected]
    return [line for problems in (absent, shaped, typed, foreign) for line in _shortened(problems)]


def _shortened(problems: Sequence[str]) -> list[str]:
    more = len(problems) - MAX_LISTED
    return [*problems[:MAX_LISTED], *([f"and {more} more of the same kind"] if more > 0 else [])]


def _listed(title: str, problems: Sequence[str]) -> str:
    return "\n".join([f"{title}:", *(f"  {problem}" for problem in _shortened(problems))])
