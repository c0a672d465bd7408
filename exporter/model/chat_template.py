"""A chat template taken apart: what it writes before and after a user's text.

A template is a program of whoever made the model folder. It is rendered for a few probe texts only, in a helper process
with limits (`inspector`); prompts are then made by putting texts between the two parts, which cannot take long.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from exporter.errors import CheckpointError

PROBES = ("mmq probe {text} {{ x }} %d <b>&amp;\"'\\ é\n\nline", "Zwei", " \n edges \n ")
MOST_CHARACTERS = 100_000  # of one rendered probe: a prompt of the longest contexts has fewer


@dataclass(frozen=True)
class Template:
    """before, after: what surrounds the user's text. strips: whether white space around the text is removed."""

    before: str
    after: str
    strips: bool = False

    def prompt(self, text: str) -> str:
        """The prompt for one picture and `text`."""
        return f"{self.before}{text.strip() if self.strips else text}{self.after}"


def conversation(text: str) -> list[dict[str, Any]]:
    """One user turn: a picture and a text."""
    return [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": text}]}]


def take_apart(rendered: Sequence[str], where: str) -> Template:
    """The template that wrote `rendered` for `PROBES`; where: its folder, for messages.

    CheckpointError when it does not write a user's text unchanged.
    """
    probe = PROBES[0]
    before, _, after = rendered[0].partition(probe)
    if rendered[0].count(probe) == 1:
        for strips in (False, True):
            template = Template(before, after, strips)
            if [template.prompt(text) for text in PROBES] == list(rendered):
                return template
    raise CheckpointError(
        f"{where}: its chat template does not write a user's text unchanged and once",
        "give a chat_template.jinja that does: mmq puts each question between what the template writes around it",
    )
