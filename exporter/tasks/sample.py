"""One evaluation or calibration sample: an image, a question, the accepted answers."""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

from PIL.Image import Image


@dataclass(frozen=True)
class Sample:
    """One image with one text.

    identity: stable id within its data set, recorded in the manifest.
    image: opens the picture (RGB); called when needed, so that large sets stay on disk.
    question: what the model is asked, without any template; None asks for a caption.
    references: accepted answers or captions; calibration feeds the first one to the model as its reply.
    kind: question type, for tables by type.
    among: for retrieval, the pictures and texts that are searched; its own are among them.
    file: the picture's file in the data set's folder; empty when it has none.
    marked: whether its texts held what stands for a picture in prompts, which was taken out.
    """

    identity: str
    image: Callable[[], Image]
    question: str | None
    references: tuple[str, ...]
    kind: str = ""
    among: "Pool | None" = None
    file: str = ""
    marked: bool = False


@dataclass(frozen=True)
class Pool:
    """What retrieval searches: the pictures of `samples` and all their references.

    candidates: how many of the best by contrast the matching head scores again.
    """

    samples: tuple[Sample, ...]
    candidates: int

    @cached_property
    def digest(self) -> str:
        """sha256 of what is searched, pictures by their pixels: another pool gives the same sample other ranks."""
        hasher = hashlib.sha256(f"{self.candidates}".encode())
        for sample in self.samples:
            image = sample.image()
            hasher.update(f"{image.size}{sample.references}".encode() + image.tobytes())
        return hasher.hexdigest()


def task_of(sample: Sample) -> str:
    """How a sample is asked: `retrieval` among others, `vqa` with a question, `captioning` without."""
    if sample.among is not None:
        return "retrieval"
    return "captioning" if sample.question is None else "vqa"
