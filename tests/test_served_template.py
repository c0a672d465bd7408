"""The chat template of an artifact: a plain request to an engine gives the tokens of the processor's own prompt."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from exporter.data.tasks.sample import Sample
from exporter.model.embedded import MODELS
from exporter.model.families import FAMILIES, Family
from exporter.model.inference.encoding import encode, render
from exporter.model.processors.chat_template import conversation
from exporter.model.processors.files import processor_files
from exporter.model.processors.processor import load_processor
from exporter.model.processors.served_template import (
    as_in_source,
    engine_file,
    engine_template,
    prompt_template,
    ship_template,
    template_holder,
)
from tests.slow import some_of
from tests.tiny_models import write_processor

SERVED = [name for name, family in FAMILIES.items() if not family.unserved]
PICTURE = Image.new("RGB", (48, 36), "gray")
QUESTION = "What is it? {{ x }} \"q\" 'r' \\n"


def add_start(folder: Path) -> None:
    """Make the tokenizer of a folder put `<s>` before every text."""
    path = folder / "tokenizer.json"
    content = json.loads(path.read_text())
    number = next(entry["id"] for entry in content["added_tokens"] if entry["content"] == "<s>")
    special, text = {"SpecialToken": {"id": "<s>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}
    content["post_processor"] = {
        "type": "TemplateProcessing",
        "single": [special, text],
        "pair": [special, text, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {"<s>": {"id": "<s>", "ids": [number], "tokens": ["<s>"]}},
    }
    path.write_text(json.dumps(content))


def source(folder: Path, family: Family, start: bool, template: bool) -> Path:
    """A processor of a family, whose tokenizer adds `<s>` or not, with a template of its own or without one."""
    config = family.tiny_config()
    folder.mkdir()
    write_processor(folder, family.of(config), config)
    if start:
        add_start(folder)
    if not template:
        (folder / "chat_template.jinja").unlink(missing_ok=True)
    return folder


def shipped(folder: Path, family: Family) -> Path:
    """A copy of a source's texts with the template of an artifact."""
    copy = folder.with_name(f"{folder.name}-artifact")
    shutil.copytree(folder, copy)
    ship_template(folder, copy, family)
    return copy


def evaluated(folder: Path, family: Family) -> list[int]:
    """The ids that the evaluation gives to the source's model."""
    sample = Sample("a", lambda: PICTURE, QUESTION, ("x",))
    return encode(load_processor(folder), family, [sample], [None], "left")["input_ids"][0].tolist()


def requested(folder: Path, family: Family) -> list[int]:
    """The ids of a plain request to vLLM: the rendered template, tokenized without special tokens.

    vLLM takes the processor's template, or the tokenizer's where the processor has none (BLIP-2).
    """
    library = load_processor(folder).library
    renderer = library if getattr(library, "chat_template", None) else library.tokenizer
    messages = conversation(family.text(QUESTION))
    text = renderer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    images = [[PICTURE]] if family.nested else [PICTURE]
    made = library(images=images, text=[text], add_special_tokens=False, return_tensors="pt")
    return made["input_ids"][0].tolist()


REQUESTS = {
    f"{name}-{'start' if start else 'bare'}-{'template' if template else 'none'}": (name, start, template)
    for name in SERVED
    for start in (True, False)
    for template in (True, False)
}


@pytest.mark.parametrize(  # with both, and with neither
    ("name", "start", "template"), some_of(REQUESTS, [key for key, (_, *both) in REQUESTS.items() if len({*both}) == 1])
)
def test_a_plain_request_gives_the_tokens_of_the_evaluation(
    name: str, start: bool, template: bool, tmp_path: Path
) -> None:
    family = FAMILIES[name]
    folder = source(tmp_path / "source", family, start, template)
    artifact = shipped(folder, family)
    expected = evaluated(folder, family)
    assert requested(artifact, family) == expected
    assert evaluated(artifact, family) == expected
    assert engine_template(artifact, family) is None
    assert as_in_source(artifact, family, processor_files(artifact), processor_files(folder)) == processor_files(folder)


@pytest.mark.parametrize("name", [name for name in MODELS if name != "demo-blip2-itm"])
def test_demo_models_get_a_template_with_their_start_token(name: str, tmp_path: Path) -> None:
    """demo-llava's template lacks `<s>`; demo-blip2 has no template."""
    family = FAMILIES[name.removeprefix("demo-")]
    artifact = tmp_path / name
    shutil.copytree(MODELS[name], artifact, ignore=shutil.ignore_patterns("*.safetensors"))
    assert engine_file(artifact, family)
    ship_template(MODELS[name], artifact, family)
    expected = evaluated(MODELS[name], family)
    assert requested(artifact, family) == evaluated(artifact, family) == expected
    original = processor_files(MODELS[name])
    assert as_in_source(artifact, family, processor_files(artifact), original) == original


def test_a_template_in_a_json_file_changes_by_the_start_token_only(tmp_path: Path) -> None:
    """transformers takes the template of processor_config.json before that of chat_template.json and its own file."""
    family = FAMILIES["llava"]
    folder = source(tmp_path / "source", family, start=True, template=True)
    text = (folder / "chat_template.jinja").read_text()
    expected = evaluated(folder, family)
    (folder / "chat_template.jinja").write_text("never used")
    for name in ("chat_template.json", "processor_config.json"):
        path = folder / name
        held = json.loads(path.read_text()) if path.is_file() else {}
        path.write_text(json.dumps({"note": {"chat_template": "no"}, **held, "chat_template": text}, indent=1))
        assert template_holder(folder) == name
        artifact = shipped(folder, family)
        assert requested(artifact, family) == expected
        before, after = processor_files(folder), processor_files(artifact)
        assert {file for file in before if before[file] != after[file]} == {name}
        assert as_in_source(artifact, family, after, before) == before
        shutil.rmtree(artifact)


@pytest.mark.parametrize("edit", [lambda text: text + "x", lambda text: text.replace("USER", "User"), lambda text: ""])
@pytest.mark.parametrize("template", [True, False])
def test_an_edited_template_is_not_taken_for_the_sources(template: bool, edit: Any, tmp_path: Path) -> None:
    family = FAMILIES["llava"]
    folder = source(tmp_path / "source", family, start=True, template=template)
    artifact = shipped(folder, family)
    path = artifact / "chat_template.jinja"
    path.write_text(edit(path.read_text()))
    original = processor_files(folder)
    assert as_in_source(artifact, family, processor_files(artifact), original) != original


def test_earlier_turns_end_as_in_calibration(tmp_path: Path) -> None:
    """A made template writes a conversation's earlier reply like the replies that calibration feeds to the model."""
    family = FAMILIES["llava"]
    folder = source(tmp_path / "source", family, start=True, template=False)
    sample = Sample("a", lambda: PICTURE, None, ("red",))
    whole = render(load_processor(folder), family, sample, "red")
    library = load_processor(shipped(folder, family)).library
    turns = [
        *conversation(family.text(None)),
        {"role": "assistant", "content": "red"},
        {"role": "user", "content": "b"},
    ]
    assert library.apply_chat_template(turns) == f"<s>{whole}USER: b ASSISTANT:"
    assert prompt_template(family, "").startswith("{%-")


def test_a_start_token_in_the_familys_prompt_is_written_once() -> None:
    """Idefics 3's prompt begins with it; a second turn must not."""
    template = prompt_template(FAMILIES["idefics3"], "", "<|begin_of_text|>")
    assert template.startswith("{{ '<|begin_of_text|>' }}{%-")
    assert template.count("<|begin_of_text|>") == 1
    assert prompt_template(FAMILIES["idefics3"], "<|begin_of_text|>") == template
