"""Whether a model folder's processor makes what the model expects: image tokens of a prompt, pixels of a picture.

A prompt with another number of image tokens than the model expects makes the model fail, or blind without a word.
"""

import json
from collections.abc import Mapping
from typing import Any

from exporter.errors import PlanError
from exporter.model.checkpoint import Checkpoint
from exporter.model.families import Family
from exporter.model.processor_inspector import Inspection, check_config_class, has_processor, inspect

LARGEST_SIDE = 2**13  # pixels that a picture may be scaled to: larger ones take all memory
SHOWN = 3  # tokens that a message names
PICTURES, SETTINGS = "preprocessor_config.json", "processor_config.json"


def check_libraries(checkpoint: Checkpoint, family: Family) -> tuple[str, ...]:
    """What transformers makes of config.json and of the model folder's processor; what a plan says of the latter.

    PlanError when they do not fit each other, CheckpointError when one of them cannot be used.
    """
    check_config_class(family.config_class, checkpoint.config, checkpoint.origin, checkpoint.folder)
    if not checkpoint.folder.is_dir():  # a model of the hub of which only headers were fetched
        return ()
    if not has_processor(checkpoint.folder):
        return ("no processor lies beside the weights: what calibrates or evaluates needs one",)
    config = checkpoint.config
    expected = family.processor_fields(config)
    asked = {"text": family.text(None if "captioning" in family.tasks else "a"), "fields": sorted(expected)}
    fallback = family.fallback_prompt.format(text=asked["text"])
    inspection = inspect(checkpoint.folder, **asked, fallback=fallback, rows=family.vocabulary(config))
    if inspection.failure:
        problems = [f"the processor cannot encode a picture with a prompt: {inspection.failure}"]
    else:
        looked = (_vocabulary_problems, _token_problems, _pixel_problems)
        problems = [problem for look in looked for problem in look(config, family, inspection)]
    if problems:
        lines = "\n".join(f"  {problem}" for problem in problems)
        message = f"{checkpoint.origin}: its processor and config.json do not fit each other:\n{lines}"
        raise PlanError(message, _lines_to_add(expected, inspection.fields))
    return ()


def _token_problems(config: Mapping[str, Any], family: Family, inspection: Inspection) -> list[str]:
    marker, expected = config.get("image_token_index"), family.image_tokens(config)
    if marker is None or not expected:
        return []
    counts = [row.count(marker) for row in (inspection.tokens, *inspection.padded)]
    if counts[0] != expected:
        blamed = "" if counts[0] else ", so that the model would not see the picture"
        made = f"a prompt with one picture holds {counts[0]} image tokens (id {marker})"
        return [f"{made}, the model expects {expected}{blamed}"]
    if wrong := [count for count in counts if count != expected]:
        return [f"a padded prompt with one picture holds {wrong[0]} image tokens (id {marker}), not {expected}"]
    return []


def _vocabulary_problems(config: Mapping[str, Any], family: Family, inspection: Inspection) -> list[str]:
    """Tokens that the model has no embedding of. An image token that its prompts leave out may be one."""
    used = set(inspection.tokens).union(*inspection.padded)
    beyond = [(token, number) for token, number in inspection.beyond if number in used or token != family.image_marker]
    if not beyond:
        return []
    listed = ", ".join(f"{number} ({token[:40]!r})" for token, number in beyond[:SHOWN])
    rest = f" and {len(beyond) - SHOWN} more" if len(beyond) > SHOWN else ""
    return [f"the tokenizer has tokens of ids {listed}{rest}, the model has {family.vocabulary(config):,} tokens"]


def _pixel_problems(config: Mapping[str, Any], family: Family, inspection: Inspection) -> list[str]:
    side, shape = family.picture_side(config), inspection.pixels
    problems = []
    if len(inspection.tokens) > family.positions(config):
        problems.append(
            f"a prompt takes {len(inspection.tokens)} tokens, the model has {family.positions(config)} positions"
        )
    if shape[-2:] != (side, side):
        made = " x ".join(map(str, shape[-2:]))
        problems.append(f"{PICTURES} makes pictures of {made} pixels, the vision tower takes {side} x {side}")
    large = {key: value for key, value in inspection.sides.items() if value > LARGEST_SIDE}
    return problems + [f"{PICTURES}: size.{key}: {value}; at most {LARGEST_SIDE}" for key, value in large.items()]


def _lines_to_add(expected: Mapping[str, Any], fields: Mapping[str, Any]) -> str | None:
    """The settings that config.json asks for and the processor has otherwise."""
    wrong = {key: value for key, value in expected.items() if fields.get(key) != value}
    if not wrong:
        return "the processor's files must be those that were saved with this config.json"
    lines = [f"{json.dumps(key)}: {json.dumps(value)}" for key, value in wrong.items()]
    return f"write in {SETTINGS}: {', '.join(lines)}"
