"""Answers questions through a server with OpenAI's chat-completions API over HTTP, such as `vllm serve`.

Decoding is greedy. A bounded number of requests is open at a time. Temporary failures (no connection, 429, 5xx) are
retried after a growing pause; refusals (4xx) are errors at once.
"""

import os
import shlex
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from threading import Event
from typing import Any
from urllib.parse import urlsplit

from exporter.data.tasks.sample import Sample, task_of
from exporter.errors import DataError
from exporter.model.embedded import MODELS
from exporter.model.families import Family
from exporter.model.inference.openai_client import LOOPBACK, RequestFailed, message, png, request_json, stream_text
from exporter.model.inference.text_stream import TextStream

KEY = "MMQ_SERVER_KEY"  # environment variable with the server's API key, which is sent but never shown or stored
BUSY = frozenset((408, 409, 425, 429, 500, 502, 503, 504))
UNKNOWN = frozenset((404, 405, 501))
CONNECT_SECONDS = 10.0  # seconds until a server that does not respond is an error
LONGEST_PAUSE = 60.0  # seconds; a limit on the server's Retry-After too
PIECE = 32  # answers that `pieces` yields together


class _Busy(Exception):
    """The server cannot answer now. pause: seconds to wait according to the server, or None. sent: as RequestFailed."""

    def __init__(self, message: str, pause: float | None = None, sent: bool = True) -> None:
        super().__init__(message)
        self.pause, self.sent = pause, sent


@dataclass(frozen=True)
class Server:
    """An OpenAI-compatible server.

    url: with or without /v1 at the end. model: the name under which the server serves the model; None when it serves
    only one model. concurrent: number of open requests. tries: attempts per request. timeout: seconds per request.
    pause: called with the seconds to wait before a retry; None waits for real. serves: the artifact or model that it
    should serve, for hints.
    """

    url: str
    model: str | None = None
    concurrent: int = 16
    tries: int = 6
    timeout: float = 300.0
    pause: Callable[[float], object] | None = None
    serves: str = field(default="", compare=False)

    @property
    def base(self) -> str:
        """The URL without /v1 (DataError when it is not an HTTP URL, or contains a password)."""
        parts = urlsplit(self.url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise DataError(f"'{self.url}' is not an HTTP server URL", "pass a URL like http://127.0.0.1:8000")
        if parts.username or parts.password:
            raise DataError("a server URL must not contain a user name or password", f"set {KEY} instead")
        return self.url.rstrip("/").removesuffix("/v1")

    def served(self) -> dict[str, Any]:
        """The entry of /v1/models for the model to use (DataError when the server does not serve it)."""
        listed = self.fetch("/v1/models").get("data")
        entries = [entry for entry in listed if isinstance(entry, dict)] if isinstance(listed, list) else []
        names = [str(entry.get("id")) for entry in entries]
        if self.model is None and len(entries) == 1:
            return dict(entries[0])
        if self.model in names:
            return dict(entries[names.index(self.model)])
        problem = f"does not serve '{self.model}'" if self.model else "does not serve exactly one model"
        raise DataError(
            f"{self.base} {problem}; it serves: {', '.join(names) or 'nothing'}", "pass one of the listed names"
        )

    def lacks_start(self, name: str) -> bool:
        """Whether the served chat template leaves out the start token that the tokenizer puts before every text.

        Uses vLLM's `/tokenize`; False for a server without it.
        """

        def tokens(**request: Any) -> list[Any]:
            response = self.fetch("/tokenize", {"model": name, **request}, optional=True).get("tokens")
            return response if isinstance(response, list) else []

        bare, whole = (tokens(prompt="a", add_special_tokens=add) for add in (False, True))
        start = whole[: len(whole) - len(bare)]
        if not bare or not start or whole[len(start) :] != bare:
            return False  # the tokenizer has no start token, or the server does not report tokens
        chat = tokens(messages=[{"role": "user", "content": "a"}], add_special_tokens=False)
        return bool(chat) and chat[: len(start)] != start

    def require_connection(self, why: str) -> None:
        """One request without retries; DataError if no response arrives. why: why that is an error, for the message."""
        try:
            request_json(f"{self.base}/v1/models", None, CONNECT_SECONDS, os.environ.get(KEY))
        except RequestFailed as failed:
            if not failed.sent:
                message = f"{self.base}/v1/models: {failed.message}, and {why}"
                raise DataError(message, self.start_hint()) from None

    def start_hint(self) -> str:
        """How to start the server that does not respond: the command for what it should serve, on its port."""
        parts = urlsplit(self.base)
        place = "" if parts.hostname in LOOPBACK else f" on {parts.hostname}"
        if not self.serves:
            return f"start the server{place}, or correct its URL"
        folder = MODELS.get(self.serves, Path(self.serves).expanduser())
        words = ["mmq" if folder.is_dir() else "vllm", "serve", str(folder if folder.is_dir() else self.serves)]
        command = shlex.join([*words, "--port", str(parts.port or (443 if parts.scheme == "https" else 80))])
        return f"start the server{place} with `{command}` and wait until it is ready, or correct its URL"

    def fetch(
        self, path: str, body: dict[str, Any] | None = None, stopped: Event | None = None, optional: bool = False
    ) -> dict[str, Any]:
        """The JSON object that GET, or POST of `body`, returns, with retries. DataError contains the server's message.

        stopped: once set, nothing is retried and pauses end. optional: return {} when the server does not have the
        path.
        """
        stopped = stopped or Event()
        for attempt in range(self.tries):
            try:
                return self._fetch_once(path, body, optional)
            except _Busy as busy:
                if attempt + 1 == self.tries or stopped.is_set():
                    again = "then run the same command again" + ": it keeps the answers so far" * (self.tries > 1)
                    hint = "wait until the server is less loaded, or lower --concurrent" if busy.sent else ""
                    raise DataError(
                        f"{self.base}{path}: {busy}{f' (tried {attempt + 1} times)' * (attempt > 0)}",
                        f"{hint or self.start_hint()}; {again}",
                    ) from None
                seconds = 0.5 * 2**attempt if busy.pause is None else busy.pause
                (self.pause or stopped.wait)(min(seconds, LONGEST_PAUSE))
        raise ValueError(f"tries must be at least 1, not {self.tries}")

    def _fetch_once(self, path: str, body: dict[str, Any] | None, optional: bool) -> dict[str, Any]:
        try:
            response = request_json(f"{self.base}{path}", body, self.timeout, os.environ.get(KEY))
        except RequestFailed as failed:
            if failed.status in BUSY or not failed.sent:
                raise _Busy(f"{failed.status or ''} {failed.message}".strip(), failed.pause, failed.sent) from None
            if optional and failed.status in UNKNOWN:
                return {}
            if failed.status is None:
                raise self._not_json(path) from None
            hint = f"set {KEY} to its API key" if failed.status in (401, 403) else None
            raise DataError(f"{self.base}{path} failed with HTTP {failed.status}: {failed.message}", hint) from None
        if not isinstance(response, dict):
            raise self._not_json(path)
        return response

    def _not_json(self, path: str) -> DataError:
        return DataError(
            f"{self.base}{path} did not return a JSON object", "check that this is an OpenAI-compatible server"
        )


class ServedPredictor:
    """Answers questions with a model behind a server; has the same interface as `predict.Predictor`.

    lacks_start: the served chat template leaves out the start token, so every request adds it.
    """

    def __init__(self, server: Server, family: Family, name: str, lacks_start: bool = False) -> None:
        self._server = server
        self._family = family
        self._name = name
        self._extra = {"add_special_tokens": True} if lacks_start else {}
        self._stopped = Event()

    def pieces(self, samples: Sequence[Sample]) -> Iterator[dict[int, str]]:
        """Yield sample number -> answer without surrounding spaces, in the order in which the server finishes them.

        Samples are submitted one at a time, so that a bounded number of pictures is in memory. The first error stops
        all requests, and loses the answers that were not yet yielded.
        """
        remaining = iter(enumerate(samples))
        with ThreadPoolExecutor(self._server.concurrent) as pool:
            pending: dict[Future[str], int] = {}
            piece: dict[int, str] = {}
            try:
                while True:
                    for i, sample in islice(remaining, self._server.concurrent - len(pending)):
                        pending[pool.submit(self._answer, sample)] = i
                    if not pending:
                        break
                    for future in wait(pending, return_when=FIRST_COMPLETED)[0]:
                        piece[pending.pop(future)] = future.result()
                    if len(piece) >= PIECE:
                        yield piece
                        piece = {}
            finally:
                self._stopped.set()
            if piece:
                yield piece

    def body(self, sample: Sample) -> dict[str, Any]:
        """The request body: picture, then the family's text; the server applies the chat template."""
        messages = [message(self._family.text(sample.question), png(sample.image()))]
        return {"model": self._name, "messages": messages} | self._extra | generation(self._family, task_of(sample))

    def stream(self, sample: Sample, longest: int, on_text: Callable[[str], object]) -> str:
        """The answer to one sample, of at most `longest` tokens; `on_text` gets each new piece of it. No retries."""
        stream, url = TextStream(None, on_text), f"{self._server.base}/v1/chat/completions"
        body = self.body(sample) | {"max_tokens": longest}
        try:
            for piece in stream_text(url, body, self._server.timeout, os.environ.get(KEY)):
                stream.add(piece)
            stream.end()
        except RequestFailed as failed:
            status = f" with HTTP {failed.status}" if failed.status else ""
            hint = "the server's log has the reason" if failed.sent else self._server.start_hint()
            raise DataError(f"{url} failed{status}: {failed.message}", hint) from None
        return stream.text

    def _answer(self, sample: Sample) -> str:
        reply = self._server.fetch("/v1/chat/completions", self.body(sample), self._stopped)
        try:
            text = reply["choices"][0]["message"]["content"]
        except (LookupError, TypeError):
            raise DataError(f"{self._server.base} returned no message for sample {sample.identity}") from None
        return str(text or "").strip()


def generation(family: Family, task: str) -> dict[str, Any]:
    """Request fields for greedy decoding, independent of the served model's own generation settings."""
    greedy = {"max_tokens": family.max_new_tokens[task], "temperature": 0.0, "top_p": 1.0, "n": 1, "seed": 0}
    return greedy | ({"stop": [family.reply_end]} if family.reply_end else {})
