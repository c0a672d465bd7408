"""Readers of official layouts: what they read, and that nothing that is wrong with a file goes unsaid."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from PIL import Image

from exporter import data
from exporter.data import CONVENTIONS, DATA, LAYOUTS, SourceSpec, hub, place, places, samples_from
from exporter.data.tasks.sample import Sample
from exporter.errors import DataError
from exporter.model.families import FAMILIES
from tests import layouts


def read(name: str, path: Path, task: str = "captioning", split: str = "test", limit: int = 99) -> list[Sample]:
    return data.samples(name, path, task, split, limit, 0)


def problems(name: str, path: Path, task: str = "captioning") -> list[str]:
    """The lines of the error, each one problem."""
    with pytest.raises(DataError) as caught:
        read(name, path, task)
    head, *lines = caught.value.message.splitlines()
    assert f"has {len(lines)} problem" in head
    return [line.strip() for line in lines]


def test_coco(tmp_path: Path) -> None:
    layouts.coco(tmp_path)
    layouts.coco(tmp_path, 2, "train2017")
    by_identity = {s.identity: s for s in read("coco", tmp_path)}
    assert by_identity.keys() == {"1", "2", "3", "4"}
    assert by_identity["3"].references == tuple(f"Caption {k} of picture 3.\n" for k in range(5))
    assert by_identity["3"].question is None
    assert by_identity["3"].image().size == (12, 9)
    assert len(read("coco", tmp_path, split="train")) == 2


def test_coco_of_2014_is_read_when_it_is_all_there_is(tmp_path: Path) -> None:
    layouts.coco(tmp_path, 3, "val2014")
    assert len(read("coco", tmp_path)) == 3
    layouts.coco(tmp_path, 2, "val2017")
    assert len(read("coco", tmp_path)) == 2


def test_flickr30k(tmp_path: Path) -> None:
    layouts.flickr30k(tmp_path)
    for split, numbers in (("train", "01"), ("validation", "23"), ("test", "45")):
        assert {s.identity for s in read("flickr30k", tmp_path, split=split)} == {f"100{i}.jpg" for i in numbers}
    rows = read("flickr30k", tmp_path, "retrieval")
    assert sorted(rows, key=lambda s: s.identity)[0].references == tuple(f"a dog, {k} of 4" for k in range(5))


def test_vqav2_keeps_ten_answers_and_puts_the_most_common_first(tmp_path: Path) -> None:
    layouts.vqav2(tmp_path)
    by_identity = {s.identity: s for s in read("vqav2", tmp_path, "vqa")}
    assert by_identity.keys() == {"42000", "42001", "73002"}
    assert by_identity["42001"].references == ("2",) * 7 + ("3",) * 3
    assert (by_identity["42001"].question, by_identity["42001"].kind) == ("Question 1?", "number")


def test_vqav2_also_as_its_own_tools_lay_it_out(tmp_path: Path) -> None:
    layouts.vqav2(tmp_path)
    for old, new in (
        ("v2_OpenEnded_mscoco_val2014_questions.json", "Questions"),
        ("v2_mscoco_val2014_annotations.json", "Annotations"),
        ("val2014", "Images/mscoco"),
    ):
        (tmp_path / new).mkdir(parents=True)
        (tmp_path / old).rename(tmp_path / new / old)
    assert len(read("vqav2", tmp_path, "vqa")) == 3


def test_gqa(tmp_path: Path) -> None:
    layouts.gqa(tmp_path)
    by_identity = {s.identity: s for s in read("gqa", tmp_path, "vqa")}
    assert by_identity.keys() == {"200", "201", "202"}
    assert (by_identity["201"].question, by_identity["201"].references, by_identity["201"].kind) == (
        "Is it 1?",
        ("left",),
        "choose",
    )


def test_chartqa_reads_both_files_of_a_split(tmp_path: Path) -> None:
    layouts.chartqa(tmp_path)
    found = {s.identity: s for s in read("chartqa", tmp_path, "vqa")}
    assert found.keys() == {"human-0", "human-1", "augmented-0"}
    assert (found["augmented-0"].question, found["augmented-0"].references) == ("What is the share?", ("25%",))
    assert {s.kind for s in found.values()} == {"human", "augmented"}
    assert {s.metrics for s in found.values()} == {("relaxed_accuracy",)}
    assert found["human-1"].file == "test/png/2.png"
    layouts.chartqa(tmp_path / "whole" / "ChartQA Dataset", "val")
    assert len(read("chartqa", tmp_path / "whole", "vqa", "validation")) == 3
    (tmp_path / "test" / "test_augmented.json").unlink()  # half of the test set is not the test set
    with pytest.raises(DataError, match=r"has no questions: looked for test/test_augmented\.json"):
        read("chartqa", tmp_path, "vqa")


@pytest.mark.parametrize("pages", ["documents", "spdocvqa_images", "images"])
def test_docvqa_in_the_layouts_of_its_archives(tmp_path: Path, pages: str) -> None:
    layouts.docvqa(tmp_path)
    (tmp_path / "documents").rename(tmp_path / pages)
    (tmp_path / "qas").mkdir()
    (tmp_path / "val_v1.0_withQT.json").rename(tmp_path / "qas" / "val_v1.0_withQT.json")
    found = {s.identity: s for s in read("docvqa", tmp_path, "vqa")}
    assert found.keys() == {"49150", "49151"}
    assert (found["49151"].references, found["49151"].kind) == (("Coca Cola", "Coca"), "table/list, layout")
    assert found["49150"].metrics == ("anls",)
    assert found["49150"].file == f"{pages}/page_0.png"


def test_rows_of_a_folder_may_name_a_metric(tmp_path: Path) -> None:
    layouts.picture(tmp_path / "test" / "1.png")
    row = {"file_name": "1.png", "question": "How many?", "answer": "12", "metric": "relaxed_accuracy"}
    metadata = tmp_path / "test" / "metadata.jsonl"
    metadata.write_text(json.dumps(row))
    assert read("folder", tmp_path, "vqa")[0].metrics == ("relaxed_accuracy",)
    metadata.write_text(json.dumps(row | {"metric": "anls2"}))
    assert problems("folder", tmp_path, "vqa") == [
        "test/metadata.jsonl:1: `metric` must be one of anls, relaxed_accuracy, accuracy, not 'anls2'"
    ]


# Damage: layout, file to change, change of its content, the task, expected messages.
def _drop(key: str, index: int, field: str) -> Callable[[Any], None]:
    return lambda content: content[key][index].pop(field)


def _set(key: str, index: int, field: str, value: Any) -> Callable[[Any], None]:
    return lambda content: content[key][index].update({field: value})


COCO = "annotations/captions_val2017.json"
FLICKR = "dataset_flickr30k.json"
QUESTIONS, ANSWERED = "v2_OpenEnded_mscoco_val2014_questions.json", "v2_mscoco_val2014_annotations.json"
CHARTS, PAGES = "test/test_human.json", "val_v1.0_withQT.json"
GQA = "questions1.2/testdev_balanced_questions.json"
DAMAGE: list[tuple[str, str, Callable[[Any], None], list[str]]] = [
    ("coco", COCO, _set("images", 0, "id", 2), ["image id 2 occurs 2 times", *["image_id 1 is not in the list"] * 5]),
    ("coco", COCO, _set("annotations", 0, "id", 200), ["annotation id 200 occurs 2 times"]),
    (
        "coco",
        COCO,
        _drop("images", 3, "file_name"),
        ["images[3]: `file_name` must", *["image_id 4 is not in the list"] * 5],
    ),
    ("coco", COCO, _set("images", 0, "file_name", "../x.jpg"), ["must stay in the folder"]),
    ("coco", COCO, _set("annotations", 1, "caption", 3), ["image 2: captions must be strings"]),
    ("coco", COCO, lambda c: c["annotations"].__delitem__(slice(0, None, 4)), ["image 1: no caption"]),
    ("flickr30k", FLICKR, _set("images", 5, "filename", "1004.jpg"), ["filename 1004.jpg occurs 2 times"]),
    ("flickr30k", FLICKR, _set("images", 0, "split", "tset"), ["images[0]: split 'tset' is not one of"]),
    ("flickr30k", FLICKR, _set("images", 4, "sentences", []), ["images[4]: `sentences` must be"]),
    ("vqav2", QUESTIONS, _set("questions", 1, "question_id", 42000), ["42000 occurs 2 times", "42001 is not in"]),
    (
        "vqav2",
        ANSWERED,
        _set("annotations", 0, "image_id", 9),
        ["42000: image_id is 9, but the question has image_id 42"],
    ),
    ("vqav2", ANSWERED, lambda c: c["annotations"][2]["answers"].pop(), ["73002: `answers` must be a list of 10"]),
    ("vqav2", ANSWERED, lambda c: c["annotations"].pop(), ["73002: no answers in"]),
    ("vqav2", QUESTIONS, _set("questions", 0, "question", " "), ["42000: `question` must be a non-empty string"]),
    ("chartqa", CHARTS, lambda c: c[1].pop("query"), ["test_human.json: [1]: `query` must be a non-empty string"]),
    ("chartqa", CHARTS, lambda c: c[0].update(label=True), ["[0]: `label` must be a non-empty string or a number"]),
    ("chartqa", CHARTS, lambda c: c[0].update(imgname="../../x"), ["must stay in the folder"]),
    ("docvqa", PAGES, _set("data", 1, "questionId", 49150), ["questionId 49150 occurs 2 times"]),
    ("docvqa", PAGES, _drop("data", 0, "answers"), ["data[0]: `answers` must be a list (those of the test split"]),
    ("docvqa", PAGES, _set("data", 0, "answers", [""]), ["data[0]: answers must be strings, and at least one"]),
    ("docvqa", PAGES, _set("data", 1, "question_types", [3]), ["data[1]: `question_types` must be a list"]),
    ("gqa", GQA, lambda c: c["200"].pop("answer"), ["200: `answer` must be a non-empty string"]),
    ("gqa", GQA, lambda c: c["200"].update(types={}), ["200: `structural` must be a non-empty string"]),
    ("gqa", GQA, lambda c: c.update({"200": 4}), ["200: not an object"]),
    ("gqa", GQA, lambda c: c["202"].update(imageId="../../x"), ["must stay in the folder"]),
]


@pytest.mark.parametrize(("name", "file", "change", "said"), DAMAGE, ids=[f"{d[0]}: {d[3][0]}" for d in DAMAGE])
def test_every_problem_names_its_file_and_position(
    tmp_path: Path, name: str, file: str, change: Callable[[Any], None], said: list[str]
) -> None:
    getattr(layouts, name)(tmp_path)
    content = json.loads((tmp_path / file).read_text())
    change(content)
    layouts.write(tmp_path / file, content)
    lines = problems(name, tmp_path, CONVENTIONS[name].tasks[0])
    assert len(lines) == len(said)
    for line, text in zip(sorted(lines), sorted(said, key=lambda t: next(x for x in lines if t in x)), strict=True):
        assert text in line
        assert Path(file).name in line or "is not in" in line


@pytest.mark.parametrize("name", CONVENTIONS)
def test_every_missing_picture_is_reported_once(tmp_path: Path, name: str) -> None:
    getattr(layouts, name)(tmp_path)
    task = CONVENTIONS[name].tasks[0]
    pictures = sorted(path for path in tmp_path.rglob("*") if path.suffix in (".jpg", ".png"))[-2:]
    for file in pictures:
        file.unlink()
    lines = problems(name, tmp_path, task)
    assert len(lines) == 2
    assert all(any(f"no picture '{file.relative_to(tmp_path)}'" in line for line in lines) for file in pictures)
    outside = layouts.picture(tmp_path.parent / "outside.jpg")
    for file in pictures:
        file.symlink_to(outside)
    assert ["is a link to a file outside the folder" in line for line in problems(name, tmp_path, task)] == [True, True]


@pytest.mark.parametrize("name", CONVENTIONS)
def test_a_truncated_wrong_or_missing_file_is_reported(tmp_path: Path, name: str) -> None:
    getattr(layouts, name)(tmp_path)
    task = CONVENTIONS[name].tasks[0]
    file = max(tmp_path.rglob("*.json"), key=lambda f: "annotations" in f.name)
    whole = file.read_text()
    for content, message in ((whole[: len(whole) // 2], "is not JSON"), ("[1]", "official file")):
        file.write_text(content)
        with pytest.raises(DataError) as caught:
            read(name, tmp_path, task)
        assert message in f"{caught.value.message} {caught.value.hint}"
        assert str(file) in caught.value.message
    file.write_bytes(b'{"a": "\xff"}')
    with pytest.raises(DataError, match="not UTF-8"):
        read(name, tmp_path, task)
    file.unlink()
    with pytest.raises(DataError, match=f"looked for .*{file.name}") as caught:
        read(name, tmp_path, task)
    assert CONVENTIONS[name].layout in str(caught.value.hint)


def test_two_equal_ids_of_gqa_are_not_one(tmp_path: Path) -> None:
    layouts.gqa(tmp_path)
    file = tmp_path / GQA
    file.write_text(file.read_text().replace('"201": {', '"200": {'))
    assert any("key 200 occurs 2 times" in line for line in problems("gqa", tmp_path, "vqa"))


@pytest.mark.parametrize("name", CONVENTIONS)
def test_tasks_and_splits_are_those_of_the_convention(tmp_path: Path, name: str) -> None:
    getattr(layouts, name)(tmp_path)
    convention = CONVENTIONS[name]
    other = next(task for task in ("captioning", "vqa") if task not in convention.tasks)
    with pytest.raises(DataError, match=f"{name} does not support task {other}"):
        read(name, tmp_path, other)
    with pytest.raises(DataError, match="has no split 'tes'"):
        read(name, tmp_path, convention.tasks[0], "tes")
    with pytest.raises(DataError, match="needs a folder") as caught:
        data.samples(name, None, convention.tasks[0], "test", 5, 0)
    assert f"--data {name}:PATH" in str(caught.value.hint)
    assert name in DATA
    assert convention.name == name
    assert {"train", "test"} <= set(convention.splits)
    assert len(convention.license) > 20
    assert set(convention.metrics) == set(convention.tasks)


def test_prompts_of_the_conventions_are_those_of_the_families() -> None:
    for family in FAMILIES.values():
        for convention in CONVENTIONS.values():
            if family.name in convention.prompts:
                prompt = family.caption_prompt if "vqa" not in convention.tasks else family.question_prompt
                assert convention.prompts[family.name] == prompt


def test_places_are_written_with_a_name_a_path_or_both(tmp_path: Path) -> None:
    assert place("coco:/data/coco") == SourceSpec("coco", Path("/data/coco"))
    assert place("demo") == SourceSpec("demo")
    assert place("./images") == place(Path("images")) == SourceSpec("folder", Path("images"))
    assert place("folder:/data/a:b") == SourceSpec("folder", Path("/data/a:b"))
    assert place("hub:org/name@abc").path == Path("org/name@abc")
    assert str(place("coco:/secret/place/coco")) == "coco coco"
    assert places(None) == ()
    assert places("demo") == places(["demo"]) == (SourceSpec("demo"),)
    with pytest.raises(DataError, match="Did you mean 'coco'"):
        place("cocoo:/data")
    (tmp_path / "odd:name").mkdir()
    assert place(tmp_path / "odd:name") == SourceSpec("folder", tmp_path / "odd:name")


def test_each_task_takes_the_source_that_has_it(tmp_path: Path) -> None:
    layouts.coco(tmp_path / "c")
    layouts.vqav2(tmp_path / "v")
    layouts.gqa(tmp_path / "g")
    both = places([f"coco:{tmp_path / 'c'}", f"vqav2:{tmp_path / 'v'}"])
    assert len(samples_from(both, "captioning", "test", 9, 0)) == 4
    assert len(samples_from(both, "vqa", "test", 9, 0)) == 3
    with pytest.raises(DataError, match="coco does not support task vqa"):
        samples_from(both[:1], "vqa", "test", 9, 0)
    with pytest.raises(DataError, match="vqav2, gqa all support task vqa"):
        samples_from([*both, place(f"gqa:{tmp_path / 'g'}")], "vqa", "test", 9, 0)


def parquet(root: Path, name: str, rows: list[dict[str, Any]], split: str = "test") -> Path:
    """A data set as the hub stores it: `data/test-00000-of-00001.parquet` with a column of pictures."""
    datasets = pytest.importorskip("datasets")
    (root / name / "data").mkdir(parents=True)
    dataset = datasets.Dataset.from_list(rows)
    if "image" in rows[0]:
        dataset = dataset.cast_column("image", datasets.Image())
    dataset.to_parquet(root / name / "data" / f"{split}-00000-of-00001.parquet")
    return root / name


def rows_of(root: Path, count: int, **columns: Callable[[int], Any]) -> list[dict[str, Any]]:
    files = [layouts.picture(root / "files" / f"{i}.png", i) for i in range(count)]
    return [
        {"image": {"bytes": f.read_bytes(), "path": None}, **{key: make(i) for key, make in columns.items()}}
        for i, f in enumerate(files)
    ]


@pytest.fixture
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "SLEEP_TIME_ON_THREADS_SHUTDOWN", 0)  # 5 s after every stream
    monkeypatch.setenv("MMQ_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def test_hub_rows_are_streamed_once_kept_and_checked(
    tmp_path: Path, own_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    answers = [{"answer": "yes", "answer_id": n} for n in range(10)]
    columns: dict[str, Callable[[int], Any]] = {
        "question_id": lambda i: i,
        "question": lambda i: f"q{i}",
        "answers": lambda i: answers,
        "answer_type": lambda i: "yes/no",
    }
    folder = parquet(tmp_path, "set", rows_of(tmp_path, 8, **columns))
    samples = read("hub", folder, "vqa", limit=5)
    assert len(samples) == 5
    assert all(s.question == f"q{s.identity}" and s.references == ("yes",) * 10 and s.kind == "yes/no" for s in samples)
    assert samples[0].image().getpixel((0, 0)) == (int(samples[0].identity) * 7, 255 - int(samples[0].identity), 7)
    monkeypatch.setattr(hub, "stream", None)  # from here on only what was kept
    assert [s.identity for s in read("hub", folder, "vqa", limit=5)] == [s.identity for s in samples]
    cached = next(own_cache.rglob("*.png"))
    cached.write_bytes(cached.read_bytes() + b"x")
    with pytest.raises(DataError, match="its files changed since the download"):
        read("hub", folder, "vqa", limit=5)


def test_hub_captions_and_what_is_missing(tmp_path: Path, own_cache: Path) -> None:
    folder = parquet(tmp_path, "captions", rows_of(tmp_path, 3, caption=lambda i: [f"c{i}", "d"]), "val")
    samples = read("hub", folder, limit=9)
    assert sorted(s.references for s in samples) == [(f"c{i}", "d") for i in range(3)]
    with pytest.raises(DataError, match="has no column for question"):
        read("hub", folder, "vqa")
    with pytest.raises(DataError, match="none of the splits train"):
        read("hub", folder, split="train")
    bare = parquet(tmp_path, "bare", [{"caption": "c"}])
    with pytest.raises(DataError, match="has no column for image"):
        read("hub", bare)
    with pytest.raises(DataError, match="no folder"):
        read("hub", tmp_path / "absent")
    with pytest.raises(DataError, match="org/none cannot be read"):  # no test reaches the network
        read("hub", Path("org/none"))
    assert not list(own_cache.rglob("part-*"))


def test_a_folder_of_parquet_files_that_changed_is_read_again(tmp_path: Path, own_cache: Path) -> None:
    rows = rows_of(tmp_path, 3, caption=lambda i: "c", id=lambda i: i)
    folder = parquet(tmp_path, "at@home", [*rows, {**rows[0], "id": 1}, {**rows[0], "caption": " "}])
    for _ in range(2):  # nothing that is broken is kept
        with pytest.raises(DataError, match=f"^hub data set {folder} has 2 problems") as caught:
            read("hub", folder)
        assert "part-" not in caught.value.message
        assert list(own_cache.rglob("*")) == [own_cache / "hub"]
    file = next(folder.rglob("*.parquet"))
    changed = parquet(tmp_path, "again", rows)
    file.write_bytes(next(changed.rglob("*.parquet")).read_bytes())
    assert len(read("hub", folder)) == 3
    before = file.stat()
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns + 1))
    assert len(read("hub", folder)) == 3
    assert len(list(own_cache.glob("hub/*"))) == 2


def test_the_commit_of_a_hub_set_is_read_and_recorded(
    tmp_path: Path, own_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows, requested = rows_of(tmp_path, 2, caption=lambda i: f"c{i}"), []

    def streamed(repo: str, revision: str | None, *rest: object) -> list[dict[str, Any]]:
        requested.append((repo, revision))
        return rows

    def info(self: object, repo: str, revision: str | None, timeout: float) -> SimpleNamespace:
        return SimpleNamespace(sha=f"commit of {repo} {revision}")

    monkeypatch.setattr(hub, "stream", streamed)
    assert len(read("hub", Path("org/name@v1"))) == 2  # the hub cannot be reached
    monkeypatch.setattr("huggingface_hub.HfApi.dataset_info", info)
    assert len(read("hub", Path("org/name@v1"))) == 2  # what was kept
    assert len(read("hub", Path("org/name"))) == 2
    assert requested == [("org/name", "v1"), ("org/name", "commit of org/name None")]
    origins = [json.loads(file.read_text()) for file in own_cache.rglob(hub.ORIGIN)]
    assert sorted(origins, key=lambda origin: str(origin["revision"])) == [
        {"repo": "org/name", "revision": None, "commit": "commit of org/name None"},
        {"repo": "org/name", "revision": "v1", "commit": None},
    ]


def test_known_copies_have_the_splits_they_say() -> None:
    assert set(hub.HUB_DATASETS) == set(CONVENTIONS) - {"chartqa", "docvqa"}
    with pytest.raises(DataError, match="mmq has no address for docvqa on the hub") as caught:
        data.samples("hub", Path("docvqa"), "vqa", "test", 4, 0)
    assert "use docvqa:FOLDER" in str(caught.value.hint)
    with pytest.raises(DataError, match="hub:vqav2 has no split 'train'"):
        hub.samples(Path("vqav2"), "vqa", "train", 5, 0)
    assert place("hub:vqav2").tasks == ("vqa",)


def test_every_source_is_described_once() -> None:
    assert sorted(DATA) == sorted([*CONVENTIONS, *LAYOUTS])
    for name, described in {**CONVENTIONS, **LAYOUTS}.items():
        assert described.name == name
        assert described.tasks == SourceSpec(name).tasks or name == "hub"


def test_the_examples_of_layouts_are_read(tmp_path: Path) -> None:
    """`mmq datasets folder` and `mmq datasets llava` show content that works."""
    for name in ("0001.jpg", "0002.jpg"):
        Image.new("RGB", (8, 8)).save(tmp_path / name)
    (tmp_path / "metadata.jsonl").write_text(LAYOUTS["folder"].example)
    (tmp_path / "talks.json").write_text(LAYOUTS["llava"].example)
    read = {
        (source, task): [sample for split in ("train", "test") for sample in _if_any(source, task, split)]
        for source, task in ((str(tmp_path), "captioning"), (str(tmp_path), "vqa"), (f"{tmp_path}/talks.json", "vqa"))
    }
    assert [[sample.references for sample in samples] for samples in read.values()] == [
        [("a dog on a beach",)],
        [("red",)],
        [("a dog",)],
    ]


def _if_any(source: str, task: str, split: str) -> list[Sample]:
    """The samples of a split; none when the source has none."""
    try:
        return samples_from((place(source),), task, split, 9, 0)
    except DataError:
        return []
