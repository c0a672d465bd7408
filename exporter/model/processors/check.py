"""Checks that a model folder's processor matches config.json: image tokens, vocabulary, prompt length, picture size.

With a wrong number of image tokens, the model fails or silently ignores the picture.
"""

import json
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from exporter.errors import PlanError
from exporter.model.checkpoint import Checkpoint
from exporter.model.families import AtMost, Component, Family
from exporter.model.processors.files import PICTURES, SETTINGS
from exporter.model.processors.inspector import (
    Inspection,
    check_config_class,
    has_processor,
    inspect,
    refuse_incomplete,
)

MAX_NAMED = 3  # tokens that a message names
MAX_SHOWN = 60  # characters of a setting in a message
PLACEHOLDER = "image_token_id"  # of processors in transformers: the id with which they fill the place of a picture


def check_libraries(checkpoint: Checkpoint, family: Family, needed: bool = True) -> tuple[str, ...]:
    """Load config.json and the processor with transformers in the helper; returns notes for the plan.

    needed: whether samples will be encoded, for calibration or evaluation; otherwise a folder may have no processor.
    PlanError when they do not match, CheckpointError when one of them cannot be used.
    """
    check_config_class(family.config_class, checkpoint.config, checkpoint.origin, checkpoint.folder)
    if not checkpoint.folder.is_dir():  # headers without files
        return ()
    if not needed and not has_processor(checkpoint.folder):
        return ("the model folder has no processor, which calibration, evaluation and serving need",)
    refuse_incomplete(checkpoint.folder)
    config, inspection = checkpoint.config, _inspection(checkpoint, family)
    problems = _setting_problems(config, family, inspection)
    if inspection.failure:
        problems.append(f"the processor cannot encode a picture with a prompt: {inspection.failure}")
    else:
        checks = (_vocabulary_problems, _token_problems, _pixel_problems)
        problems += [problem for check in checks for problem in check(config, family, inspection)]
    if problems:
        lines = "\n".join(f"  {problem}" for problem in problems)
        message = f"{checkpoint.origin}: its processor does not match config.json:\n{lines}"
        raise PlanError(message, _lines_to_add(_expected(config, family, inspection)))
    return _start_notes(inspection)


def _start_notes(inspection: Inspection) -> tuple[str, ...]:
    """A note when the tokenizer has a start token that no prompt begins with."""
    if inspection.start is None or inspection.start[1] in inspection.tokens:
        return ()
    return (
        f"neither the chat template nor the processor writes the tokenizer's start token {inspection.start[0]!r}: "
        "prompts begin without it. LLaVA-1.5 was trained with it; if this model was too, set `add_bos_token: true` in "
        "tokenizer_config.json",
    )


def measured(checkpoint: Checkpoint, family: Family) -> Family:
    """The family with numbers of tokens that the model's own processor makes of a picture of 640 x 480 pixels.

    The family itself where the number of image tokens does not depend on the picture, and without a processor.
    """
    if not family.varies or not checkpoint.folder.is_dir() or not has_processor(checkpoint.folder):
        return family
    count, assumed = _inspection(checkpoint, family).typical, family.image_tokens(checkpoint.config)
    if not count:
        return family

    def scaled(component: Component) -> Component:
        return replace(component, tokens=lambda config: -(-component.tokens(config) * count // assumed))

    return replace(family, components=tuple(map(scaled, family.components)), image_tokens=lambda config: count)


def _inspection(checkpoint: Checkpoint, family: Family) -> Inspection:
    config = checkpoint.config
    request = {
        "text": family.text(None if "captioning" in family.tasks else "a"),
        "fields": sorted({*family.processor_fields(config), *family.shared_settings(config), PLACEHOLDER}),
        "nested": family.nested,
        "varying": family.image_token(config) if family.varies else None,
    }
    fallback = family.fallback_prompt.format(text=request["text"])
    return inspect(checkpoint.folder, **request, fallback=fallback, rows=family.vocabulary(config))


def _token_problems(config: Mapping[str, Any], family: Family, inspection: Inspection) -> list[str]:
    """Prompts with a wrong number of image tokens, with and without padding."""
    marker, expected = family.image_token(config), family.image_tokens(config)
    if marker is None or not expected:
        return []
    counts = [row.count(marker) for row in (inspection.tokens, *inspection.padded)]
    own = inspection.fields.get(PLACEHOLDER)
    if family.varies and own is not None and own != marker:
        return [f"the processor's image token has the id {own}, but config.json has {marker}"]
    if family.varies:
        unseen = f"a prompt with one picture has no image token (id {marker}), so the model would not see the picture"
        return [unseen] * (min(counts) == 0)
    if counts[0] != expected:
        effect = "" if counts[0] else ", so the model would not see the picture"
        actual = f"a prompt with one picture has {counts[0]} image tokens (id {marker})"
        return [f"{actual}, but the model expects {expected}{effect}"]
    if wrong := [count for count in counts if count != expected]:
        return [f"a padded prompt with one picture has {wrong[0]} image tokens (id {marker}), expected {expected}"]
    return []


def _setting_problems(config: Mapping[str, Any], family: Family, inspection: Inspection) -> list[str]:
    """Settings of the processor that differ from those that follow from config.json.

    Where the number of image tokens is fixed, those of a prompt are counted instead.
    """
    shared = family.shared_settings(config)
    return [
        f"the processor has {key}: {_shown(inspection.fields.get(key))}, but the model expects {_shown(value)}"
        for key, value in _expected(config, family, inspection).items()
        if family.varies or key in shared
    ]


def _expected(config: Mapping[str, Any], family: Family, inspection: Inspection) -> dict[str, Any]:
    """Settings that differ from those that follow from config.json: attribute path -> the value that is right."""
    own, required = inspection.fields, family.processor_fields(config)
    shared = {key: value for key, value in family.shared_settings(config).items() if own.get(key) is not None}
    return {key: value for key, value in {**required, **shared}.items() if not _fits(own.get(key), value)}


def _fits(own: Any, expected: Any) -> bool:
    if isinstance(expected, AtMost):
        return isinstance(own, int) and own <= expected.value
    return bool(own == expected)


def _shown(value: Any) -> str:
    if isinstance(value, AtMost):
        return f"at most {value.value}"
    text = json.dumps(value)
    return text if len(text) <= MAX_SHOWN else f"{text[:MAX_SHOWN]}..."


def _vocabulary_problems(config: Mapping[str, Any], family: Family, inspection: Inspection) -> list[str]:
    """Tokens without an embedding in the model, except an image token that prompts do not contain."""
    used = set(inspection.tokens).union(*inspection.padded)
    beyond = [(token, number) for token, number in inspection.beyond if number in used or token != family.image_marker]
    if not beyond:
        return []
    listed = ", ".join(f"{number} ({token[:40]!r})" for token, number in beyond[:MAX_NAMED])
    more = f" and {len(beyond) - MAX_NAMED} more" if len(beyond) > MAX_NAMED else ""
    count = f"{family.vocabulary(config):,}"
    return [f"the tokenizer has tokens with the ids {listed}{more}, but the model has only {count} tokens"]


def _pixel_problems(config: Mapping[str, Any], family: Family, inspection: Inspection) -> list[str]:
    """Prompts that are too long, and pictures of a wrong size."""
    pixels, shape = family.pixels(config), inspection.pixels
    problems = []
    prompt, longest = len(inspection.tokens), max(family.max_new_tokens.values(), default=0)
    if prompt + longest > family.positions(config):
        answer = f" and the longest answer {longest} (--max-new-tokens)" if prompt <= family.positions(config) else ""
        problems.append(
            f"a prompt has {prompt} tokens{answer}, but the model has only {family.positions(config)} positions"
        )
    if pixels and shape[-len(pixels) :] != pixels:
        produced, expected = (" x ".join(map(str, size)) for size in (shape[-len(pixels) :], pixels))
        problems.append(f"{PICTURES} makes pictures of {produced} pixels, but the vision tower expects {expected}")
    return problems


def _lines_to_add(expected: Mapping[str, Any]) -> str:
    """A hint with the settings that config.json requires, by file. expected: attribute path -> value."""
    prefix = "image_processor."
    lines: dict[str, list[str]] = {}
    for path, value in expected.items():
        first, *inner = path.removeprefix(prefix).split(".")
        content = value.value if isinstance(value, AtMost) else value
        for key in reversed(inner):
            content = {key: content}
        file = PICTURES if path.startswith(prefix) else SETTINGS
        lines.setdefault(file, []).append(f"{json.dumps(first)}: {json.dumps(content)}")
    added = "; ".join(f"add to {file}: {', '.join(settings)}" for file, settings in lines.items())
    return added or "use the processor files that were saved with this config.json"
