"""A model's processor: pictures and prompts to model inputs, by transformers, with the chat template taken apart."""

from pathlib import Path
from typing import Any

from exporter.errors import CheckpointError
from exporter.files.strict_json import read_json
from exporter.model.chat_template import Template
from exporter.model.config_check import known_family
from exporter.model.processor_inspector import inspect


class Processor:
    """A processor of transformers that never renders a chat template.

    template: None when the model folder has none. positions: tokens that the model can take at most, None when nobody
    says so. image_tokens: of them, what a picture takes.
    """

    def __init__(
        self, theirs: Any, template: Template | None, positions: int | None = None, image_tokens: int = 0
    ) -> None:
        self.theirs = theirs
        self.template = template
        self.positions = positions
        self.image_tokens = image_tokens

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

    @property
    def image_token_id(self) -> int | None:
        """The id of that token; None when it is none."""
        token = self.image_token
        found = None if token is None else self.tokenizer.convert_tokens_to_ids(token)
        return found if isinstance(found, int) and found != self.tokenizer.unk_token_id else None

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
    config = read_json(folder / "config.json")
    family = known_family(config, str(folder / "config.json"))
    return Processor(theirs, inspection.template, family.positions(config), family.image_tokens(config))
