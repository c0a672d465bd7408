"""Where samples come from. To add a source, write `data/NAME.py` and add a line to `DATA`.

A source's `samples` takes the user's folder (None without `--data`), a task, a split, a limit and a seed.
"""

from collections.abc import Callable, Sequence
from pathlib import Path

from exporter.data import folder
from exporter.data.overlap import check_disjoint, image_key
from exporter.demo import data as demo
from exporter.errors import DataError
from exporter.tasks.sample import Sample

Source = Callable[[Path | None, str, str, int, int], list[Sample]]


def _demo(path: Path | None, task: str, split: str, limit: int, seed: int) -> list[Sample]:
    return demo.samples(task, split, limit, seed)


def _folder(path: Path | None, task: str, split: str, limit: int, seed: int) -> list[Sample]:
    if path is None:
        raise DataError("the recipe calibrates on a folder and none is given", "pass --data DIR, or data: demo")
    return folder.samples(path, task, split, limit, seed)


DATA: dict[str, Source] = {"demo": _demo, "folder": _folder}


def samples(name: str, path: Path | None, task: str, split: str, limit: int, seed: int) -> list[Sample]:
    """At most `limit` samples of a task; the same ones for the same seed.

    name: a key of `DATA`; a folder that is given stands in for any of them. split: train, validation or test.
    Raises DataError when there are none, listing every problem found.
    """
    return DATA["folder" if path else name](path, task, split, limit, seed)


def notes(chosen: Sequence[Sample]) -> tuple[str, ...]:
    """What the user should know about samples to calibrate on."""
    bare = sum(not sample.references for sample in chosen)
    if not bare:
        return ()
    return (f"{bare} of {len(chosen)} calibration samples have no text: the model sees picture and prompt, no reply",)


__all__ = ["DATA", "check_disjoint", "image_key", "notes", "samples"]
