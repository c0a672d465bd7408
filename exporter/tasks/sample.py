"""One evaluation or calibration sample: an image, a question, the accepted answers."""

from collections.abc import Callable
from dataclasses import dataclass

from PIL.Image import Image


@dataclass(frozen=True)
class Sample:
    """One image with one text.

    identity: stable id within its data set, recorded in the manifest.
    image: opens the picture (RGB); called when needed, so that large sets stay on disk.
    question: what the model is asked, without any template; None asks for a caption.
    references: accepted answers or captions; calibration feeds the first one to the model as its reply.
    kind: question type, for tables by type.
    """

    identity: str
    image: Callable[[], Image]
    question: str | None
    references: tuple[str, ...]
    kind: str = ""


def task_of(sample: Sample) -> str:
    """How a sample is asked: `vqa` with a question, `captioning` without."""
    return "captioning" if sample.question is None else "vqa"
