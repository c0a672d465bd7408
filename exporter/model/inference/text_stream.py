"""Text of a growing answer: the streamer that transformers calls for every token, and pieces of text to print."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

UNFINISHED = "\ufffd"  # what a tokenizer decodes from the first bytes of a character


class TextStream:
    """Streamer for `generate` with a batch of one: calls `on_text` with each new piece of the answer.

    The pieces joined are `text`. Leading spaces are left out; trailing ones are sent only when more text follows.
    """

    def __init__(self, tokenizer: Any, on_text: Callable[[str], object]) -> None:
        self._tokenizer = tokenizer
        self._on_text = on_text
        self._tokens: list[int] = []
        self._whole = ""
        self.text = ""

    def put(self, value: "Tensor") -> None:
        """Take new token ids: `[1, tokens]` is the prompt, `[1]` one token of the answer."""
        if value.dim() == 1:
            self._tokens += value.tolist()
            self._whole = self._tokenizer.decode(self._tokens, skip_special_tokens=True)
            self._send()

    def end(self) -> None:
        """Send the rest."""
        self._send(finished=True)

    def add(self, text: str) -> None:
        """Take a piece of text from a server."""
        self._whole += text
        self._send()

    def _send(self, finished: bool = False) -> None:
        text = self._whole.strip()
        if text.startswith(self.text) and text != self.text and (finished or not text.endswith(UNFINISHED)):
            piece, self.text = text[len(self.text) :], text
            self._on_text(piece)
