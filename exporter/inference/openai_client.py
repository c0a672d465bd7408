"""Requests to a server that speaks OpenAI's chat completions: one request, its errors, and messages with a picture."""

import base64
import json
from collections.abc import Mapping
from functools import cache
from io import BytesIO
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from PIL.Image import Image

from exporter.model.hub import retry_after

if TYPE_CHECKING:
    from httpx2 import Client

LOOPBACK = frozenset(("localhost", "127.0.0.1", "::1"))
SHOWN = 500  # characters of a server's own message


class RequestFailed(Exception):
    """A request without a usable answer.

    status: the HTTP status, None when nothing came or it was not JSON. sent: whether a whole answer came.
    pause: seconds that the server asks to wait.
    """

    def __init__(self, message: str, status: int | None = None, pause: float | None = None, sent: bool = True) -> None:
        super().__init__(message)
        self.message, self.status, self.pause, self.sent = message, status, pause, sent


def ask(url: str, body: Mapping[str, Any] | None = None, seconds: float = 300.0, key: str | None = None) -> Any:
    """The JSON that GET (or POST of `body`) answers; RequestFailed with the server's own words.

    No redirect is followed: it would carry the key to another host. key: an API key.
    """
    import httpx2

    headers = {"Authorization": f"Bearer {key}"} if key else {}
    try:
        answer = client(url).request(
            "GET" if body is None else "POST", url, json=body, headers=headers, timeout=seconds
        )
    except (httpx2.HTTPError, httpx2.InvalidURL, OSError) as error:
        raise RequestFailed(f"no answer ({type(error).__name__}: {error})", sent=False) from None
    if not answer.is_success:
        pause = retry_after(answer.headers.get("Retry-After"))
        raise RequestFailed(_own_words(answer.text), answer.status_code, pause)
    try:
        return answer.json()
    except ValueError:
        raise RequestFailed("it did not answer in JSON") from None


def answers(url: str, seconds: float = 5.0) -> bool:
    """Whether GET succeeds, whatever comes back."""
    import httpx2

    try:
        return bool(client(url).get(url, timeout=seconds).is_success)
    except (httpx2.HTTPError, OSError):
        return False


def client(url: str) -> "Client":
    """The shared client of a server. Requests to this machine's own addresses ignore the environment's proxies."""
    return _client(urlsplit(url).hostname in LOOPBACK)


@cache
def _client(local: bool) -> "Client":
    import httpx2

    # Callers bound the number of open requests. Every request to this machine opens its own connection: uvicorn closes
    # a connection after an exception without announcing it, and the next request on it would fail.
    limits = httpx2.Limits(max_connections=None, max_keepalive_connections=0 if local else None)
    return httpx2.Client(follow_redirects=False, trust_env=not local, limits=limits)


def _own_words(text: str) -> str:
    """A server's message, cut short; OpenAI's and FastAPI's forms are unwrapped."""
    try:
        content = json.loads(text)
        inner = content.get("error", content)
        text = str(inner.get("message", inner) if isinstance(inner, dict) else inner)
    except (ValueError, AttributeError):
        pass
    return " ".join(text.split())[:SHOWN]


def png(image: Image) -> bytes:
    """The picture as an RGB PNG: its pixels arrive as they are."""
    file = BytesIO()
    image.convert("RGB").save(file, "PNG")
    return file.getvalue()


def data_url(content: bytes) -> str:
    """The bytes of a PNG or JPEG file as a data URL."""
    kind = "jpeg" if content.startswith(b"\xff\xd8") else "png"
    return f"data:image/{kind};base64,{base64.b64encode(content).decode()}"


def message(text: str, image: bytes) -> dict[str, Any]:
    """One message of a user: the picture (the bytes of a PNG or JPEG file), then the text."""
    parts = [{"type": "image_url", "image_url": {"url": data_url(image)}}, {"type": "text", "text": text}]
    return {"role": "user", "content": parts}
