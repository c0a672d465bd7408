"""`mmq data check` and `mmq plan --data`; metadata.csv, `text`, parquet, LLaVA's conversations, the hub's snapshots."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from exporter.commands.main import cli
from exporter.data import place, samples
from exporter.errors import DataError
from tests.layouts import picture, write


def run(*words: str) -> Result:
    return CliRunner().invoke(cli, words)


def images(folder: Path, count: int = 6) -> Path:
    """A folder of pictures with captions and questions."""
    lines = []
    for i in range(count):
        picture(folder / f"{i}.png", i, (64 + i, 48))
        lines.append({"file_name": f"{i}.png", "caption": f"picture {i}", "question": "what?", "answer": f"{i}"})
    write(folder / "metadata.jsonl", "\n".join(json.dumps(line) for line in lines))
    return folder


def test_counts_tasks_and_splits_and_a_page_with_pictures(tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    done = run("data", "check", str(images(tmp_path / "images")), "--samples", "2", "--page", str(page))
    assert done.exit_code == 0, done.output
    lines = [line.split() for line in done.stdout.splitlines()]
    assert ["captioning", "train", "3", "(2", "pictures", "decoded)"] in lines
    assert ["vqa", "test", "3", "(2", "pictures", "decoded)"] in lines
    assert ["vqa", "validation", "-"] in lines
    assert "Calibration and evaluation can use: captioning, vqa, retrieval; no unusable row." in done.stdout
    text = page.read_text()
    assert text.count('<img src="data:image/png;base64,') == 12
    assert "picture 3" in text
    printed = json.loads(run("data", "check", str(tmp_path / "images"), "--json").stdout)
    assert printed["tasks"] == {"captioning": True, "vqa": True, "retrieval": True}


def test_every_unusable_row_is_listed_once_with_its_line(tmp_path: Path) -> None:
    folder = images(tmp_path / "images", 30)
    with (folder / "metadata.jsonl").open("a") as file:
        file.write("\n{broken\n" + "\n".join(json.dumps({"file_name": f"no{i}.png", "caption": 1}) for i in range(25)))
    done = run("data", "check", str(folder), "--page", str(tmp_path / "page.html"))
    assert done.exit_code == 1
    bad = [line for line in done.stdout.splitlines() if line.startswith("unusable: ")]
    assert len(bad) == 26  # more than the twenty that an export's error lists
    assert bad[0].startswith("unusable: metadata.jsonl:31: not JSON")
    assert "has 26 unusable rows" in done.stderr
    assert "metadata.jsonl:56" in (tmp_path / "page.html").read_text()
    result = run("data", "check", str(folder), "--json")
    assert (result.exit_code, len(json.loads(result.stdout)["problems"])) == (1, 26)


def test_plan_reads_the_data_as_the_export_would(tmp_path: Path) -> None:
    folder = images(tmp_path / "images", 8)
    words = ["plan", "--recipe", "llava-w4-vit8", "--model", "demo-llava", "--device", "cpu"]
    done = run(*words, "--data", str(folder))
    assert done.exit_code == 0, done.output
    assert "data: calibration 4 captioning, 4 vqa; test 4 captioning, 4 vqa; no shared picture" in done.stdout
    assert "vqa accuracy: 4 samples measure a drop to within" in " ".join(done.stdout.split())
    assert json.loads(run(*words, "--data", str(folder), "--json").stdout)["data"]
    assert "data" not in json.loads(run(*words, "--json").stdout)
    (folder / "3.png").unlink()
    refused = run(*words, "--data", str(folder))
    assert refused.exit_code == 1
    assert "metadata.jsonl:4: no picture '3.png'" in refused.stderr


def test_a_table_and_the_column_text_are_read(tmp_path: Path) -> None:
    for i in range(4):
        picture(tmp_path / f"{i}.png", i)
    rows = ['0.png,"a dog, running",,', "1.png,,what?,a cat", '2.png,"two\nlines",,', "3.png,last,,"]
    write(tmp_path / "metadata.csv", "\ufefffile_name,text,question,answer\n" + "\n".join(rows) + "\n")
    read = [s for split in ("train", "test") for s in samples("folder", tmp_path, "captioning", split, 9, 0)]
    assert {(s.file, s.references) for s in read} == {
        ("0.png", ("a dog, running",)),
        ("2.png", ("two\nlines",)),
        ("3.png", ("last",)),
    }
    write(tmp_path / "metadata.csv", "file_name,text\n0.png,a\n../x.png,b\n1.png,c,d\n2.png,\n")
    with pytest.raises(DataError) as error:
        samples("folder", tmp_path, "captioning", "train", 9, 0)
    assert [text.partition(": ")[0] for text in error.value.problems] == [
        "metadata.csv:3",
        "metadata.csv:4",
        "metadata.csv:5",
    ]
    assert "more cells" in error.value.problems[1]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"name,text\n", "no column `file_name`"),
        (b"file_name,text\n0.png,\xff\n", "not UTF-8"),
        (b'file_name,text\n0.png,"a" b\n', "not CSV"),
    ],
)
def test_a_table_that_cannot_be_read_is_named(content: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / "metadata.csv").write_bytes(content)
    with pytest.raises(DataError, match=message):
        samples("folder", tmp_path, "captioning", "train", 9, 0)


def parquet(folder: Path, **columns: list[Any]) -> Path:
    tables = pytest.importorskip("pyarrow")
    from pyarrow import parquet as files

    for i in range(4):
        picture(folder / f"{i}.png", i)
    files.write_table(tables.table(columns), folder / "metadata.parquet")
    return folder


def test_metadata_in_parquet_is_read_with_its_lists(tmp_path: Path) -> None:
    names = [f"{i}.png" for i in range(4)]
    captions: list[Any] = [["a", "b"], ["c"], None, ["d"]]
    parquet(
        tmp_path,
        file_name=names,
        captions=captions,
        question=[None, "what?", "who?", None],
        answer=[None, "x", "y", None],
    )
    read = [s for split in ("train", "test") for s in samples("folder", tmp_path, "captioning", split, 9, 0)]
    assert {(s.file, s.references) for s in read} == {("0.png", ("a", "b")), ("1.png", ("c",)), ("3.png", ("d",))}
    asked = [s for split in ("train", "test") for s in samples("folder", tmp_path, "vqa", split, 9, 0)]
    assert {(s.question, s.references) for s in asked} == {("what?", ("x",)), ("who?", ("y",))}
    assert place(tmp_path).name == "folder"  # not the hub's source of parquet files


def test_problems_in_parquet_are_named_by_row(tmp_path: Path) -> None:
    parquet(tmp_path, file_name=["0.png", "../x.png", None], text=["a", "b", "c"])
    with pytest.raises(DataError) as error:
        samples("folder", tmp_path, "captioning", "train", 9, 0)
    named = [text.partition(": ")[0] for text in error.value.problems]
    assert named == ["metadata.parquet:2", "metadata.parquet:3"]
    parquet(tmp_path, name=["0.png"], text=["a"])
    with pytest.raises(DataError, match="no column `file_name`"):
        samples("folder", tmp_path, "captioning", "train", 9, 0)
    (tmp_path / "metadata.parquet").write_bytes(b"PAR1 not parquet")
    with pytest.raises(DataError, match="not a parquet file"):
        samples("folder", tmp_path, "captioning", "train", 9, 0)


def test_without_pyarrow_the_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    parquet(tmp_path, file_name=["0.png"], text=["a"])
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    with pytest.raises(DataError, match="needs pyarrow") as error:
        samples("folder", tmp_path, "captioning", "train", 9, 0)
    assert "hub" in str(error.value.hint)


def test_two_kinds_of_metadata_are_refused(tmp_path: Path) -> None:
    images(tmp_path)
    write(tmp_path / "metadata.csv", "file_name,text\n0.png,a\n")
    with pytest.raises(DataError, match="both"):
        samples("folder", tmp_path, "captioning", "train", 9, 0)


def conversations(folder: Path, entries: list[Any]) -> Path:
    for i in range(4):
        picture(folder / "coco" / f"{i}.jpg", i)
    return write(folder / "data.json", entries)


def turns(*texts: str) -> list[dict[str, str]]:
    return [{"from": ("human", "gpt")[i % 2], "value": text} for i, text in enumerate(texts)]


def test_conversations_of_llava_are_questions(tmp_path: Path) -> None:
    talk = turns("<image>\nWhat is it?", "A dog.", "What color?", "Red.")
    entries = [
        {"id": "a", "image": "coco/0.jpg", "conversations": talk},
        {"id": 7, "image": "coco/1.jpg", "conversations": turns("Where?\n<image>", "There.")},
        {"id": "text", "conversations": turns("No picture?", "None.")},
        {"id": "bare", "image": "coco/2.jpg", "conversations": turns("<image>", "A caption.")},
    ]
    file = conversations(tmp_path, entries)
    by_split = {}
    for source in (place(file), place(f"llava:{file}"), place(f"llava:{tmp_path}")):
        assert source.tasks == ("vqa",)
        for split in ("train", "test"):
            read = samples(source.name, source.path, "vqa", split, 9, 0)
            by_split |= {s.identity: (s.question, s.references, s.file) for s in read}
    assert by_split == {
        "a#1": ("What is it?", ("A dog.",), "coco/0.jpg"),
        "a#2": ("What color?", ("Red.",), "coco/0.jpg"),
        "7": ("Where?", ("There.",), "coco/1.jpg"),
    }
    assert run("data", "check", str(file)).exit_code == 0


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ("text", "not a JSON object"),
        ({"image": "coco/0.jpg"}, "`conversations` must be a list"),
        ({"image": "coco/0.jpg", "conversations": turns("a", "b", "c")}, "turns must alternate"),
        ({"image": "../0.jpg", "conversations": turns("a", "b")}, "must stay in the folder"),
        ({"image": "coco/9.jpg", "conversations": turns("a", "b")}, "no picture 'coco/9.jpg'"),
        ({"image": "coco/0.jpg", "conversations": turns("a", " ")}, "`value` must be a non-empty string"),
        ({"id": 1, "image": "coco/0.jpg", "conversations": turns("a", "b")}, "id 1 occurs 2 times"),
    ],
)
def test_entries_of_conversations_that_cannot_be_used_are_named(entry: Any, message: str, tmp_path: Path) -> None:
    good = [{"id": i, "image": f"coco/{i}.jpg", "conversations": turns("a", "b")} for i in range(1, 3)]
    file = conversations(tmp_path, [*good, entry])
    done = run("data", "check", str(file))
    assert done.exit_code == 1
    assert message in done.stdout


def test_a_folder_of_parquet_files_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("datasets")
    monkeypatch.setenv("MMQ_CACHE", str(tmp_path / "cache"))
    pictures = [{"bytes": picture(tmp_path / f"{i}.png", i).read_bytes(), "path": None} for i in range(4)]
    rows = {"image": pictures, "text": [f"row {i}" for i in range(4)]}
    table = datasets.Dataset.from_dict(rows).cast_column("image", datasets.Image())
    folder = tmp_path / "rows"
    folder.mkdir()
    for split in ("train", "test"):
        table.to_parquet(str(folder / f"{split}-00000.parquet"))
    source = place(folder)
    assert source.name == "hub"
    read = samples(source.name, source.path, "captioning", "train", 9, 0)
    assert {sample.references for sample in read} == {(f"row {i}",) for i in range(4)}


def test_a_snapshot_of_the_hub_may_link_into_its_own_repository_only(tmp_path: Path) -> None:
    repository = tmp_path / "hub" / "datasets--me--photos"
    commit = repository / "snapshots" / "0123"
    commit.mkdir(parents=True)
    outside = picture(tmp_path / "hub" / "datasets--me--other" / "blobs" / "x.png")
    lines = []
    for i in range(2):
        blob = picture(repository / "blobs" / f"blob{i}.png", i)
        (commit / f"{i}.png").symlink_to(Path("../../blobs") / blob.name)
        lines.append(json.dumps({"file_name": f"{i}.png", "caption": "a"}))
    write(commit / "metadata.jsonl", "\n".join(lines))
    assert len(samples("folder", commit, "captioning", "train", 9, 0)) == 1
    (commit / "0.png").unlink()
    (commit / "0.png").symlink_to(outside)
    (commit / "1.png").unlink()
    (commit / "1.png").symlink_to(outside)
    with pytest.raises(DataError, match="a link to a file outside"):
        samples("folder", commit, "captioning", "train", 9, 0)
    plain = tmp_path / "snapshots" / "0123"  # not in a repository's folder
    images(plain, 2)
    (plain / "0.png").unlink()
    (plain / "0.png").symlink_to(picture(tmp_path / "blobs" / "y.png"))
    (plain / "1.png").unlink()
    (plain / "1.png").symlink_to(picture(tmp_path / "blobs" / "y.png"))
    with pytest.raises(DataError, match="a link to a file outside"):
        samples("folder", plain, "captioning", "train", 9, 0)
