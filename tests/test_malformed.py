"""Every value of every official file replaced by ones that do not belong there: an error in our words, or samples."""

import copy
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from exporter import data
from exporter.data import CONVENTIONS
from exporter.data.rows import SHOWN, load_json
from exporter.errors import DataError
from exporter.evaluation.score_file import read_answers
from tests import layouts
from tests.slow import some_of

BAD: dict[str, Any] = {
    "null": None,
    "list": [1],
    "object": {"a": 1},
    "fraction": 1.5,
    "negative": -1,
    "truth": True,
    "huge number": 10**4000,
    "empty": "",
    "NUL": "a\0b.jpg",
    "surrogate": "\ud800.jpg",
    "long name": "x" * 252 + ".jpg",  # 256 bytes, and file systems take 255
    "long path": "x/" * 3000 + "y.jpg",
    "absolute": "/etc/passwd",
    "above": "../../x.jpg",
    "folder": ".",
}
GONE = "gone"
FILES = {
    "coco": ("annotations/captions_val2017.json",),
    "flickr30k": ("dataset_flickr30k.json",),
    "vqav2": ("v2_OpenEnded_mscoco_val2014_questions.json", "v2_mscoco_val2014_annotations.json"),
    "gqa": ("questions1.2/testdev_balanced_questions.json",),
}
SPLITS = {"flickr30k": "train"}  # of the entry that is changed
NUMBERS = ("null", "list", "object", "fraction", "truth", "empty", GONE)  # what no id may be
NAMES = (*NUMBERS, "negative", "huge number", "NUL", "surrogate", "long name", "long path", "absolute", "above")
# Layout, key, and the values that must be refused there.
REFUSED = [
    *(("coco", key, NUMBERS) for key in ("id", "image_id")),
    ("coco", "file_name", (*NAMES, "folder")),
    ("flickr30k", "imgid", NUMBERS),
    ("flickr30k", "filename", (*NAMES, "folder")),
    *(("vqav2", key, NUMBERS) for key in ("image_id", "question_id")),
    ("vqav2", "question", ("surrogate", *NUMBERS)),
    ("gqa", "imageId", NAMES),
    ("gqa", "answer", ("surrogate", *NUMBERS)),
]


def places(content: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The way to every value of a file; of a list to the first one alone."""
    yield path
    inner = (
        content.items() if isinstance(content, dict) else enumerate(content[:1] if isinstance(content, list) else ())
    )
    for key, value in inner:
        yield from places(value, (*path, key))


def changed(content: Any, path: tuple[Any, ...], what: str) -> Any:
    if not path:
        return BAD.get(what)
    content = copy.deepcopy(content)
    holder = content
    for key in path[:-1]:
        holder = holder[key]
    if what == GONE:
        del holder[path[-1]]
    else:
        holder[path[-1]] = BAD[what]
    return content


def refusal(name: str, root: Path) -> str | None:
    """The message of the DataError, which must be printable, or None. Any other exception fails the test."""
    try:
        samples = data.samples(name, root, CONVENTIONS[name].tasks[0], SPLITS.get(name, "test"), 99, 0)
    except DataError as error:
        error.message.encode()
        return error.message
    for sample in samples:
        f"{sample.identity}{sample.question}{sample.references}".encode()
    return None


# Every value once, every data set with a value that is no id and one that is no path; the other pairs are slow.
FAST = {"flickr30k": {"null", "above"}, "vqav2": {"list", "surrogate", "empty"}, "gqa": {"truth", "absolute", GONE}}
PAIRS = {f"{name} {what}": (name, what) for name in FILES for what in (*BAD, GONE)}


@pytest.mark.parametrize(
    ("name", "what"), some_of(PAIRS, [key for key, (name, what) in PAIRS.items() if what in FAST.get(name, {what})])
)
def test_a_value_that_does_not_belong_there_is_a_data_error(tmp_path: Path, name: str, what: str) -> None:
    getattr(layouts, name)(tmp_path)
    messages: dict[str, list[str | None]] = {}
    for file in FILES[name]:
        whole = json.loads((tmp_path / file).read_text())
        for path in places(whole):
            layouts.write(tmp_path / file, json.dumps(changed(whole, path, what)))
            messages.setdefault(str(path[-1]) if path else "", []).append(refusal(name, tmp_path))
        layouts.write(tmp_path / file, whole)
    assert refusal(name, tmp_path) is None
    assert None not in messages[""]
    for layout, key, refused in REFUSED:
        if layout == name and what in refused:
            assert any(messages[key]), f"{key} may be {what}"


@pytest.mark.parametrize("name", ["coco", "flickr30k"])
def test_every_invalid_id_is_reported(tmp_path: Path, name: str) -> None:
    whole = getattr(layouts, name)(tmp_path)
    key = "annotations" if name == "coco" else "images"
    for entry in whole[key]:
        entry["id" if name == "coco" else "imgid"] = [1]
    layouts.write(tmp_path / FILES[name][0], whole)
    message = refusal(name, tmp_path) or ""
    assert message.count("must be a whole number or a non-empty string") == min(SHOWN, len(whole[key]))


def test_names_and_ids_of_a_data_folder(tmp_path: Path) -> None:
    layouts.picture(tmp_path / "test" / "a.png")
    for key in ("file_name", "id", "caption", "kind"):
        for what in (value for value in BAD if value not in ("null", "negative", "huge number")):
            line = {"file_name": "a.png", "caption": "c", key: BAD[what]}
            layouts.write(tmp_path / "test" / "metadata.jsonl", line)
            message = refusal_of_folder(tmp_path)
            if key == "file_name" or what in ("list", "object", "fraction", "truth", "empty", "surrogate"):
                assert message, (key, what)
                assert "metadata.jsonl:1" in message
    layouts.write(tmp_path / "test" / "metadata.jsonl", '{"file_name": "a.png", "id": 1' + "0" * 5000 + "}")
    assert "metadata.jsonl:1: not JSON" in (refusal_of_folder(tmp_path) or "")


def refusal_of_folder(root: Path) -> str | None:
    try:
        data.samples("folder", root, "captioning", "test", 9, 0)
    except DataError as error:
        error.message.encode()
        return error.message
    return None


def test_a_link_to_itself_and_a_file_name_that_is_no_text(tmp_path: Path) -> None:
    (tmp_path / "test").mkdir()
    (tmp_path / "test" / "a.png").symlink_to("a.png")
    layouts.write(tmp_path / "test" / "metadata.jsonl", {"file_name": "a.png", "caption": "c"})
    assert "a.png'" in (refusal_of_folder(tmp_path) or "")
    bare = tmp_path / "bare"
    layouts.picture(bare / "a.png").rename(bare / "\udcff.png")
    with pytest.raises(DataError, match="not UTF-8") as caught:
        data.samples("folder", bare, "captioning", "train", 9, 0)
    caught.value.message.encode()


@pytest.mark.parametrize("content", [{"\ud800": "x"}, {"1": "\ud800"}, [{"id": "\ud800", "answer": "x"}]])
def test_answers_that_cannot_be_written(tmp_path: Path, content: Any) -> None:
    with pytest.raises(DataError, match="1 invalid entries and 0 repeated ids: entry 0"):
        read_answers(layouts.write(tmp_path / "x.json", content))


@pytest.mark.parametrize("content", ["[" * 100_000, "1" * (sys.get_int_max_str_digits() + 1), "\xff", ""])
def test_json_that_python_cannot_read(tmp_path: Path, content: str) -> None:
    file = tmp_path / "x.json"
    file.write_bytes(content.encode("latin-1"))
    for read in (load_json, read_answers):
        with pytest.raises(DataError, match=r"x\.json is not"):
            read(file)
