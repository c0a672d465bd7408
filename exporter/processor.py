"""A model's processor: pictures and prompts to model inputs, by transformers, with the chat template taken apart."""

from pathlib import Path
from typing import Any

from exporter.chat_template import Template
from exporter.errors import CheckpointError
from exporter.inspector import inspect


class Processor:
    """A processor of transformers that never renders a chat template.

    template: None when the model folder has none.
    """

    def __init__(self, theirs: Any, template: Template | None) -> None:
        self.theirs = theirs
        self.template = template

    @property
    def tokenizer(self) -> Any:
        """Texts to tokens."""
        return self.theirs.tokenizer

    @property
    def image_processor(self) -> Any:
        """Pictures to pixel values."""
        return self.theirs.image_processor

    @property
    def image_token(self) -> str | None:
        """The text that stands for a picture in a prompt; None when the processor has none."""
        token = getattr(self.theirs, "image_token", None)
        return None if token is None else str(token)

    def __call__(self, **inputs: Any) -> Any:
        """Model inputs of pictures and texts."""
        return self.theirs(**inputs)


def load_processor(folder: Path) -> Processor:
    """The model's own processor, from local files only; code that the folder may hold is not run.

    It is loaded in a helper process first. CheckpointError names the file and the reason when it cannot be loaded.
    """
    inspection = inspect(folder)
    from transformers import AutoProcessor

    try:
        theirs = AutoProcessor.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # whatever the libraries raise here and not in the helper
        reason = " ".join(str(error).split())[:300]
        raise CheckpointError(f"{folder}: its processor cannot be loaded: {reason}") from error
    return Processor(theirs, inspection.template)
