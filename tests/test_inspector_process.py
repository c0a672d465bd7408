"""The helper's code in this process, on small stand-ins for processors: each limit, each value of a reply.

`test_processor.py` sends requests to a helper process and real processors; these tests cover the same code by its
units, because no record shows which lines a helper runs.
"""

import shutil
import signal
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from exporter.model.embedded import MODELS
from exporter.model.processors import inspector_process as helper
from exporter.model.processors.chat_template import MAX_CHARACTERS, PROBES
from exporter.model.processors.tokenizer_check import DamagedFile

DEMO = MODELS["demo-llava"]


def request(folder: Path = DEMO, **more: Any) -> dict[str, Any]:
    return {"folder": str(folder), "state": "", **more}


@pytest.fixture
def copied(tmp_path: Path) -> Path:
    return Path(shutil.copytree(DEMO, tmp_path / "m"))


def test_the_reply_has_every_figure_that_was_asked_for() -> None:
    reply = helper.answer(request(fields=["patch_size", "image_processor.crop_size.height", "no.such"], rows=256))
    assert reply["fields"] == {"patch_size": 8, "image_processor.crop_size.height": 64, "no.such": None}
    assert (reply["start"], reply["added"], reply["beyond"]) == (["<s>", 1], "<s>", [])
    assert [text.count(probe) for text, probe in zip(reply["rendered"], PROBES, strict=True)] == [1] * len(PROBES)
    assert not {"tokens", "failure", "typical"} & reply.keys()
    encoded = helper.answer(request(fallback="", text="what is it?", varying=4))
    assert encoded["pixels"] == [1, 3, 64, 64]
    assert encoded["tokens"].count(4) == encoded["typical"] == 64
    assert len(encoded["padded"]) == 4
    assert len({len(row) for row in encoded["padded"]}) == 1


def test_a_failed_step_is_named_with_its_reason_and_file(copied: Path) -> None:
    (copied / "preprocessor_config.json").write_text("[]")
    failed = helper.answer(request(copied))
    assert (failed["step"], failed["file"]) == ("load", "preprocessor_config.json")
    assert failed["reason"].startswith(f"{failed['error']}: ")
    wrong = {"config": {"model_type": "llama"}, "config_class": "LlavaConfig"}
    assert helper.answer(wrong) == {
        "step": "config",
        "error": "ValueError",
        "reason": 'ValueError: `model_type` must be "llava", got "llama"',
        "file": "",
    }
    assert helper.answer({"config": {"model_type": "llava"}, "config_class": "LlavaConfig"}) == {}


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (MemoryError(), "it exceeds the memory limit for processors"),
        (ValueError("a\n  b"), "ValueError: a b"),
        (ValueError(), "ValueError"),
        (ValueError("x" * 999), "ValueError: " + "x" * 288),
        (DamagedFile("tokenizer.json", "two\nwords"), "two words"),
        (DamagedFile("tokenizer.json", "x" * 999), "x" * 300),
    ],
)
def test_a_reason_is_one_short_line(error: BaseException, reason: str) -> None:
    assert helper._reason(error) == reason


def test_the_file_of_a_failure_is_the_one_that_its_step_reads(copied: Path) -> None:
    tokenizer = helper._Failed("tokenizer", ValueError())
    assert helper._file(tokenizer, request(copied)) == "tokenizer.json"
    assert helper._file(helper._Failed("template", ValueError()), request(copied)) == ""
    assert helper._file(helper._Failed("encode", DamagedFile("a.json", "x")), request(copied)) == "a.json"
    assert helper.blame(copied) == ""
    (copied / "tokenizer.json").write_text("{}")
    assert helper.blame(copied) == "tokenizer.json"
    (copied / "tokenizer.json").unlink()
    assert helper._file(tokenizer, request(copied)) == ""
    assert helper.blame(copied) == ""
    (copied / "processor_config.json").write_text("{")
    assert helper._file(helper._Failed("load", ValueError()), request(copied)) == "processor_config.json"


def test_a_step_has_its_processor_time_and_leaves_no_timer() -> None:
    with helper._step("load", 7):
        timers = [signal.getitimer(kind)[0] for kind in (signal.ITIMER_PROF, signal.ITIMER_VIRTUAL)]
    assert [round(seconds) for seconds in timers] == [7, 14]
    with pytest.raises(helper._Failed) as failed, helper._step("load", 7):
        raise KeyError("x")
    assert (failed.value.step, str(failed.value), type(failed.value.error)) == ("load", "load", KeyError)
    assert [signal.getitimer(kind) for kind in (signal.ITIMER_PROF, signal.ITIMER_VIRTUAL)] == [(0.0, 0.0)] * 2
    with pytest.raises(TimeoutError, match="exceeds the time limit"):
        helper._too_slow(signal.SIGPROF, None)


class Words:
    """A tokenizer of letters that puts `before` before every text and `after` behind it."""

    eos_token = "!"

    def __init__(self, before: Sequence[int], after: Sequence[int] = ()) -> None:
        self.before, self.after = before, after

    def __call__(self, text: str, add_special_tokens: bool) -> dict[str, list[int]]:
        ids = [ord(letter) for letter in text]
        return {"input_ids": [*self.before, *ids, *self.after] if add_special_tokens else ids}

    def convert_ids_to_tokens(self, ids: Sequence[int]) -> list[str]:
        return [f"<{number}>" for number in ids]


def test_tokens_before_every_text_are_found() -> None:
    assert helper._added(Words([7, 8], [9])) == "<7><8>"
    assert helper._added(Words([], [9])) == ""


def test_a_setting_may_lie_in_an_object_or_a_mapping() -> None:
    processor = SimpleNamespace(image_processor=SimpleNamespace(size={"height": 3}), patch=None)
    assert helper._setting(processor, "image_processor.size.height") == 3
    assert helper._setting(processor, "image_processor.size.width") is None
    assert helper._setting(processor, "patch.size") is None


@pytest.mark.parametrize(
    ("value", "plain"),
    [(None, True), ("a", True), (2.5, True), ([1, "a", None], True), ([(1, 2)], True), ([[[1]]], False), ({}, False),
     ([{}], False), ([1, [{}]], False)],
)  # fmt: skip
def test_plain_values_are_lists_of_lists_at_most(value: object, plain: bool) -> None:
    assert helper._plain(value) is plain


def test_a_template_writes_a_text_of_bounded_length() -> None:
    def writing(prompt: Any) -> Any:
        return SimpleNamespace(apply_chat_template=lambda messages, add_generation_prompt: prompt)

    assert helper._render(writing("x" * MAX_CHARACTERS), "a") == "x" * MAX_CHARACTERS
    for prompt in ("x" * (MAX_CHARACTERS + 1), [1, 2]):
        with pytest.raises(ValueError, match=f"more than {MAX_CHARACTERS:,} characters"):
            helper._render(writing(prompt), "a")


@pytest.mark.parametrize(
    ("size", "merges", "message"),
    [
        ({"height": helper.LARGEST_SIDE, "width": 1}, False, ""),
        ({"height": helper.LARGEST_SIDE + 1}, False, "size.height of its pictures: 8193 exceeds the limit of 8192"),
        ({"longest_edge": helper.LARGEST_SIDE**2}, True, ""),
        ({"longest_edge": helper.LARGEST_SIDE**2 + 1}, True, "exceeds the limit of 67108864"),
        ({"shortest_edge": 0}, True, "size.shortest_edge of its pictures: 0 is below 1"),
        (None, False, ""),
        ({"height": "x"}, False, ""),
    ],
)
def test_sizes_of_pictures_have_limits(size: object, merges: bool, message: str) -> None:
    processor = SimpleNamespace(size=size, **({"merge_size": 2} if merges else {}))
    if not message:
        helper._refuse_sizes(processor)
        return
    with pytest.raises(ValueError, match=message):
        helper._refuse_sizes(processor)


class Pictures:
    """A processor that writes `tokens` per picture; its pixels are the picture's size, or `pixels`."""

    def __init__(self, tokens: int = 2, pixels: Any = None) -> None:
        self.tokens, self.pixels = tokens, pixels
        self.image_processor = SimpleNamespace(size={})
        self.tokenizer = SimpleNamespace(eos_token="!")
        self.calls: list[dict[str, Any]] = []

    def __call__(self, images: Any, text: Any, return_tensors: str, **more: Any) -> dict[str, Any]:
        self.calls.append({"images": images, "text": text, **more})
        width = max(len(words) for words in text) + self.tokens
        ids = [[4] * self.tokens + [5] * len(words) for words in text]
        padded = [row + [0] * (width - len(row)) for row in ids]
        sizes = [image[0].size if isinstance(image, list) else image.size for image in images]
        pixels = [np.zeros((1, *size)) for size in sizes]
        alike = len({pixel.shape for pixel in pixels}) == 1
        stacked: Any = np.stack(pixels) if alike else np.empty(2, dtype=object)
        return {"input_ids": np.array(padded), "pixel_values": stacked if self.pixels is None else self.pixels}


def test_pictures_are_encoded_alone_and_in_padded_batches() -> None:
    processor = Pictures()
    encoded = helper._encode(processor, "ab", nested=False, varying=False)
    assert (encoded["tokens"], encoded["pixels"]) == ([4, 4, 5, 5], [1, 1, 48, 36])
    alone, left, right = processor.calls
    assert (len(alone["images"]), alone["text"]) == (1, ["ab"])
    assert (left["padding_side"], right["padding_side"], left["padding"]) == ("left", "right", True)
    assert left["text"] == ["ab", f"ab {PROBES[1]}!"]
    assert [picture.size for picture in left["images"]] == [(48, 36)] * 2
    assert len(encoded["padded"]) == 4
    nested = Pictures()
    with pytest.raises(ValueError, match="pixels of two shapes"):
        helper._encode(nested, "ab", nested=True, varying=True)
    assert [[picture.size for picture in row] for row in nested.calls[1]["images"]] == [[(48, 36)], [helper.TALL]]


def test_a_processor_needs_a_tokenizer_and_an_image_processor(monkeypatch: pytest.MonkeyPatch) -> None:
    for parts in ({"tokenizer": 1}, {"image_processor": 1}):
        monkeypatch.setattr(helper, "_load", lambda folder, state, parts=parts: SimpleNamespace(**parts))
        assert "tokenizer or the image processor is missing" in helper.answer(request())["reason"]


def test_sizes_are_refused_before_a_picture_is_scaled() -> None:
    processor = Pictures()
    processor.image_processor.size = {"height": 0}
    with pytest.raises(ValueError, match=r"size\.height"):
        helper._encode(processor, "ab", nested=False, varying=False)
    assert processor.calls == []


def test_encoded_pictures_have_limits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(helper, "MAX_TOKENS", 4)
    helper._encode(Pictures(), "ab", nested=False, varying=False)
    with pytest.raises(ValueError, match="more than 4 tokens from one picture"):
        helper._encode(Pictures(), "abc", nested=False, varying=False)
    with pytest.raises(ValueError, match="not finite"):
        helper._encode(Pictures(pixels=np.array([np.nan])), "ab", nested=False, varying=False)


def test_tokens_of_a_typical_picture_are_counted() -> None:
    for nested in (False, True):
        processor = Pictures(tokens=3)
        assert helper._typical_tokens(processor, "abcde", nested, marker=4) == 3
        (image,) = processor.calls[0]["images"]
        assert (image[0] if nested else image).size == helper.TYPICAL
