"""Chat templates for an engine: the model's own template with the start token, or one made of the family's prompt.

An engine renders the template and tokenizes the result without special tokens. LLaVA-1.5's tokenizer puts `<s>` before
every text and its template does not write it, so the model would miss the token that every training prompt began with.
BLIP-2 has no template. An artifact therefore carries a template that writes everything: then a plain `vllm serve` and a
plain request give the tokens of the processor's own prompt.

The token is inserted as `{{ '<s>' }}` at the beginning of the template, in the file that holds it; without this text
the file is the source's byte for byte.
"""

import hashlib
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from exporter.errors import CheckpointError
from exporter.files.strict_json import read_json
from exporter.files.writing import write_text
from exporter.model.families import Family
from exporter.model.processors.inspector import Inspection, has_processor, inspect

TEMPLATE = "chat_template.jinja"
HOLDERS = ("processor_config.json", "chat_template.json", TEMPLATE)  # in transformers' order of precedence
_VALUE = re.compile(r'"chat_template"\s*:\s*"')
_BODY = (
    "{{%- for message in messages -%}}"
    "{{%- if message['role'] == 'assistant' -%}}{{{{ ' ' }}}}"
    "{{%- elif message['role'] == 'user' -%}}{{{{ {head} }}}}{{%- endif -%}}"
    "{{%- if message['content'] is string -%}}{{{{ message['content'] }}}}{{%- else -%}}"
    "{{%- for part in message['content'] if part['type'] == 'image' -%}}{{{{ {picture} }}}}{{%- endfor -%}}"
    "{{%- for part in message['content'] if part['type'] == 'text' -%}}{{{{ part['text'] }}}}{{%- endfor -%}}"
    "{{%- endif -%}}"
    "{{%- if message['role'] == 'user' -%}}{{{{ {tail} }}}}"
    "{{%- elif message['role'] == 'assistant' -%}}{{{{ {end} }}}}{{%- endif -%}}"
    "{{%- endfor -%}}"
)


def engine_template(folder: Path, family: Family) -> str | None:
    """The chat template that an engine needs for a model folder; None when the folder's own template is sufficient.

    CheckpointError when the folder's processor cannot be used. None without a processor.
    """
    changed = engine_file(folder, family)
    if changed is None:
        return None
    name, content = changed
    return content if name == TEMPLATE else str(json.loads(content)["chat_template"])


def engine_file(folder: Path, family: Family) -> tuple[str, str] | None:
    """Name and content of the file of a model folder with the template that an engine needs; None as above."""
    if family.unserved or not has_processor(folder):
        return None
    inspection, name = inspect(folder), template_holder(folder)
    if inspection.template is None or name is None:
        made = _made_template(family, inspection)
        return None if _text(folder / TEMPLATE) == made else (TEMPLATE, made)
    if not inspection.added or inspection.template.before.startswith(inspection.added):
        return None
    if inspection.start and inspection.template.before.startswith(inspection.start[0]):
        return None  # then `encoding` leaves the special tokens out, too
    return name, _inserted(_text(folder / name), name, start_text(inspection.added))


def template_holder(folder: Path) -> str | None:
    """Name of the file from which transformers takes a processor's chat template; None when there is none."""
    for name in HOLDERS:
        path = folder / name
        if path.is_file() and (name == TEMPLATE or isinstance(read_json(path).get("chat_template"), str)):
            return name
    return None


def start_text(token: str) -> str:
    """Template text that writes a start token."""
    return f"{{{{ {_quoted(token)} }}}}"


def as_in_source(folder: Path, family: Family, stored: Mapping[str, str], source: Mapping[str, str]) -> dict[str, str]:
    """The hashes of an artifact's processor files, with that of the template's file as in the source.

    stored, source: file -> sha256, of the artifact and of its source. The hash is changed only where the file is what
    `ship_template` writes: the source's file with the start token, or a template for a source without one.
    """
    name = template_holder(folder)
    if name is None or source.get(name) == stored.get(name):
        return dict(stored)
    inspection, content = inspect(folder), _text(folder / name)
    if name == TEMPLATE and content == _made_template(family, inspection):
        return {file: value for file, value in stored.items() if file != name} | {
            file: value for file, value in source.items() if file == name
        }
    if name not in source:
        return dict(stored)
    text = start_text(inspection.added)
    original = content.replace(text if name == TEMPLATE else _escaped(text), "", 1)
    fits = hashlib.sha256(original.encode()).hexdigest() == source[name] and _inserted(original, name, text) == content
    return {**stored, name: source[name]} if fits else dict(stored)


def ship_template(source: Path, folder: Path, family: Family) -> None:
    """Write the file with an engine's template into an artifact folder, if it differs from the source's."""
    changed = engine_file(source, family)
    if changed is not None:
        write_text(folder / changed[0], changed[1])


def _made_template(family: Family, inspection: Inspection) -> str:
    return prompt_template(family, inspection.added, inspection.start[0] if inspection.start else "")


def prompt_template(family: Family, added: str, start: str = "") -> str:
    """A chat template with the family's prompt for models without one.

    added: start tokens of the tokenizer. start: its start token, which the prompt may write itself. Replies of earlier
    turns are written as in calibration: after a space, and with the end of a reply.
    """
    head, _, tail = family.fallback_prompt.partition("{text}")
    marker = re.escape(family.image_marker)
    match = re.search(rf"(<\|\w+_start\|>)?{marker}(<\|\w+_end\|>)?\s?", head)
    picture = match.group() if match else ""
    if match:
        head = head[: match.start()] + head[match.end() :]
    first = next((token for token in (added, start) if token and head.startswith(token)), "")
    head, first = head.removeprefix(first), first or added
    values = {"head": _quoted(head), "picture": _quoted(picture), "tail": _quoted(tail)}
    values["end"] = "eos_token" if family.reply_end is None else _quoted(family.reply_end)
    return (start_text(first) if first else "") + _BODY.format(**values)


def _text(path: Path) -> str:
    """The content of a file with its line ends; empty when it is missing."""
    return path.read_bytes().decode() if path.is_file() else ""


def _quoted(text: str) -> str:
    """A text as a string of a template."""
    escaped = text.replace("\\", "\\\\").replace("'", "\\'").replace("\n", "\\n")
    return f"'{escaped}'"


def _escaped(text: str) -> str:
    return json.dumps(text)[1:-1]


def _inserted(content: str, name: str, text: str) -> str:
    """The content of a file with `text` at the beginning of the template that it holds.

    CheckpointError when the place in a JSON file is not found.
    """
    if name == TEMPLATE:
        return text + content
    before: dict[str, Any] = json.loads(content)
    expected = {**before, "chat_template": text + before["chat_template"]}
    for match in _VALUE.finditer(content):
        changed = f"{content[: match.end()]}{_escaped(text)}{content[match.end() :]}"
        if json.loads(changed) == expected:
            return changed
    raise CheckpointError(f"{name}: its chat_template cannot be changed", f"write the template to {TEMPLATE} instead")
