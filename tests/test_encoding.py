"""Samples that no model can take are named before the work starts; image tokens in texts are removed."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from exporter import data
from exporter.data import notes
from exporter.data.tasks.sample import Sample
from exporter.device import choose
from exporter.errors import DataError
from exporter.events import Event
from exporter.model.embedded import MODELS
from exporter.model.families import FAMILIES, Family
from exporter.model.inference.encoding import continued, encode, refuse_too_long
from exporter.model.processors.processor import load_processor
from exporter.pipeline.export import export
from exporter.planning.recipe_file import load_recipe
from tests import layouts
from tests.tiny_models import CONFIGS, processor_of

FAMILY = FAMILIES["llava"]
DEMO = MODELS["demo-llava"]


def sample(identity: str, question: str | None, *references: str) -> Sample:
    return Sample(identity, lambda: Image.new("RGB", (40, 30)), question, references)


def described(folder: Path, **texts: Any) -> Path:
    """A data folder with one picture and line each for training and test."""
    for split, shade in (("train", 0), ("test", 255)):
        (folder / split).mkdir(parents=True)
        Image.new("RGB", (40, 30), (shade, 9, 9)).save(folder / split / "a.png")
        layouts.write(folder / split / "metadata.jsonl", json.dumps({"file_name": "a.png"} | texts))
    return folder


@pytest.mark.parametrize(
    ("question", "asked"),
    [
        ("<image>\nwhat is it?", "what is it?"),
        ("what is it?\n<image>", "what is it?"),
        ("what <image> is it?", "what is it?"),
        ("<image><image> what?", "what?"),
        ("what <Image> is  it?", "what <Image> is  it?"),
    ],
)
def test_the_place_of_a_picture_is_left_out_of_texts(tmp_path: Path, question: str, asked: str) -> None:
    folder = described(tmp_path, question=question, answer="a <image>", captions=["<image> c", "d"])
    (loaded,) = data.samples("folder", folder, "vqa", "train", 9, 0)
    assert (loaded.question, loaded.references) == (asked, ("a",))
    (caption,) = data.samples("folder", folder, "captioning", "test", 9, 0)
    assert caption.references == ("c", "d")
    (note,) = notes([loaded], [caption])
    assert note.startswith("2 of 2 samples have <image> or <|image_pad|> in a text")
    assert not notes([sample("s", "q", "a")])


@pytest.mark.parametrize("family", FAMILIES.values(), ids=lambda family: family.name)
def test_the_marker_of_every_family_is_left_out_of_texts(tmp_path: Path, family: Family) -> None:
    folder = described(tmp_path, question=f"what{family.image_marker}?", answer="a")
    (loaded,) = data.samples("folder", folder, "vqa", "train", 9, 0)
    assert loaded.question == "what ?"


def test_a_text_with_only_an_image_token_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"sample train/a\.png.* has a text that contains only an image placeholder"):
        data.samples("folder", described(tmp_path, question="<image>", answer="a"), "vqa", "train", 9, 0)


def test_an_export_notes_once_that_image_tokens_are_removed(tmp_path: Path) -> None:
    folder = described(tmp_path / "d", question="<image>\nwhat?", answer="red")
    changes = {"calibration": {"samples": 4, "tasks": ("vqa",)}, "model": {"repo": "demo-llava"}}
    recipe = load_recipe("llava-w4-vit8").adjusted(**changes)
    events: list[Event] = []
    sources = data.places([folder])
    export(
        recipe, out=tmp_path / "o", device=choose("cpu"), on_event=events.append, sources=sources, skip_evaluation=True
    )
    assert sum("<image>" in event.message for event in events) == 1


def test_other_numbers_of_image_tokens_are_named() -> None:
    processor = load_processor(DEMO)
    inputs = encode(processor, FAMILY, [sample("a", "what?"), sample("b", "which color is it?")], [None, None], "right")
    assert (inputs["input_ids"] == processor.image_token_id).sum(dim=1).tolist() == [64, 64]
    with pytest.raises(DataError, match=r"^b: the text contains '<image>', the placeholder of a picture"):
        encode(processor, FAMILY, [sample("a", "what?"), sample("b", "<image> what?")], [None, None], "right")


@pytest.mark.parametrize("name", ["demo-llava", "demo-blip2"])
def test_an_image_token_in_a_question_or_a_reply_is_named(name: str) -> None:
    """Also in a single sample, with which no other count can be compared."""
    processor, family = load_processor(MODELS[name]), FAMILIES[name.removeprefix("demo-")]
    for question, reply in (("what <image> is it?", None), ("what?", "a <image>")):
        with pytest.raises(DataError, match=r"^a: the text contains '<image>'"):
            encode(processor, family, [sample("a", question)], [reply], "right")


def test_samples_longer_than_the_models_positions_are_named() -> None:
    processor = load_processor(DEMO)
    assert (processor.positions, processor.image_tokens) == (512, 64)
    words = "red " * 500
    long, short = sample("long", "what?", words), sample("short", "what?", "red")
    refuse_too_long(processor, FAMILY, [short], {"vqa": [short]})
    with pytest.raises(DataError, match=r"1 samples are longer than the model's 512 positions: long \(5\d\d tokens\)"):
        refuse_too_long(processor, FAMILY, [short, long], {})
    refuse_too_long(processor, FAMILY, [], {"vqa": [long]})  # its reply is not read then
    with pytest.raises(DataError, match="asks"):
        refuse_too_long(processor, FAMILY, [], {"vqa": [sample("asks", words)]})
    with pytest.raises(DataError, match=r"long: .* positions"):
        encode(processor, FAMILY, [long], [words], "right")


def test_the_length_of_a_sample_is_that_of_its_tokens() -> None:
    for name, family in (("demo-llava", "llava"), ("demo-blip2", "blip2")):
        processor = load_processor(MODELS[name])
        short = sample("s", "which color is the circle?", "red")
        length = encode(processor, FAMILIES[family], [short], ["red"], "right")["input_ids"].shape[1]
        processor.positions = length
        refuse_too_long(processor, FAMILIES[family], [short], {})
        processor.positions = length - 1
        with pytest.raises(DataError, match=f"{length} tokens"):
            refuse_too_long(processor, FAMILIES[family], [short], {})


def test_a_picture_that_the_processor_cannot_take_is_named() -> None:
    broken = Sample("odd", lambda: "no picture", None, ())  # type: ignore[arg-type, return-value]
    with pytest.raises(DataError, match="the processor cannot encode odd: "):
        encode(load_processor(DEMO), FAMILY, [broken], [None], "right")


@pytest.mark.parametrize(("family", "config"), CONFIGS.values(), ids=CONFIGS)
def test_text_after_a_prompt_is_what_the_processor_makes_of_the_longer_text(
    family: Family, config: dict[str, Any]
) -> None:
    tiny, processor = family.tiny_processor(config), processor_of(f"{family.name} {json.dumps(config)}")
    picture = Image.new("RGB", (40, 30), (9, 99, 200))
    prompt, whole = (
        processor(images=[[picture]] if family.nested else [picture], text=[text], return_tensors="pt")
        for text in ((tiny.prompt or "") + "AB", (tiny.prompt or "") + "ABCDE")
    )
    inputs = {name: value for name, value in prompt.items() if isinstance(value, torch.Tensor)}
    longer = continued(inputs, whole["input_ids"][0, -3:].tolist())
    assert longer.keys() == inputs.keys()
    assert all(torch.equal(value, whole[name]) for name, value in longer.items())
