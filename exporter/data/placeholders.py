"""Placeholders of the picture in texts of training data: mmq removes them, because the prompts of families add them."""

import re
from dataclasses import replace

from exporter.data.tasks.sample import Sample
from exporter.errors import DataError, one_line

PLACEHOLDERS = ("<image>", "<|image_pad|>")  # the `image_marker` of every family
_PLACEHOLDER = re.compile("|".join(rf"\s*{re.escape(text)}\s*" for text in PLACEHOLDERS))


def plain(sample: Sample) -> Sample:
    """The sample with a one-line identity and without placeholders in its texts.

    DataError if a text consists only of placeholders.
    """
    sample = replace(sample, identity=one_line(sample.identity))
    texts = [text for text in (sample.question, *sample.references) if text is not None]
    if not any(_PLACEHOLDER.search(text) for text in texts):
        return sample
    question = None if sample.question is None else _PLACEHOLDER.sub(" ", sample.question).strip()
    references = tuple(_PLACEHOLDER.sub(" ", text).strip() for text in sample.references)
    if "" in (question, *references):
        raise DataError(f"sample {sample.identity} has a text that contains only an image placeholder")
    return replace(sample, question=question, references=references, marked=True)
