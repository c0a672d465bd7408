"""Data sets of the hub through `datasets` (an extra): stream rows, select by seed, cache them with checksums.

`hub:vqav2` is a known copy of a known data set; `hub:ORG/NAME` or `hub:ORG/NAME@REVISION` is any data set with usual
column names; a local folder of parquet files works too. The selected rows are written once as a data folder
(`data.folder`) with the sha256 of every file and the commit; later runs read this folder offline and check the hashes.
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

from exporter.data import folder
from exporter.data.conventions import CONVENTIONS
from exporter.data.pictures import opened
from exporter.data.tasks.sample import Sample
from exporter.distribution import install_extra
from exporter.errors import DataError, HubError
from exporter.files.hub import hub_errors

SUMS = "sha256.json"
PATIENCE = 10.0  # seconds to wait for the hub to resolve a revision
ORIGIN = "origin.json"  # repository, revision and commit of the cached rows
BUFFER = 1000  # size of the shuffle buffer while streaming, in rows
SUFFIXES = {"JPEG": ".jpg", "PNG": ".png", "WEBP": ".webp", "GIF": ".gif", "BMP": ".bmp", "TIFF": ".tif"}


@dataclass(frozen=True)
class HubDataset:
    """A data set on the hub. splits: mmq's split -> its split."""

    repo: str
    splits: Mapping[str, str]


# Splits as listed on the data sets' cards.
HUB_DATASETS: dict[str, HubDataset] = {
    "coco": HubDataset("lmms-lab/COCO-Caption2017", {"test": "val"}),
    "flickr30k": HubDataset(
        "umaru97/flickr30k_train_val_test", {"train": "train", "validation": "val", "test": "test"}
    ),
    "vqav2": HubDataset("lmms-lab/VQAv2", {"test": "validation"}),
    "gqa": HubDataset(
        "Mineru/GQA", {"train": "train_balanced", "validation": "val_balanced", "test": "testdev_balanced"}
    ),
}
USUAL_SPLITS = {"train": ("train",), "validation": ("validation", "val"), "test": ("test", "validation", "val")}
COLUMNS: dict[str, tuple[str, ...]] = {  # role -> column names; the first existing one is used
    "id": ("question_id", "questionId", "id", "image_id", "img_id", "filename"),
    "image": ("image",),
    "captions": ("captions", "caption", "answer", "text", "alt_text", "sentences_raw"),
    "question": ("question", "query"),
    "answers": ("answers", "answer", "label"),
    "kind": ("answer_type", "type_structural", "question_type"),
}


def repo_of(name: str) -> str | None:
    """`vqav2` or `ORG/NAME@REVISION` -> the data set's id on the hub; None for a local folder."""
    if name in HUB_DATASETS:
        return HUB_DATASETS[name].repo
    repo = name.partition("@")[0]
    local = name.startswith((".", "/", "~")) or Path(name).is_dir()
    return repo if repo.count("/") == 1 and not local else None


def tasks(path: Path) -> tuple[str, ...]:
    """Tasks of `hub:PATH`; for an unknown data set all tasks, since only its columns decide."""
    known = CONVENTIONS.get(path.as_posix())
    return known.tasks if known else ("captioning", "vqa", "retrieval")


def samples(path: Path, task: str, split: str, limit: int, seed: int) -> list[Sample]:
    """At most `limit` rows of a hub data set, from the cache or, the first time, streamed from the hub.

    DataError if `datasets` is not installed, the data set is unreachable or lacks a column, or a cached file changed.
    """
    name = path.as_posix()
    copy = HUB_DATASETS.get(name)
    if copy is None and name in CONVENTIONS and not path.is_dir():
        raise DataError(f"mmq has no address for {name} on the hub", f"use {name}:FOLDER, or hub:ORG/NAME")
    if copy and split not in copy.splits:
        raise DataError(f"hub:{name} has no split '{split}'", f"it has {', '.join(copy.splits)}; or use {name}:FOLDER")
    local = path.expanduser().resolve()
    files = _files(local) if copy is None and local.is_dir() else None
    repo, _, revision = (copy.repo if copy else name).partition("@") if files is None else (f"{local}", "", "")
    key = json.dumps([repo, revision, task, split, limit, seed, files])
    cached = cache() / f"{repo.strip('/').replace('/', '--')[-60:]}-{hashlib.sha256(key.encode()).hexdigest()[:16]}"
    if not cached.is_dir():
        hub_splits = (copy.splits[split],) if copy else USUAL_SPLITS[split]
        commit = _commit(repo, revision or None) if files is None else None
        rows = stream(repo, commit or revision or None, hub_splits, limit, seed)
        keep(cached, split, task, rows, {"repo": repo, "revision": revision or None, "commit": commit})
    check_sums(cached)
    return folder.samples(cached, task, split, limit, seed)


def cache() -> Path:
    """Cache folder of the rows: `hub` in MMQ_CACHE or in ~/.cache/mmq."""
    return Path(os.environ.get("MMQ_CACHE") or "~/.cache/mmq").expanduser() / "hub"


def _files(root: Path) -> list[tuple[str, int, int]]:
    """Name, size and mtime of every file; part of the cache key, so that changed files are read again."""
    stats = {file.relative_to(root).as_posix(): file.stat() for file in root.rglob("*") if file.is_file()}
    return sorted((name, stat.st_size, stat.st_mtime_ns) for name, stat in stats.items())


def _commit(repo: str, revision: str | None) -> str | None:
    """The current commit of a revision (None: the main branch); None if the hub does not answer."""
    from huggingface_hub import HfApi

    try:
        with hub_errors(repo, "looking it up"):
            return HfApi().dataset_info(repo, revision=revision, timeout=PATIENCE).sha or None
    except HubError:
        return None


def stream(
    repo: str, revision: str | None, splits: tuple[str, ...], limit: int, seed: int
) -> Iterable[Mapping[str, Any]]:
    """At most `limit` rows, pictures as bytes; downloads only these rows and the shuffle buffer."""
    try:
        import datasets
    except ImportError:
        raise DataError("hub data sets need the `datasets` package", install_extra("hub")) from None
    from huggingface_hub.errors import HfHubHTTPError

    if repo.startswith(("/", ".", "~")) and not Path(repo).expanduser().is_dir():
        raise DataError(f"no folder {repo}", "use a folder of parquet files, or a hub id like org/name")
    try:
        names = datasets.get_dataset_split_names(repo, revision=revision)
        split = next((name for name in splits if name in names), None)
        if split is None:
            raise DataError(f"hub data set {repo} has none of the splits {', '.join(splits)}", f"it has {names}")
        rows = datasets.load_dataset(repo, split=split, streaming=True, revision=revision)
        rows = rows.cast_column("image", datasets.Image(decode=False)) if "image" in (rows.features or {}) else rows
        yield from rows.shuffle(seed=seed, buffer_size=BUFFER).take(limit)
    except (OSError, ValueError, HfHubHTTPError) as error:
        what = str(error).partition("\n")[0][:200]
        raise DataError(f"hub data set {repo} cannot be read: {what}", "check the name and the network") from None


def keep(
    target: Path, split: str, task: str, rows: Iterable[Mapping[str, Any]], origin: Mapping[str, str | None]
) -> None:
    """Write rows as a data folder with checksums; `target` appears only when it is complete and valid.

    origin: `repo`, and for the hub the requested `revision` and its `commit`. DataError with all problems of the rows.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix="part-", dir=target.parent))
    try:
        (temporary / split).mkdir()
        lines = [json.dumps(_line(temporary / split, row, i, task)) for i, row in enumerate(rows)]
        (temporary / split / folder.METADATA).write_text("\n".join(lines) + "\n", encoding="utf-8")
        (temporary / ORIGIN).write_text(json.dumps(origin, indent=1), encoding="utf-8")
        _check(temporary, split, task, len(lines), f"hub data set {origin['repo']}")
        (temporary / SUMS).write_text(json.dumps(_sums(temporary), indent=1, sort_keys=True), encoding="utf-8")
        temporary.rename(target)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _check(folder_path: Path, split: str, task: str, count: int, name: str) -> None:
    """DataError, with the name of the data set, unless all written rows can be read."""
    try:
        folder.samples(folder_path, task, split, count, 0)
    except DataError as error:
        raise DataError(error.message.replace(f"{folder_path}", name), error.hint) from None


def _line(place: Path, row: Mapping[str, Any], i: int, task: str) -> dict[str, Any]:
    """One line of metadata; writes the picture's bytes unchanged."""
    content = _value(row, "image", i).get("bytes")
    if not content:
        raise DataError(f"row {i} has no picture", "the column `image` must contain pictures")
    try:
        with opened(io.BytesIO(content)) as image:
            suffix = SUFFIXES.get(image.format or "", ".img")
    except Exception as error:  # Pillow's readers raise many kinds on damaged files
        raise DataError(f"row {i}: its picture cannot be read") from error
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
    return [str(item["answer"] if isinstance(item, Mapping) else item) for item in listed]


def _sums(root: Path) -> dict[str, str]:
    files = sorted(file for file in root.rglob("*") if file.is_file() and file.name != SUMS)
    return {f.relative_to(root).as_posix(): hashlib.sha256(f.read_bytes()).hexdigest() for f in files}


def check_sums(cached: Path) -> None:
    """DataError if a cached file was changed, added or removed."""
    try:
        sums = json.loads((cached / SUMS).read_text(encoding="utf-8"))
    except (OSError, json.JSONDecodeError):
        sums = None
    if sums != _sums(cached):
        raise DataError(f"{cached}: its files changed since the download", f"delete {cached} to download it again")
