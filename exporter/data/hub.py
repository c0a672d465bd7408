"""Data sets of the hub through `datasets` (an extra): streamed, chosen by seed, kept with checksums.

`hub:vqav2` is a known copy of a known set, `hub:ORG/NAME` or `hub:ORG/NAME@REVISION` any other whose columns have usual
names; a local folder of parquet files works too. The chosen rows are written once as a data folder (`data.folder`)
with the sha256 of every file and the commit they are of; later runs read that folder, offline, and check the sums.
"""

import hashlib
import io
import json
import os
import shutil
import tempfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from exporter.data import folder
from exporter.data.conventions import CONVENTIONS
from exporter.distribution import install_extra
from exporter.errors import DataError, HubError
from exporter.model.hub import hub_errors
from exporter.tasks.sample import Sample

SUMS = "sha256.json"
PATIENCE = 10.0  # seconds for the hub to say which commit it has
ORIGIN = "origin.json"  # where the kept rows come from
BUFFER = 1000  # rows that are shuffled together while streaming
SUFFIXES = {"JPEG": ".jpg", "PNG": ".png", "WEBP": ".webp", "GIF": ".gif", "BMP": ".bmp", "TIFF": ".tif"}


@dataclass(frozen=True)
class Copy:
    """A data set on the hub. splits: mmq's split -> its split."""

    repo: str
    splits: Mapping[str, str]


# Columns as their cards list them.
COPIES: dict[str, Copy] = {
    "coco": Copy("lmms-lab/COCO-Caption2017", {"test": "val"}),
    "flickr30k": Copy("umaru97/flickr30k_train_val_test", {"train": "train", "validation": "val", "test": "test"}),
    "vqav2": Copy("lmms-lab/VQAv2", {"test": "validation"}),
    "gqa": Copy("Mineru/GQA", {"train": "train_balanced", "validation": "val_balanced", "test": "testdev_balanced"}),
}
USUAL_SPLITS = {"train": ("train",), "validation": ("validation", "val"), "test": ("test", "validation", "val")}
COLUMNS: dict[str, tuple[str, ...]] = {  # role -> names, the first that is there
    "id": ("question_id", "questionId", "id", "image_id", "img_id", "filename"),
    "image": ("image",),
    "captions": ("captions", "caption", "answer", "text", "alt_text", "sentences_raw"),
    "question": ("question",),
    "answers": ("answers", "answer"),
    "kind": ("answer_type", "type_structural", "question_type"),
}


def repo_of(name: str) -> str | None:
    """`vqav2` or `ORG/NAME@REVISION` -> the data set's id on the hub, None for a local folder."""
    if name in COPIES:
        return COPIES[name].repo
    repo = name.partition("@")[0]
    local = name.startswith((".", "/", "~")) or Path(name).is_dir()
    return repo if repo.count("/") == 1 and not local else None


def tasks(path: Path) -> tuple[str, ...]:
    """What `hub:PATH` can be asked; of an unknown set we only learn it from its columns."""
    known = CONVENTIONS.get(path.as_posix())
    return known.tasks if known else ("captioning", "vqa", "retrieval")


def samples(path: Path, task: str, split: str, limit: int, seed: int) -> list[Sample]:
    """At most `limit` rows of a hub data set, from the copy that was kept or, the first time, streamed.

    DataError when `datasets` is not installed, the set cannot be reached or lacks a column, or a kept file changed.
    """
    name = path.as_posix()
    copy = COPIES.get(name)
    if copy and split not in copy.splits:
        raise DataError(f"hub:{name} has no split '{split}'", f"it has {', '.join(copy.splits)}; or use {name}:FOLDER")
    local = path.expanduser().resolve()
    files = _files(local) if copy is None and local.is_dir() else None
    repo, _, revision = (copy.repo if copy else name).partition("@") if files is None else (f"{local}", "", "")
    key = json.dumps([repo, revision, task, split, limit, seed, files])
    kept = cache() / f"{repo.strip('/').replace('/', '--')[-60:]}-{hashlib.sha256(key.encode()).hexdigest()[:16]}"
    if not kept.is_dir():
        wanted = (copy.splits[split],) if copy else USUAL_SPLITS[split]
        commit = _commit(repo, revision or None) if files is None else None
        rows = stream(repo, commit or revision or None, wanted, limit, seed)
        keep(kept, split, task, rows, {"repo": repo, "revision": revision or None, "commit": commit})
    check_sums(kept)
    return folder.samples(kept, task, split, limit, seed)


def cache() -> Path:
    """Where chosen rows are kept: MMQ_CACHE, or ~/.cache/mmq."""
    return Path(os.environ.get("MMQ_CACHE") or "~/.cache/mmq").expanduser() / "hub"


def _files(root: Path) -> list[tuple[str, int, int]]:
    """Name, size and time of change of every file: when one of them changes, rows are read again."""
    stats = {file.relative_to(root).as_posix(): file.stat() for file in root.rglob("*") if file.is_file()}
    return sorted((name, stat.st_size, stat.st_mtime_ns) for name, stat in stats.items())


def _commit(repo: str, revision: str | None) -> str | None:
    """The commit that a revision (None: the main branch) stands for now, None when the hub does not say."""
    from huggingface_hub import HfApi

    try:
        with hub_errors(repo, "looking it up"):
            return HfApi().dataset_info(repo, revision=revision, timeout=PATIENCE).sha or None
    except HubError:
        return None


def stream(
    repo: str, revision: str | None, wanted: tuple[str, ...], limit: int, seed: int
) -> Iterable[Mapping[str, Any]]:
    """At most `limit` rows, pictures as bytes; nothing but these and the shuffling buffer is downloaded."""
    try:
        import datasets
    except ImportError:
        raise DataError("hub data sets need the `datasets` package", install_extra("hub")) from None
    from huggingface_hub.errors import HfHubHTTPError

    if repo.startswith(("/", ".", "~")) and not Path(repo).expanduser().is_dir():
        raise DataError(f"no folder {repo}", "give a folder of parquet files, or a hub id like org/name")
    try:
        names = datasets.get_dataset_split_names(repo, revision=revision)
        split = next((name for name in wanted if name in names), None)
        if split is None:
            raise DataError(f"hub data set {repo} has none of the splits {', '.join(wanted)}", f"it has {names}")
        rows = datasets.load_dataset(repo, split=split, streaming=True, revision=revision)
        rows = rows.cast_column("image", datasets.Image(decode=False)) if "image" in (rows.features or {}) else rows
        yield from rows.shuffle(seed=seed, buffer_size=BUFFER).take(limit)
    except (OSError, ValueError, HfHubHTTPError) as error:
        what = str(error).partition("\n")[0][:200]
        raise DataError(f"hub data set {repo} cannot be read: {what}", "check the name and the network") from None


def keep(
    kept: Path, split: str, task: str, rows: Iterable[Mapping[str, Any]], origin: Mapping[str, str | None]
) -> None:
    """Write rows as a data folder with checksums; the folder appears when it is whole and all of it can be used.

    origin: `repo`, and of the hub the `revision` asked for and its `commit`. DataError with all problems of the rows.
    """
    kept.parent.mkdir(parents=True, exist_ok=True)
    made = Path(tempfile.mkdtemp(prefix="part-", dir=kept.parent))
    try:
        (made / split).mkdir()
        lines = [json.dumps(_line(made / split, row, i, task)) for i, row in enumerate(rows)]
        (made / split / folder.METADATA).write_text("\n".join(lines) + "\n", encoding="utf-8")
        (made / ORIGIN).write_text(json.dumps(origin, indent=1), encoding="utf-8")
        _check(made, split, task, len(lines), f"hub data set {origin['repo']}")
        (made / SUMS).write_text(json.dumps(_sums(made), indent=1, sort_keys=True), encoding="utf-8")
        made.rename(kept)
    finally:
        shutil.rmtree(made, ignore_errors=True)


def _check(made: Path, split: str, task: str, count: int, name: str) -> None:
    """DataError, in the name of the data set, unless every row that was written can be read."""
    try:
        folder.samples(made, task, split, count, 0)
    except DataError as error:
        raise DataError(error.message.replace(f"{made}", name), error.hint) from None


def _line(place: Path, row: Mapping[str, Any], i: int, task: str) -> dict[str, Any]:
    """One line of metadata; the picture is written as it came."""
    content = _value(row, "image", i).get("bytes")
    if not content:
        raise DataError(f"row {i} has no picture", "is its column `image` one of pictures?")
    try:
        with Image.open(io.BytesIO(content)) as image:
            suffix = SUFFIXES.get(image.format or "", ".img")
    except Exception:  # noqa: BLE001 (Pillow's readers raise many kinds on damaged files)
        raise DataError(f"row {i}: its picture cannot be read") from None
    name = f"{i:06d}{suffix}"
    (place / name).write_bytes(content)
    line: dict[str, Any] = {"file_name": name, "id": f"{_value(row, 'id', i, str(i))}"}
    if task == "vqa":
        return line | {
            "question": _value(row, "question", i),
            "answers": _texts(_value(row, "answers", i)),
            "kind": _value(row, "kind", i, None) or None,
        }
    return line | {"captions": _texts(_value(row, "captions", i))}


def _value(row: Mapping[str, Any], role: str, i: int, *default: Any) -> Any:
    for name in COLUMNS[role]:
        if name in row and row[name] is not None:
            return row[name]
    if default:
        return default[0]
    raise DataError(f"row {i} has no column for {role}: {', '.join(COLUMNS[role])}", f"it has {', '.join(row)}")


def _texts(value: Any) -> list[str]:
    """Texts of a column: one text, a list of texts, or VQAv2's list of objects with `answer`."""
    listed = [value] if isinstance(value, str) else value
    return [str(one["answer"] if isinstance(one, Mapping) else one) for one in listed]


def _sums(root: Path) -> dict[str, str]:
    files = sorted(file for file in root.rglob("*") if file.is_file() and file.name != SUMS)
    return {f.relative_to(root).as_posix(): hashlib.sha256(f.read_bytes()).hexdigest() for f in files}


def check_sums(kept: Path) -> None:
    """DataError when a kept file is not as it was written."""
    try:
        told = json.loads((kept / SUMS).read_text(encoding="utf-8"))
    except (OSError, json.JSONDecodeError):
        told = None
    if told != _sums(kept):
        raise DataError(f"{kept}: its files are not as they were downloaded", f"delete {kept}; it is made again")
