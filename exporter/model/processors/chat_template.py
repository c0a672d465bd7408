"""Chat templates as `Template`s: the text before and after a user's message, determined by rendering probe texts.

A template is a program of unknown origin. A helper process with limits (`inspector`) renders it for a few
probe texts; prompts are then made by inserting texts between the two parts, without running the template.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from exporter.errors import CheckpointError

PROBES = ("mmq probe {text} {{ x }} %d <b>&amp;\"'\\ é\n\nline", "Zwei", " \n edges \n ")
MAX_CHARACTERS = 100_000  # of one rendered probe; prompts for the longest contexts have fewer


@dataclass(frozen=True)
class Template:
    """The texts around a user's text: `before` and `after`.

    strips: whether white space around the user's text is removed.
    """

    before: str
    after: str
    strips: bool = False

    def prompt(self, text: str) -> str:
        """The prompt for one picture and `text`."""
        return f"{self.before}{text.strip() if self.strips else text}{self.after}"


def conversation(text: str) -> list[dict[str, Any]]:
    """One user turn with a picture and a text."""
    return [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": text}]}]


def parse_template(rendered: Sequence[str], where: str) -> Template:
    """The template that renders `PROBES` as `rendered`. where: its folder, for messages.

    CheckpointError when it does not write a user's text exactly once and unchanged.
    """
    probe = PROBES[0]
    before, _, after = rendered[0].partition(probe)
    if rendered[0].count(probe) == 1:
        for strips in (False, True):
            template = Template(before, after, strips)
            if [template.prompt(text) for text in PROBES] == list(rendered):
                return template
    raise CheckpointError(
        f"{where}: its chat template does not write a user's text exactly once and unchanged",
        "use a chat_template.jinja that does: mmq inserts each question between the texts that the template adds",
    )
