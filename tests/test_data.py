"""Data folders: what is read, what is chosen, and every problem in one message."""

import base64
import io
import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageDraw, ImageEnhance, ImageFilter, ImageOps

from exporter import data
from exporter.data import Trace, check_disjoint, folder, image_key, traces
from exporter.data.overlap import LookIndex
from exporter.data.picture_features import Look, is_copy, look
from exporter.data.rows import open_picture
from exporter.data.tasks.sample import Sample
from exporter.errors import DataError
from tests.slow import some


def picture(path: Path, shade: int = 0, size: tuple[int, int] = (5, 3)) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, (shade, 255 - shade, 7)).save(path)
    return path


def metadata(path: Path, *lines: dict[str, Any] | str) -> None:
    path.mkdir(parents=True, exist_ok=True)
    texts = [line if isinstance(line, str) else json.dumps(line) for line in lines]
    (path / "metadata.jsonl").write_text("\n".join(texts), encoding="utf-8")


def read(path: Path, task: str = "captioning", split: str = "train", limit: int = 99, seed: int = 0) -> list[Sample]:
    return folder.samples(path, task, split, limit, seed)


def split_folder(path: Path, count: int = 6) -> Path:
    """A train folder whose lines carry a caption and a question each."""
    for i in range(count):
        picture(path / "train" / f"{i}.png", i)
    lines = [
        {"file_name": f"{i}.png", "caption": f"c{i}", "question": f"q{i}", "answers": ["a", f"b{i}"], "kind": "k"}
        for i in range(count)
    ]
    metadata(path / "train", *lines)
    return path


def test_a_line_serves_both_tasks(tmp_path: Path) -> None:
    split_folder(tmp_path)
    captions = {s.identity: s for s in read(tmp_path)}
    questions = {s.identity: s for s in read(tmp_path, "vqa")}
    assert len(captions) == len(questions) == 6
    assert captions["train/2.png"].references == ("c2",)
    assert captions["train/2.png"].question is None
    second_question = questions["train/2.png: q2"]
    assert (second_question.question, second_question.references, second_question.kind) == ("q2", ("a", "b2"), "k")
    assert second_question.image().getpixel((0, 0)) == (2, 253, 7)


def test_choice_depends_on_the_seed_and_not_on_the_order_of_lines(tmp_path: Path) -> None:
    split_folder(tmp_path, 30)
    identities = [s.identity for s in read(tmp_path, limit=8)]
    assert len(identities) == 8
    assert [s.identity for s in read(tmp_path, limit=5)] == identities[:5]
    assert [s.identity for s in read(tmp_path, limit=8, seed=1)] != identities
    file = tmp_path / "train" / "metadata.jsonl"
    file.write_text("\n".join(reversed(file.read_text().splitlines())) + "\n\n")
    assert [s.identity for s in read(tmp_path, limit=8)] == identities


def test_own_ids_and_several_lines_for_a_picture(tmp_path: Path) -> None:
    picture(tmp_path / "train" / "in" / "a.png")
    row = {"file_name": "in/a.png", "answer": "x"}
    metadata(tmp_path / "train", row | {"question": "q"}, row | {"question": "r"}, row | {"question": "q", "id": 7})
    assert {s.identity for s in read(tmp_path, "vqa")} == {"train/in/a.png: q", "train/in/a.png: r", "7"}


def test_a_folder_without_splits_is_halved_by_picture(tmp_path: Path) -> None:
    for i in range(9):
        picture(tmp_path / f"{i}.png", i)
    metadata(tmp_path, *({"file_name": f"{i % 9}.png", "captions": ["c"], "id": str(i)} for i in range(18)))
    train, test = read(tmp_path), read(tmp_path, split="test")
    assert (len(train), len(test)) == (10, 8)
    check_disjoint(traces(train), test)
    with pytest.raises(DataError, match="no validation split"):
        read(tmp_path, split="validation")


def test_pictures_alone_can_be_calibrated_on_and_nothing_else(tmp_path: Path) -> None:
    for i in range(3):
        picture(tmp_path / "deep" / f"{i}.jpg", i)
    (tmp_path / "notes.txt").write_text("no picture")
    pictures = read(tmp_path)
    assert sorted(s.identity for s in pictures) == ["deep/0.jpg", "deep/1.jpg", "deep/2.jpg"]
    assert {s.references for s in pictures} == {()}
    assert data.notes(pictures)[0].startswith("3 of 3 calibration samples have no text")
    for task, split in (("vqa", "train"), ("captioning", "test")):
        with pytest.raises(DataError, match=r"no metadata\.jsonl") as caught:
            read(tmp_path, task, split)
        assert "calibration.tasks" in str(caught.value.hint)


def test_one_error_lists_all_problems_with_their_lines(tmp_path: Path) -> None:
    train = tmp_path / "train"
    picture(train / "good.png")
    picture(tmp_path.parent / "outside.png")
    (train / "link.png").symlink_to(tmp_path.parent / "outside.png")
    (train / "torn.png").write_bytes((train / "good.png").read_bytes()[:40])
    ok = {"file_name": "good.png", "caption": "c"}
    lines: list[tuple[dict[str, Any] | str, str | None]] = [
        (ok, None),
        ("{broken", "not JSON"),
        ("[1]", "not a JSON object"),
        ({"caption": "c"}, "`file_name` is missing"),
        (ok | {"file_name": "../../outside.png"}, "must stay in the folder"),
        (ok | {"file_name": str(tmp_path.parent / "outside.png")}, "must stay in the folder"),
        (ok | {"file_name": "link.png"}, "is a link to a file outside the folder"),
        (ok | {"file_name": "gone.png"}, "no picture 'train/gone.png'"),
        (ok, "is also on line 1"),
        ({"file_name": "good.png", "question": "q"}, "`question` needs `answer` or `answers`"),
        ({"file_name": "good.png", "answer": "a"}, "`question` needs `answer` or `answers`"),
        (ok | {"captions": ["d"], "id": "both"}, "`caption` or `captions`, not both"),
        (ok | {"caption": 3}, "`caption` must be a non-empty string"),
        ({"file_name": "good.png", "captions": []}, "must be a list of non-empty strings"),
        ({"file_name": "torn.png", "caption": "c"}, "cannot be read"),
    ]
    metadata(train, *(line for line, _ in lines))
    with pytest.raises(DataError) as caught:
        read(tmp_path)
    head, *problems = caught.value.message.splitlines()
    expected = {number: text for number, (_, text) in enumerate(lines, start=1) if text}
    assert head.endswith(f"has {len(expected)} problems")
    assert len(problems) == len(expected)
    for number, text in expected.items():
        line = next(entry for entry in problems if f"metadata.jsonl:{number}:" in entry)
        assert text in line


def test_a_long_list_of_problems_is_cut_and_counted(tmp_path: Path) -> None:
    metadata(tmp_path / "train", *(["{"] * 50))
    with pytest.raises(DataError, match="50 problems") as caught:
        read(tmp_path)
    assert caught.value.message.splitlines()[-1].strip() == "and 30 more"


def test_bytes_that_are_not_utf8_are_a_problem_of_their_line(tmp_path: Path) -> None:
    split_folder(tmp_path, 2)
    file = tmp_path / "train" / "metadata.jsonl"
    file.write_bytes(b"\xef\xbb\xbf" + file.read_bytes() + b'\n{"file_name": "\xff"}')  # a mark at the start is fine
    with pytest.raises(DataError, match=r"1 problem\n.*metadata\.jsonl:3: not UTF-8"):
        read(tmp_path)


def test_a_picture_with_too_many_pixels_is_not_decoded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    split_folder(tmp_path, 2)
    picture(tmp_path / "train" / "1.png", size=(40, 40))
    for limit in (1000, 500):  # Pillow warns above its limit and raises above twice as much
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)
        with pytest.raises(DataError, match=rf"1 problem\n.*:2: 'train/1\.png': it has more than {limit} pixels"):
            read(tmp_path)


def test_only_chosen_pictures_are_opened(tmp_path: Path) -> None:
    split_folder(tmp_path, 8)
    spare = read(tmp_path)[-1].identity
    (tmp_path / spare).write_bytes(b"junk")
    assert len(read(tmp_path, limit=7)) == 7
    with pytest.raises(DataError, match="cannot be read"):
        read(tmp_path, limit=8)


def test_pictures_are_turned_as_their_camera_says(tmp_path: Path) -> None:
    image = Image.new("RGB", (4, 2), "white")
    exif = image.getexif()
    exif[0x0112] = 6  # a quarter turn
    image.save(tmp_path / "a.jpg", exif=exif)
    assert read(tmp_path)[0].image().size == (2, 4)


def test_missing_fields_are_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no data folder"):
        read(tmp_path / "absent")
    with pytest.raises(DataError, match="neither"):
        read(tmp_path)
    split_folder(tmp_path)
    with pytest.raises(DataError, match=r"no folder 'test' \(it has train\)"):
        read(tmp_path, split="test")
    metadata(tmp_path / "train", {"file_name": "0.png", "caption": "c"})
    with pytest.raises(DataError, match="no line for task vqa, split train"):
        read(tmp_path, "vqa")


def test_sources_by_name(tmp_path: Path) -> None:
    split_folder(tmp_path)
    assert len(data.samples("folder", tmp_path, "captioning", "train", 3, 0)) == 3
    for name in data.DATA.keys() - set(data.BUILT_IN):
        with pytest.raises(DataError, match=f"data source {name} needs a folder"):
            data.samples(name, None, "captioning", "train", 3, 0)


@pytest.mark.parametrize("task", ["vqa", "captioning"])
def test_the_built_in_source_has_disjoint_splits(task: str) -> None:
    train, test = (data.samples("demo", None, task, split, 12, 0) for split in ("train", "test"))
    assert len(train) == len(test) == 12
    assert all(s.references and (s.question is None) == (task == "captioning") for s in train + test)
    assert [s.identity for s in data.samples("demo", None, task, "test", 12, 0)] == [s.identity for s in test]
    check_disjoint(traces(train), test)


def test_key_is_of_pixels_and_size(tmp_path: Path) -> None:
    image = Image.frombytes("RGB", (2, 3), bytes(range(18)))
    image.save(tmp_path / "a.png")
    image.save(tmp_path / "a.bmp")
    keys = {image_key(open_picture(tmp_path / name)) for name in ("a.png", "a.bmp")}
    assert keys == {image_key(image)}
    assert image_key(image) != image_key(Image.frombytes("RGB", (3, 2), bytes(range(18))))
    assert image_key(image) != image_key(Image.frombytes("RGB", (2, 3), struct.pack("18B", *range(17), 0)))


def flat(shade: int, identity: str) -> Sample:
    return Sample(identity, lambda: Image.new("RGB", (4, 4), (shade, 0, 0)), None, ("x",))


def test_shared_pictures_are_named_and_counted() -> None:
    calibration = [flat(i, f"train/{i}") for i in range(9)]
    check_disjoint(traces(calibration), [flat(i, f"test/{i}") for i in range(9, 30)])
    check_disjoint([], [])
    with pytest.raises(DataError, match="7 evaluation samples") as caught:
        check_disjoint(traces(calibration), [flat(i, f"test/{i}") for i in range(2, 30)])
    assert "test/2 (calibration sample train/2)" in caught.value.message
    assert "test/6" in caught.value.message
    assert "test/7" not in caught.value.message
    assert caught.value.message.endswith("and 2 more")


def textured(seed: int, size: tuple[int, int] = (320, 240)) -> Image.Image:
    """A picture with features at every scale, as photographs have."""
    rng = np.random.default_rng(seed)
    layers = [
        Image.fromarray(rng.integers(0, 256, (n, n, 3), np.uint8)).resize(size, Image.Resampling.BICUBIC)
        for n in (3, 6, 12, 24)
    ]
    picture = layers[0]
    for layer in layers[1:]:
        picture = Image.blend(picture, layer, 0.35)
    return ImageOps.autocontrast(picture, cutoff=2)


def compressed(image: Image.Image, quality: int) -> Image.Image:
    file = io.BytesIO()
    image.save(file, "JPEG", quality=quality)
    return Image.open(io.BytesIO(file.getvalue())).convert("RGB")


def alike(first: Look, second: Look) -> bool:
    """Whether the index takes two pictures for copies; agrees with the comparison of the two alone."""
    copy = bool(LookIndex([("", first)]).copies(second))
    assert copy == is_copy(first, second) == is_copy(second, first)
    return copy


def cropped(image: Image.Image, left: float, top: float, right: float, low: float) -> Image.Image:
    width, height = image.size
    return image.crop((round(left * width), round(top * height), round((1 - right) * width), round((1 - low) * height)))


COPIES: dict[str, Callable[[Image.Image], Image.Image]] = {
    "jpeg": lambda image: compressed(image, 75),
    "half": lambda image: image.resize((160, 120), Image.Resampling.BICUBIC),
    "twice": lambda image: compressed(image.resize((640, 480), Image.Resampling.BICUBIC), 80),
    "squeezed": lambda image: image.resize((224, 224), Image.Resampling.BILINEAR),
    "cropped": lambda image: cropped(image, 0.1, 0.1, 0.1, 0.1),
    "cropped at the left": lambda image: cropped(image, 0.08, 0.0, 0.0, 0.0),
    "gray": lambda image: image.convert("L").convert("RGB"),
    "darker": lambda image: ImageEnhance.Brightness(image).enhance(0.7),
    "other colors": lambda image: ImageOps.colorize(image.convert("L"), (30, 20, 60), (255, 220, 180)),
    "frame": lambda image: ImageOps.expand(image, 30, "black"),
    "bars": lambda image: ImageOps.expand(image, (0, 40), "white"),
    "all at once": lambda image: compressed(
        ImageOps.expand(ImageEnhance.Contrast(cropped(image, 0.04, 0.03, 0.05, 0.0)).enhance(1.3), 16, "white"), 60
    ),
}


@pytest.mark.parametrize("change", some(COPIES, ["half", "cropped", "other colors", "frame", "all at once"]))
def test_changed_copies_are_detected(change: str) -> None:
    for seed in range(8):
        original = textured(seed)
        copy = COPIES[change](original)
        assert image_key(copy) != image_key(original)
        assert alike(look(original), look(copy)), seed
        assert not alike(look(textured(seed + 100)), look(copy)), seed


def test_a_copy_under_another_name_stops_the_job() -> None:
    tested = [Sample(f"test/{i}", lambda i=i: textured(i), None, ("x",)) for i in range(4)]
    copied = Sample("train/a", lambda: compressed(textured(2), 80), None, ("x",))
    with pytest.raises(DataError, match=r"1 evaluation samples .*: test/2 \(looks like train/a\)"):
        check_disjoint(traces([copied]), tested)


def test_a_manifest_keeps_enough_to_find_copies() -> None:
    calibration = traces([Sample("train/a", lambda: textured(2), None, ("x",)), flat(7, "train/flat")])
    stored = json.loads(json.dumps([trace.as_json() for trace in calibration]))
    read = [Trace.from_json(entry) for entry in stored]
    assert max(len(json.dumps(entry)) for entry in stored) < 4300
    assert (read[0].look.thumbnails[0] == calibration[0].look.thumbnails[0]).all()
    assert [(entry.identity, entry.key) for entry in read] == [(entry.identity, entry.key) for entry in calibration]
    copy = Sample("test/b", lambda: compressed(textured(2), 80), None, ("x",))
    with pytest.raises(DataError, match=r"test/b \(looks like train/a\)"):
        check_disjoint(read, [copy])
    with pytest.raises(DataError, match=r"test/flat \(calibration sample train/flat\)"):
        check_disjoint(read, [flat(7, "test/flat")])
    for entry in stored:
        entry.pop("look", None)
    old = [Trace.from_json(entry) for entry in stored]  # a manifest of an older version: equal pixels alone
    check_disjoint(old, [copy])
    with pytest.raises(DataError, match="calibration sample train/a"):
        check_disjoint(old, [Sample("test/b", lambda: textured(2), None, ("x",))])


def test_looks_of_older_manifests_are_compared() -> None:
    soft = [textured(seed).filter(ImageFilter.GaussianBlur(12)) for seed in (2, 3)]
    small = np.asarray(soft[0].resize((16, 16), Image.Resampling.BOX))
    content = base64.b64encode(bytes(8) + small.tobytes()).decode()
    trace = Trace.from_json({"id": "train/a", "image": "0", "look": content})
    copy = Sample("test/b", lambda: compressed(soft[0], 80), None, ("x",))
    with pytest.raises(DataError, match=r"test/b \(looks like train/a\)"):
        check_disjoint([trace], [copy])
    check_disjoint([trace], [Sample("test/c", lambda: soft[1], None, ("x",))])


@pytest.mark.parametrize("damaged", ["?", "AAAA", 3])
def test_a_damaged_look_is_an_error_of_the_manifest(damaged: Any) -> None:
    with pytest.raises(DataError, match="look of sample a is damaged"):
        Trace.from_json({"id": "a", "image": "0", "look": damaged})


def test_a_drawing_in_other_colors_is_another_picture() -> None:
    """A pattern of little detail is no evidence: a question may be about its color."""

    def disc(color: str) -> Image.Image:
        picture = Image.new("RGB", (128, 128), "white")
        ImageDraw.Draw(picture).ellipse((30, 40, 80, 90), fill=color)
        return picture

    assert not look(disc("red")).rich
    assert not alike(look(disc("red")), look(disc("navy")))
    assert alike(look(disc("red")), look(compressed(disc("red"), 85)))
    assert alike(look(disc("red")), look(ImageOps.expand(disc("red"), 10, "black")))


def test_pictures_without_features_are_compared_by_their_pixels_alone() -> None:
    first, other = flat(200, "a").image(), flat(201, "b").image()
    assert not look(first).thumbnails
    assert not alike(look(first), look(other))
    assert not alike(look(first), look(first))


@pytest.mark.parametrize("count", [50, pytest.param(350, marks=pytest.mark.slow)])
def test_no_two_drawings_are_taken_for_copies(count: int) -> None:
    """Every pair of drawings, whose backgrounds are the same; bench/picture_copies.py compares 4 million pairs."""
    drawn = {
        image_key(p): look(p)
        for split in ("train", "test")
        for s in data.samples("demo", None, "captioning", split, count, 3)
        for p in [s.image()]
    }
    assert len(drawn) > 1.7 * count
    index = LookIndex(drawn.items())
    assert all(index.copies(own) == [key] for key, own in drawn.items())


@given(st.integers(0, 2**32), st.integers(40, 95))
@settings(max_examples=8)
def test_looking_alike_has_no_direction_and_holds_for_itself(seed: int, quality: int) -> None:
    first = textured(seed)
    other = compressed(first, quality)
    assert alike(look(first), look(first))
    assert alike(look(first), look(other)) == alike(look(other), look(first))
