"""Whether mmq can take a checkpoint: its config.json is sound, of a known model, and describes the stored tensors.

All of it is asked before a plan is made, from config.json and headers alone.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from exporter.errors import PlanError
from exporter.files.strict_json import kind
from exporter.model.adapter import SETTINGS as ADAPTER
from exporter.model.checkpoint import Checkpoint
from exporter.model.families import FAMILIES, Family

LISTED = 5  # problems of one kind that are written out
# What older versions of transformers stored although it is computed from the config: newer ones ignore it.
STORED_BUFFERS = re.compile(r"(^|\.)(position_ids|rotary_emb\.inv_freq)$")
QUANTIZED = ("quantization_config", "compression_config")
MODELS_PAGE = "see docs/reference/families.md for the models that mmq takes"


def known_family(config: Mapping[str, Any], where: str) -> Family:
    """The family of a model; PlanError when there is none, or when config.json holds values that cannot be.

    where: the file, for messages.
    """
    family = _family_of(config, where)
    _, problems = family.read(config)
    if not problems and (refused := family.refuses(config)):
        problems = [refused]
    if problems:
        raise PlanError(_listed(f"{where}: mmq cannot take this model", problems), MODELS_PAGE)
    return family


def _family_of(config: Mapping[str, Any], where: str) -> Family:
    architectures = config.get("architectures")
    known = [name for family in FAMILIES.values() for name in family.architectures]
    add = f'add a line like "architectures": ["{known[0]}"]; mmq knows {", ".join(known)}'
    if architectures is None or architectures == []:
        raise PlanError(f"{where}: it names no architecture", add)
    if not isinstance(architectures, list) or not all(isinstance(name, str) for name in architectures):
        raise PlanError(f"{where}: `architectures` must be a list of texts, it is {kind(architectures)}", add)
    for family in FAMILIES.values():
        if set(architectures) & set(family.architectures):
            return family
    raise PlanError(f"{where}: mmq does not know {', '.join(architectures)}", f"it knows {', '.join(known)}")


def without_buffers(checkpoint: Checkpoint, family: Family) -> Checkpoint:
    """The checkpoint without stored buffers that no model reads; `ignored` names them."""
    expected = family.shapes(family.read(checkpoint.config)[0])
    ignored = tuple(name for name in checkpoint.tensors if name not in expected and STORED_BUFFERS.search(name))
    if not ignored:
        return checkpoint
    tensors = {name: info for name, info in checkpoint.tensors.items() if name not in ignored}
    return checkpoint.changed(tensors=tensors, ignored=ignored)


def refuse_misfit(checkpoint: Checkpoint, family: Family) -> None:
    """PlanError unless the checkpoint holds exactly the tensors that its config.json asks for, unquantized."""
    if refused := family.refuses(checkpoint.config):
        raise PlanError(f"{checkpoint.origin}: {refused}", MODELS_PAGE)
    if (checkpoint.folder / ADAPTER).exists() and checkpoint.adapter is None:
        raise PlanError(
            f"{checkpoint.folder}: an adapter lies beside the weights ({ADAPTER})",
            f"`--adapter {checkpoint.folder}` merges it; move it away to quantize the base model alone",
        )
    if place := next(_quantized(checkpoint.config), None):
        raise PlanError(
            f"{checkpoint.origin} is quantized already: its config.json has {place}",
            "start from the full-precision model",
        )
    if problems := _misfits(checkpoint, family):
        raise PlanError(
            _listed(f"{checkpoint.origin}: config.json and the stored tensors do not fit each other", problems),
            "give the config.json that was saved with these weights",
        )


def _quantized(config: Mapping[str, Any], place: str = "") -> Iterator[str]:
    """Where a config.json describes quantized weights: at its top, or in the object of one part."""
    for key, value in config.items():
        if key in QUANTIZED and value is not None:
            yield f"{place}{key}"
        if isinstance(value, dict) and not place:
            yield from _quantized(value, f"{key}.")


def _misfits(checkpoint: Checkpoint, family: Family) -> list[str]:
    """Tensors that are absent, foreign, or of another shape or type, the first few of each kind."""
    expected, stored = family.shapes(family.read(checkpoint.config)[0]), checkpoint.tensors
    if not expected:
        return []
    absent = [f"{name}: missing, {list(shape)} expected" for name, shape in expected.items() if name not in stored]
    typed = [
        f"{name}: stored as {info.dtype}, expected 16 or 32 bit floating point"
        for name, info in stored.items()
        if name in expected and not (info.dtype.is_floating_point and info.dtype.itemsize in (2, 4))
    ]
    for head, embedding in family.tied.items():
        expected.setdefault(head, expected[embedding])
    shaped = [
        f"{name}: the shape is {list(info.shape)}, config.json asks for {list(expected[name])}"
        for name, info in stored.items()
        if name in expected and info.shape != expected[name]
    ]
    foreign = [f"{name}: no part of the model" for name in stored if name not in expected]
    return [line for problems in (absent, shaped, typed, foreign) for line in _shortened(problems)]


def _shortened(problems: Sequence[str]) -> list[str]:
    rest = len(problems) - LISTED
    return [*problems[:LISTED], *([f"and {rest} more of the same kind"] if rest > 0 else [])]


def _listed(title: str, problems: Sequence[str]) -> str:
    return "\n".join([f"{title}:", *(f"  {problem}" for problem in _shortened(problems))])
