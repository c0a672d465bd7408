"""`Processor`: a transformers processor that makes model inputs from pictures and prompts, and its chat template."""

from pathlib import Path
from typing import Any

from exporter.errors import CheckpointError
from exporter.files.strict_json import read_json
from exporter.model.config_check import known_family
from exporter.model.processors.chat_template import Template
from exporter.model.processors.inspector import inspect
from exporter.model.processors.library import load_library


class Processor:
    """A transformers processor whose chat template is never rendered in this process.

    library: transformers' processor. template: None when the model folder has none. positions: the largest number of
    tokens of the model, None when unknown. image_tokens: how many of them a picture takes.
    """

    def __init__(
        self, library: Any, template: Template | None, positions: int | None = None, image_tokens: int = 0
    ) -> None:
        self.library = library
        self.template = template
        self.positions = positions
        self.image_tokens = image_tokens

    @property
    def tokenizer(self) -> Any:
        """transformers' tokenizer."""
        return self.library.tokenizer

    @property
    def image_processor(self) -> Any:
        """transformers' image processor."""
        return self.library.image_processor

    @property
    def image_token(self) -> str | None:
        """The placeholder of a picture in a prompt; None when the processor has none."""
        token = getattr(self.library, "image_token", None)
        return None if token is None else str(token)

    @property
    def image_token_id(self) -> int | None:
        """The id of `image_token`; None when it is not a token."""
        token = self.image_token
        number = None if token is None else self.tokenizer.convert_tokens_to_ids(token)
        return number if isinstance(number, int) and number != self.tokenizer.unk_token_id else None

    def __call__(self, **inputs: Any) -> Any:
        """Model inputs for pictures and texts."""
        return self.library(**inputs)


def load_processor(folder: Path) -> Processor:
    """The model's own processor, from local files only and without running code from the folder.

    A helper process loads it first. CheckpointError names the file and the reason when it cannot be loaded.
    """
    inspection = inspect(folder)
    try:
        library = load_library(folder)
    except Exception as error:  # the libraries raise many types, and may fail only in this process
        reason = " ".join(str(error).split())[:300]
        raise CheckpointError(f"{folder}: its processor cannot be loaded: {reason}") from error
    config = read_json(folder / "config.json")
    family = known_family(config, str(folder / "config.json"))
    return Processor(library, inspection.template, family.positions(config), family.image_tokens(config))
