"""Evaluation and calibration samples: an image, a question, and reference answers."""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

from PIL.Image import Image


@dataclass(frozen=True)
class Sample:
    """One image with its texts.

    identity: stable id within its data set, recorded in the manifest.
    image: opens the picture (RGB) on demand, so that large sets stay on disk.
    question: text of the question, without a prompt template; None for captioning.
    references: accepted answers or captions; calibration feeds the first one to the model as its reply.
    kind: question type, for tables by type.
    among: for retrieval, the pool of pictures and texts to search, including the sample itself.
    file: the picture's file in the data set's folder; empty if it has none.
    metrics: metrics that its data set is judged by, besides the default ones of its task.
    marked: whether an image placeholder (`<image>`) was removed from its texts.
    """

    identity: str
    image: Callable[[], Image]
    question: str | None
    references: tuple[str, ...]
    kind: str = ""
    among: "Pool | None" = None
    file: str = ""
    marked: bool = False
    metrics: tuple[str, ...] = ()


@dataclass(frozen=True)
class Pool:
    """The search space of retrieval: the pictures of `samples` and all their references.

    candidates: number of best pairs by contrastive score that the matching head scores again.
    """

    samples: tuple[Sample, ...]
    candidates: int

    @cached_property
    def digest(self) -> str:
        """sha256 over candidates, pixels and references: ranks of a sample are comparable only within equal pools."""
        hasher = hashlib.sha256(f"{self.candidates}".encode())
        for sample in self.samples:
            image = sample.image()
            hasher.update(f"{image.size}{sample.references}".encode() + image.tobytes())
        return hasher.hexdigest()


def task_of(sample: Sample) -> str:
    """The task of a sample: `retrieval` with a pool, else `vqa` with a question, else `captioning`."""
    if sample.among is not None:
        return "retrieval"
    return "captioning" if sample.question is None else "vqa"
