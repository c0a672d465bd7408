"""Check of a data source before a job: samples of each task and split, unusable rows, and the first pictures."""

from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass

from exporter import data
from exporter.data.folder import SPLITS
from exporter.data.tasks.sample import Sample
from exporter.errors import DataError
from exporter.events import Event, Listener


@dataclass(frozen=True)
class SplitCheck:
    """Samples of one task and split. available: their number. opened: of those, how many pictures were decoded.

    refusal: why there are none; empty if there are some. examples: the first of them.
    """

    task: str
    split: str
    available: int = 0
    opened: int = 0
    refusal: str = ""
    examples: tuple[Sample, ...] = ()


@dataclass(frozen=True)
class DataCheck:
    """Result of a check. problems: unusable rows of any task, with file and line. notes: as an export gives them."""

    source: str
    splits: tuple[SplitCheck, ...]
    problems: tuple[str, ...]
    notes: tuple[str, ...]

    @property
    def tasks(self) -> dict[str, bool]:
        """Task -> whether both calibration (train) and evaluation (test) have samples."""
        usable = {(part.task, part.split) for part in self.splits if part.available}
        return {p.task: {(p.task, "train"), (p.task, "test")} <= usable for p in self.splits}

    @property
    def usable(self) -> tuple[str, ...]:
        """Tasks with samples for calibration (train) and evaluation (test)."""
        return tuple(task for task, both in self.tasks.items() if both)

    @property
    def trainable(self) -> tuple[str, ...]:
        """Tasks with samples for calibration."""
        return tuple(part.task for part in self.splits if part.split == "train" and part.available)

    @property
    def has_samples(self) -> bool:
        """Whether any task and split has a sample."""
        return any(part.available for part in self.splits)

    def raise_unless_usable(self) -> None:
        """DataError if a row is unusable or no task has samples."""
        if self.problems:
            count = len(self.problems)
            raise DataError(f"{self.source} has {unusable_rows(count)}", "correct the rows listed above")
        if not self.has_samples:
            reasons = "".join(f"\n  {reason}" for reason in dict.fromkeys(part.refusal for part in self.splits))
            raise DataError(f"{self.source} has no samples:{reasons}", "`mmq datasets` describes the layouts")


def unusable_rows(count: int) -> str:
    """`no unusable row`, `1 unusable row`, `2 unusable rows`."""
    return f"{count or 'no'} unusable row{'s' * (count > 1)}"


def check_data(source: data.SourceSpec, most: int, examples: int, on_event: Listener) -> DataCheck:
    """Read every task and split of a source. most: pictures to decode for each task and split."""
    parts: list[SplitCheck] = []
    problems: dict[str, None] = {}
    read: list[Sample] = []
    steps = [(task, split) for task in source.tasks for split in SPLITS]
    for number, (task, split) in enumerate(steps):
        on_event(Event("data", number, len(steps), source.name))
        try:
            samples = data.samples(source.name, source.path, task, split, most, 0)
        except DataError as error:
            problems |= dict.fromkeys(error.problems)
            refusal = unusable_rows(len(error.problems)) if error.problems else error.message
            parts.append(SplitCheck(task, split, refusal=refusal))
            continue
        available = samples.available if isinstance(samples, data.Selection) else len(samples)
        parts.append(SplitCheck(task, split, available, len(samples), examples=tuple(samples[:examples])))
        read += samples
    on_event(Event("data", len(steps), len(steps), source.name))
    return DataCheck(str(source), tuple(parts), tuple(problems), data.notes((), read))


def opened(parts: Iterator[SplitCheck] | tuple[SplitCheck, ...]) -> Iterator[tuple[SplitCheck, Sample]]:
    """Examples of all splits whose picture can be opened, with their split."""
    for part in parts:
        for sample in part.examples:
            with suppress(OSError):
                sample.image()
                yield part, sample
