"""Data sources: where samples come from.

Enters: `NAME:PATH` (`coco:/data/coco`), `demo`, or a bare folder; a task, a split, a limit and a seed.
Leaves: samples with pictures and texts, or every reason why a row cannot be used.
May import: model, demo, tasks.

To add a source, write `data/NAME.py` and add a line to `DATA`.
"""

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast, get_args

from exporter.data import coco, flickr30k, folder, gqa, hub, vqav2
from exporter.data.conventions import CONVENTIONS
from exporter.data.overlap import Trace, check_disjoint, image_key, traces
from exporter.errors import DataError, did_you_mean, one_line
from exporter.model.families import FAMILIES
from exporter.tasks import retrieval
from exporter.tasks.sample import Sample

SourceReader = Callable[[Path | None, str, str, int, int], list[Sample]]
_MARKERS = re.compile("|".join(rf"\s*{re.escape(family.image_marker)}\s*" for family in FAMILIES.values()))
ANY_TASK = ("captioning", "vqa", "retrieval")
DEMO_CANDIDATES = 10  # of a thousand small drawings; the paper's 128 would only take longer
BUILT_IN = ("demo", "drawings")  # the same scenes: with the demo models' made-up names, and in plain words


def _demo(path: Path | None, task: str, split: str, limit: int, seed: int) -> list[Sample]:
    from exporter.demo import data as demo

    if task not in get_args(demo.TaskName):
        raise DataError(f"demo has nothing for task {task}", f"it has {', '.join(get_args(demo.TaskName))}")
    return demo.samples(cast(demo.TaskName, task), cast(Any, split), limit, seed)


def _drawings(path: Path | None, task: str, split: str, limit: int, seed: int) -> list[Sample]:
    from exporter.demo import data as demo

    return demo.drawings(cast(demo.TaskName, task), cast(Any, split), limit, seed)


def _local(name: str, read: Callable[[Path, str, str, int, int], list[Sample]]) -> SourceReader:
    """A source that cannot do without a path."""

    def samples(path: Path | None, task: str, split: str, limit: int, seed: int) -> list[Sample]:
        if path is None:
            raise DataError(f"data source {name} needs a folder and none is given", f"pass --data {name}:PATH")
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
    "hub": _local("hub", hub.samples),
}


@dataclass(frozen=True)
class SourceSpec:
    """One source as the user named it. name: a key of `DATA`."""

    name: str
    path: Path | None = None

    @property
    def tasks(self) -> tuple[str, ...]:
        """What it can be asked."""
        if self.name in CONVENTIONS:
            return CONVENTIONS[self.name].tasks
        return hub.tasks(self.path) if self.name == "hub" and self.path else ANY_TASK

    def __str__(self) -> str:
        """For manifests, one line: the source, and of its path the last part alone (all of it when it is a hub id)."""
        return "".join(c if c.isprintable() else " " for c in self._written())

    def _written(self) -> str:
        if self.name == "hub" and self.path and hub.repo_of(self.path.as_posix()):
            return f"hub {self.path.as_posix()}"
        return self.name if self.path is None else one_line(f"{self.name} {self.path.name}")


def place(written: str | Path) -> SourceSpec:
    """`coco:/data/coco`, `demo`, or a bare folder. DataError for an unknown name."""
    text = str(written)
    name, colon, path = text.partition(":")
    if name in DATA and (path or not colon):
        return SourceSpec(name, Path(path).expanduser() if path else None)
    if colon and not Path(text).exists():
        hint = f"write NAME:PATH; names are {', '.join(DATA)}"
        raise DataError(f"unknown data source '{text}'.{did_you_mean(name, DATA)}", hint)
    return SourceSpec("folder", Path(text).expanduser())


def places(written: str | Path | Sequence[str | Path] | None) -> tuple[SourceSpec, ...]:
    """One source or several, for instance one for each task."""
    listed = () if written is None else (written,) if isinstance(written, str | Path) else written
    return tuple(place(one) for one in listed)


def samples(name: str, path: Path | None, task: str, split: str, limit: int, seed: int) -> list[Sample]:
    """At most `limit` samples of a task; the same ones for the same seed.

    name: a key of `DATA`. split: train, validation or test. Raises DataError when there are none, listing every
    problem found.
    """
    found = [_plain(sample) for sample in DATA[name](path, task, split, limit, seed)]
    if task != retrieval.NAME:
        return found
    return retrieval.pooled(found, DEMO_CANDIDATES if name in BUILT_IN else retrieval.CANDIDATES)


def samples_from(chosen: Sequence[SourceSpec], task: str, split: str, limit: int, seed: int) -> list[Sample]:
    """Samples of a task from the one place of `chosen` that has it. DataError when none or several have."""
    able = [one for one in chosen if task in one.tasks]
    if len(able) == 1:
        return samples(able[0].name, able[0].path, task, split, limit, seed)
    named = ", ".join(one.name for one in able or chosen)
    if able:
        raise DataError(f"{named} all have task {task}", "name one source for each task")
    having = ", ".join(name for name, known in CONVENTIONS.items() if task in known.tasks)
    raise DataError(f"{named} has nothing for task {task}", f"add a source that has it: {having}, folder")


def _plain(sample: Sample) -> Sample:
    """The sample with an identity of one line, and without what stands for a picture in prompts in its texts.

    Data for training holds such places. DataError when nothing is left of a text.
    """
    sample = replace(sample, identity=one_line(sample.identity))
    texts = [text for text in (sample.question, *sample.references) if text is not None]
    if not any(_MARKERS.search(text) for text in texts):
        return sample
    question = None if sample.question is None else _MARKERS.sub(" ", sample.question).strip()
    references = tuple(_MARKERS.sub(" ", text).strip() for text in sample.references)
    if "" in (question, *references):
        raise DataError(f"sample {sample.identity} has a text of nothing but the place of a picture")
    return replace(sample, question=question, references=references, marked=True)


def notes(calibration: Sequence[Sample], tested: Iterable[Sample] = ()) -> tuple[str, ...]:
    """What the user should know about samples to calibrate on and to test on."""
    found = []
    if bare := sum(not sample.references for sample in calibration):
        share = f"{bare} of {len(calibration)} calibration samples"
        found.append(f"{share} have no text: the model sees picture and prompt, no reply")
    chosen = [*calibration, *tested]
    if marked := sum(sample.marked for sample in chosen):
        markers = " or ".join(sorted({family.image_marker for family in FAMILIES.values()}))
        found.append(f"{marked} of {len(chosen)} samples have {markers} in a text: left out, as prompts have their own")
    return tuple(found)


__all__ = [
    "BUILT_IN",
    "CONVENTIONS",
    "DATA",
    "Place",
    "Trace",
    "check_disjoint",
    "image_key",
    "notes",
    "place",
    "places",
    "samples",
    "samples_from",
    "traces",
]
