"""Loads transformers' processor of a model folder; processors of videos are left out where they need more packages.

Many processors handle pictures and videos. Their video half needs torchvision and num2words, which mmq does not depend
on, because it gives a model only pictures. Where one of the two is missing, the processor is built without that half.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from exporter.transformers_import import import_transformers


def load_library(folder: Path) -> Any:
    """transformers' processor of a folder, from local files only and without running code from it.

    Raises what transformers raises.
    """
    AutoProcessor = import_transformers().AutoProcessor

    try:
        return AutoProcessor.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except RecursionError:
        pass  # transformers takes the processor itself for the video processor that torchvision would provide
    except (ImportError, ValueError) as error:  # a ValueError where the image processor's name ends with `Fast`
        if not any(package in str(error).lower() for package in ("torchvision", "num2words")):
            raise
    with _without_videos():
        return AutoProcessor.from_pretrained(folder, local_files_only=True, trust_remote_code=False)


class NoVideos(dict[str, Any]):
    """Takes the place of a processor's video half: every setting is None, and none is saved."""

    def __getattr__(self, name: str) -> None:
        """No setting."""
        if name.startswith("__"):
            raise AttributeError(name)


@contextmanager
def _without_videos() -> Iterator[None]:
    """Let processors be built without a video processor inside the `with` block."""
    from transformers.models.auto.video_processing_auto import AutoVideoProcessor
    from transformers.models.smolvlm import processing_smolvlm
    from transformers.processing_utils import ProcessorMixin

    check, load, words = (
        ProcessorMixin.check_argument_for_proper_class,
        AutoVideoProcessor.__dict__["from_pretrained"],
        processing_smolvlm.num2words,
    )

    def check_others(self: Any, name: str, argument: Any) -> Any:
        return None if name == "video_processor" else check(self, name, argument)

    ProcessorMixin.check_argument_for_proper_class = check_others
    AutoVideoProcessor.from_pretrained = classmethod(lambda cls, *args, **kwargs: NoVideos())
    processing_smolvlm.num2words = words or str  # only prompts about videos call it
    try:
        yield
    finally:
        ProcessorMixin.check_argument_for_proper_class = check
        AutoVideoProcessor.from_pretrained = load
        processing_smolvlm.num2words = words
