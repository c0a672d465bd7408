"""Answers by a server that speaks OpenAI's chat completions, such as `vllm serve`, over HTTP.

Decoding is greedy. Several questions are in flight at a time, never more than a bound; what a server cannot do right
now (no connection, 429, 5xx) is tried again after a growing pause, and what it refuses (4xx) is an error at once.
"""

import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from itertools import islice
from threading import Event
from typing import Any
from urllib.parse import urlsplit

from exporter.errors import DataError
from exporter.inference.openai_client import RequestFailed, ask, message, png
from exporter.model.families import Family
from exporter.tasks.sample import Sample, task_of

KEY = "MMQ_SERVER_KEY"  # environment variable with the server's API key; it is sent, never shown or stored
BUSY = frozenset((408, 409, 425, 429, 500, 502, 503, 504))
UNKNOWN = frozenset((404, 405, 501))
LONGEST_PAUSE = 60.0  # seconds, also when the server asks for more
PIECE = 32  # answers handed on together


class _Busy(Exception):
    """The server cannot answer now. pause: seconds it asks to wait, or None."""

    def __init__(self, why: str, pause: float | None = None) -> None:
        super().__init__(why)
        self.pause = pause


@dataclass(frozen=True)
class Server:
    """One OpenAI-compatible server.

    url: with or without the closing /v1. model: the name it serves under, None when it serves one model only.
    concurrent: questions in flight. tries: attempts at one question. timeout: seconds for one answer.
    pause: waits so many seconds before another try; None really does.
    """

    url: str
    model: str | None = None
    concurrent: int = 16
    tries: int = 6
    timeout: float = 300.0
    pause: Callable[[float], object] | None = None

    @property
    def base(self) -> str:
        """The address up to and without /v1 (DataError when it is no HTTP address, or carries a password)."""
        parts = urlsplit(self.url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise DataError(f"'{self.url}' is no server address", "give one like http://127.0.0.1:8000")
        if parts.username or parts.password:
            raise DataError("a server address must not hold a password", f"set {KEY} instead")
        return self.url.rstrip("/").removesuffix("/v1")

    def served(self) -> dict[str, Any]:
        """The entry of /v1/models that will answer (DataError when the server has no such model)."""
        listed = self.fetch("/v1/models").get("data")
        entries = [entry for entry in listed if isinstance(entry, dict)] if isinstance(listed, list) else []
        names = [str(entry.get("id")) for entry in entries]
        if self.model is None and len(entries) == 1:
            return dict(entries[0])
        if self.model in names:
            return dict(entries[names.index(self.model)])
        said = f"'{self.model}'" if self.model else "one model"
        raise DataError(
            f"{self.base} does not serve {said}; it serves: {', '.join(names) or 'nothing'}", "pass its name, as listed"
        )

    def lacks_start(self, name: str) -> bool:
        """Whether the served chat template leaves out the token that the tokenizer puts before every text.

        Asked of vLLM's own `/tokenize`; a server without it is taken to know its model's prompt.
        """

        def tokens(**said: Any) -> list[Any]:
            found = self.fetch("/tokenize", {"model": name, **said}, optional=True).get("tokens")
            return found if isinstance(found, list) else []

        bare, whole = (tokens(prompt="a", add_special_tokens=add) for add in (False, True))
        start = whole[: len(whole) - len(bare)]
        if not bare or not start or whole[len(start) :] != bare:
            return False  # it puts nothing there, or the server does not say
        asked = tokens(messages=[{"role": "user", "content": "a"}], add_special_tokens=False)
        return bool(asked) and asked[: len(start)] != start

    def fetch(
        self, path: str, body: dict[str, Any] | None = None, stopped: Event | None = None, optional: bool = False
    ) -> dict[str, Any]:
        """The JSON object that GET (or POST of `body`) answers, with retries. DataError says what the server said.

        stopped: once set, nothing is tried again and no pause goes on. optional: {} when the server knows no such path.
        """
        stopped = stopped or Event()
        for attempt in range(self.tries):
            try:
                return self._once(path, body, optional)
            except _Busy as busy:
                if attempt + 1 == self.tries or stopped.is_set():
                    raise DataError(
                        f"{self.base}{path}: {busy} (tried {attempt + 1} times)",
                        "is the server up, and not overloaded? Answers so far are kept: give the same command again",
                    ) from None
                wanted = 0.5 * 2**attempt if busy.pause is None else busy.pause
                (self.pause or stopped.wait)(min(wanted, LONGEST_PAUSE))
        raise ValueError(f"tries must be at least 1, not {self.tries}")

    def _once(self, path: str, body: dict[str, Any] | None, optional: bool) -> dict[str, Any]:
        try:
            answer = ask(f"{self.base}{path}", body, self.timeout, os.environ.get(KEY))
        except RequestFailed as failed:
            if failed.status in BUSY or not failed.sent:
                raise _Busy(f"{failed.status or ''} {failed.message}".strip(), failed.pause) from None
            if optional and failed.status in UNKNOWN:
                return {}
            if failed.status is None:
                raise self._not_json(path) from None
            hint = f"set {KEY} to its API key" if failed.status in (401, 403) else None
            raise DataError(f"{self.base}{path} refused with {failed.status}: {failed.message}", hint) from None
        if not isinstance(answer, dict):
            raise self._not_json(path)
        return answer

    def _not_json(self, path: str) -> DataError:
        return DataError(f"{self.base}{path} did not answer in JSON", "is this an OpenAI-compatible server?")


class ServedPredictor:
    """A model behind a server, ready to answer; the same interface as `predict.Predictor`.

    lacks_start: the served chat template leaves out the start token, so every request asks for it.
    """

    def __init__(self, server: Server, family: Family, name: str, lacks_start: bool = False) -> None:
        self._server = server
        self._family = family
        self._name = name
        self._extra = {"add_special_tokens": True} if lacks_start else {}
        self._stopped = Event()

    def pieces(self, samples: Sequence[Sample]) -> Iterator[dict[int, str]]:
        """Sample number -> answer without surrounding spaces, as the server finishes them.

        Questions are handed out one by one, so a bounded number of pictures is in memory. The first error stops all,
        and answers not yet handed on are lost with it.
        """
        rest = iter(enumerate(samples))
        with ThreadPoolExecutor(self._server.concurrent) as pool:
            flying: dict[Future[str], int] = {}
            piece: dict[int, str] = {}
            try:
                while True:
                    for i, sample in islice(rest, self._server.concurrent - len(flying)):
                        flying[pool.submit(self._answer, sample)] = i
                    if not flying:
                        break
                    for future in wait(flying, return_when=FIRST_COMPLETED)[0]:
                        piece[flying.pop(future)] = future.result()
                    if len(piece) >= PIECE:
                        yield piece
                        piece = {}
            finally:
                self._stopped.set()
            if piece:
                yield piece

    def body(self, sample: Sample) -> dict[str, Any]:
        """The request: picture, then text, as the family asks; the server applies the chat template."""
        asked = {"model": self._name, "messages": [message(self._family.text(sample.question), png(sample.image()))]}
        return asked | self._extra | generation(self._family, task_of(sample))

    def _answer(self, sample: Sample) -> str:
        reply = self._server.fetch("/v1/chat/completions", self.body(sample), self._stopped)
        try:
            text = reply["choices"][0]["message"]["content"]
        except (LookupError, TypeError):
            raise DataError(f"{self._server.base} answered {sample.identity} without a message") from None
        return str(text or "").strip()


def generation(family: Family, task: str) -> dict[str, Any]:
    """Greedy decoding, whatever the served model's own generation settings say."""
    greedy = {"max_tokens": family.max_new_tokens[task], "temperature": 0.0, "top_p": 1.0, "n": 1, "seed": 0}
    return greedy | ({"stop": [family.reply_end]} if family.reply_end else {})
