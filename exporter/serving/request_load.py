"""Requests of several clients to a served model, in a closed loop, with the time of every piece of an answer."""

import json
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import count
from statistics import median
from typing import Any

from exporter.errors import ServeError
from exporter.model.inference.openai_client import RequestFailed, stream_events


@dataclass(frozen=True)
class TimedAnswer:
    """Seconds from the request to the first text and to the end, and the number of generated tokens."""

    first: float
    last: float
    tokens: int


@dataclass(frozen=True)
class LoadResult:
    """Figures of one load: seconds of the whole, and its answers."""

    seconds: float
    answers: tuple[TimedAnswer, ...]

    @property
    def first_token(self) -> float:
        """Median seconds to the first text."""
        return median(answer.first for answer in self.answers)

    @property
    def rate(self) -> float:
        """Generated tokens of all clients per second, prompts included."""
        return sum(answer.tokens for answer in self.answers) / max(self.seconds, 1e-9)


def timed_answer(url: str, body: Mapping[str, Any], seconds: float = 600.0) -> TimedAnswer:
    """Send one request and read its stream; ServeError when the server refuses it or ends."""
    start = time.perf_counter()
    first, tokens, pieces = None, 0, 0
    try:
        for content in stream_events(url, {**body, "stream_options": {"include_usage": True}}, seconds):
            event = json.loads(content)
            if any((choice.get("delta") or {}).get("content") for choice in event.get("choices") or ()):
                first = first or time.perf_counter() - start
                pieces += 1
            tokens = int((event.get("usage") or {}).get("completion_tokens") or tokens)
    except (RequestFailed, ValueError) as error:
        raise ServeError(f"a request failed: {error}") from None
    last = time.perf_counter() - start
    return TimedAnswer(first or last, last, tokens or pieces)


def run_load(url: str, bodies: Sequence[Mapping[str, Any]], clients: int, requests: int) -> LoadResult:
    """Each of `clients` sends `requests` requests, the next after the answer; together they cycle through `bodies`."""
    numbers = count()

    def client(_: int) -> list[TimedAnswer]:
        return [timed_answer(url, bodies[next(numbers) % len(bodies)]) for _ in range(requests)]

    start = time.perf_counter()
    with ThreadPoolExecutor(clients) as pool:
        answers = [answer for part in pool.map(client, range(clients)) for answer in part]
    return LoadResult(time.perf_counter() - start, tuple(answers))
