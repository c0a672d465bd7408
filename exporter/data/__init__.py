"""Samples: read them from a data source (drawings, folder, public data sets, hub), and score answers to them.

Enters: `NAME:PATH` (`coco:/data/coco`), `demo`, or a bare folder; a task, a split, a limit and a seed.
Leaves: samples with pictures and texts, or one error that lists all unusable rows; scores of answers.
May import: files.

To add a source, write `data/NAME.py` and add a line to `DATA`.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast, get_args

from exporter.data import chartqa, coco, docvqa, flickr30k, folder, gqa, hub, llava, vqav2
from exporter.data.conventions import CONVENTIONS, LAYOUTS
from exporter.data.overlap import Trace, check_disjoint, image_key, traces
from exporter.data.placeholders import PLACEHOLDERS, plain
from exporter.data.rows import Selection
from exporter.data.source_check import BUILT_IN, refuse_missing, unknown_source
from exporter.data.tasks import retrieval
from exporter.data.tasks.sample import Sample
from exporter.errors import DataError, one_line

SourceReader = Callable[[Path | None, str, str, int, int], list[Sample]]
ANY_TASK = ("captioning", "vqa", "retrieval")
DEMO_CANDIDATES = 10  # retrieval candidates among a thousand small drawings; the paper's 128 would only be slower


def _demo(path: Path | None, task: str, split: str, limit: int, seed: int) -> list[Sample]:
    from exporter.data.demo import samples as demo

    if task not in get_args(demo.TaskName):
        raise DataError(f"data source demo does not support task {task}", f"use {', '.join(get_args(demo.TaskName))}")
    return demo.samples(cast(demo.TaskName, task), cast(Any, split), limit, seed)


def _drawings(path: Path | None, task: str, split: str, limit: int, seed: int) -> list[Sample]:
    from exporter.data.demo import samples as demo

    return demo.drawings(cast(demo.TaskName, task), cast(Any, split), limit, seed)


def _local(name: str, read: Callable[[Path, str, str, int, int], list[Sample]]) -> SourceReader:
    """A source that requires a path."""

    def samples(path: Path | None, task: str, split: str, limit: int, seed: int) -> list[Sample]:
        if path is None:
            raise DataError(f"data source {name} needs a folder", f"pass --data {name}:PATH")
        return read(path, task, split, limit, seed)

    return samples


DATA: dict[str, SourceReader] = {
    "demo": _demo,
    "drawings": _drawings,
    "folder": _local("folder", folder.samples),
    "coco": _local("coco", coco.samples),
    "flickr30k": _local("flickr30k", flickr30k.samples),
    "vqav2": _local("vqav2", vqav2.samples),
    "gqa": _local("gqa", gqa.samples),
    "chartqa": _local("chartqa", chartqa.samples),
    "docvqa": _local("docvqa", docvqa.samples),
    "hub": _local("hub", hub.samples),
    "llava": _local("llava", llava.samples),
}


@dataclass(frozen=True)
class SourceSpec:
    """One data source as the user specified it. name: a key of `DATA`."""

    name: str
    path: Path | None = None

    @property
    def tasks(self) -> tuple[str, ...]:
        """The tasks it supports."""
        if self.name in CONVENTIONS:
            return CONVENTIONS[self.name].tasks
        if self.name == "llava":
            return (llava.TASK,)
        return hub.tasks(self.path) if self.name == "hub" and self.path else ANY_TASK

    def __str__(self) -> str:
        """One line for manifests: the name and the last part of the path, or the whole hub id."""
        return "".join(c if c.isprintable() else " " for c in self._written())

    def _written(self) -> str:
        if self.name == "hub" and self.path and hub.repo_of(self.path.as_posix()):
            return f"hub {self.path.as_posix()}"
        return self.name if self.path is None else one_line(f"{self.name} {self.path.name}")


def place(written: str | Path) -> SourceSpec:
    """Parse `coco:/data/coco`, `demo`, a bare folder, or a bare JSON file. SourceError for an unknown name.

    A bare folder of parquet files is read as `hub:FOLDER`, a bare `FILE.json` as `llava:FILE.json`.
    """
    text = str(written)
    name, colon, path = text.partition(":")
    if name in DATA and (path or not colon):
        return SourceSpec(name, Path(path).expanduser() if path else None)
    if colon and not Path(text).exists():
        raise unknown_source(text, name, DATA)
    local = Path(text).expanduser()
    return SourceSpec("llava" if local.suffix == ".json" else "hub" if _is_parquet(local) else "folder", local)


def existing_place(written: str | Path) -> SourceSpec:
    """`place` of a source that exists; SourceError if there is none, or an empty folder."""
    source = place(written)
    refuse_missing(str(written), source.name, source.path, DATA)
    return source


def _is_parquet(path: Path) -> bool:
    """Whether a folder holds parquet files and no metadata of pictures."""
    places = (path, *(path / split for split in folder.SPLITS))
    described = any((place / name).is_file() for place in places for name in folder.METADATA_FILES)
    matches = (next(path.glob(pattern), None) for pattern in ("*.parquet", "*/*.parquet"))
    return path.is_dir() and not described and any(file is not None for file in matches)


def places(written: str | Path | Sequence[str | Path] | None) -> tuple[SourceSpec, ...]:
    """Parse one or several sources, for instance one for each task."""
    listed = () if written is None else (written,) if isinstance(written, str | Path) else written
    return tuple(place(entry) for entry in listed)


def samples(name: str, path: Path | None, task: str, split: str, limit: int, seed: int) -> list[Sample]:
    """At most `limit` samples of a task, selected by `seed`.

    name: a key of `DATA`. split: train, validation or test. Raises DataError with all problems of the data, or if there
    are no samples.
    """
    selected = DATA[name](path, task, split, limit, seed)
    read = [plain(sample) for sample in selected]
    if isinstance(selected, Selection):
        read = Selection(read, selected.available)
    if task != retrieval.NAME:
        return read
    return retrieval.with_pool(read, DEMO_CANDIDATES if name in BUILT_IN else retrieval.CANDIDATES)


def samples_from(sources: Sequence[SourceSpec], task: str, split: str, limit: int, seed: int) -> list[Sample]:
    """Samples of a task from the one source that supports it. DataError if no source or several support it."""
    matching = [source for source in sources if task in source.tasks]
    if len(matching) == 1:
        return samples(matching[0].name, matching[0].path, task, split, limit, seed)
    named = ", ".join(source.name for source in matching or sources)
    if matching:
        raise DataError(f"{named} all support task {task}", "give one source per task")
    names = ", ".join(name for name, known in CONVENTIONS.items() if task in known.tasks)
    raise DataError(f"{named} does not support task {task}", f"add a source that supports it: {names}, folder")


def notes(calibration: Sequence[Sample], tested: Iterable[Sample] = ()) -> tuple[str, ...]:
    """Notes for the user about the calibration and test samples: missing texts, removed image placeholders."""
    lines = []
    if bare := sum(not sample.references for sample in calibration):
        share = f"{bare} of {len(calibration)} calibration samples"
        lines.append(f"{share} have no text: calibration uses the picture and the prompt without a reply")
    all_samples = [*calibration, *tested]
    if marked := sum(sample.marked for sample in all_samples):
        share = f"{marked} of {len(all_samples)} samples"
        lines.append(f"{share} have {' or '.join(PLACEHOLDERS)} in a text; mmq removes it, because prompts add it")
    return tuple(lines)


__all__ = [
    "BUILT_IN",
    "CONVENTIONS",
    "DATA",
    "LAYOUTS",
    "Selection",
    "SourceSpec",
    "Trace",
    "check_disjoint",
    "existing_place",
    "image_key",
    "notes",
    "place",
    "places",
    "samples",
    "samples_from",
    "traces",
]
