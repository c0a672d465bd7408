"""HTTP client for servers with OpenAI's chat-completions API: requests, their errors, and messages with a picture."""

import base64
import json
from collections.abc import Iterator, Mapping
from functools import cache
from io import BytesIO
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from PIL.Image import Image

from exporter.files.hub import retry_after

if TYPE_CHECKING:
    from httpx2 import Client

LOOPBACK = frozenset(("localhost", "127.0.0.1", "::1"))
MAX_MESSAGE = 500  # characters of a server's message in an error


class RequestFailed(Exception):
    """A request without a usable response.

    status: the HTTP status, None when there was no response or it was not JSON. sent: whether a complete response
    arrived. pause: seconds to wait according to the server.
    """

    def __init__(self, message: str, status: int | None = None, pause: float | None = None, sent: bool = True) -> None:
        super().__init__(message)
        self.message, self.status, self.pause, self.sent = message, status, pause, sent


def request_json(
    url: str, body: Mapping[str, Any] | None = None, seconds: float = 300.0, key: str | None = None
) -> Any:
    """The JSON response of GET, or of POST with `body`; RequestFailed with the server's message.

    Redirects are not followed, because they would send the key to another host. key: an API key.
    """
    import httpx2

    headers = {"Authorization": f"Bearer {key}"} if key else {}
    try:
        response = client(url).request(
            "GET" if body is None else "POST", url, json=body, headers=headers, timeout=seconds
        )
    except (httpx2.HTTPError, httpx2.InvalidURL, OSError) as error:
        raise RequestFailed(f"no response ({type(error).__name__}: {error})", sent=False) from None
    if not response.is_success:
        pause = retry_after(response.headers.get("Retry-After"))
        raise RequestFailed(_error_message(response.text), response.status_code, pause)
    try:
        return response.json()
    except ValueError:
        raise RequestFailed("the response is not JSON") from None


def stream_text(url: str, body: Mapping[str, Any], seconds: float = 300.0, key: str | None = None) -> Iterator[str]:
    """The pieces of a chat completion, as the server sends them; RequestFailed as for `request_json`.

    A server that does not stream sends one piece.
    """
    return map(_piece, stream_events(url, body, seconds, key))


def stream_events(url: str, body: Mapping[str, Any], seconds: float = 300.0, key: str | None = None) -> Iterator[str]:
    """The JSON texts of a streamed response, as the server sends them; RequestFailed as for `request_json`."""
    import httpx2

    headers = {"Authorization": f"Bearer {key}"} if key else {}
    streamed = {**body, "stream": True}
    try:
        with client(url).stream("POST", url, json=streamed, headers=headers, timeout=seconds) as response:
            if not response.is_success:
                response.read()
                raise RequestFailed(_error_message(response.text), response.status_code)
            for line in response.iter_lines():
                content = line.removeprefix("data:").strip()
                if content and content != "[DONE]" and not content.startswith(":"):
                    yield content
    except (httpx2.HTTPError, httpx2.InvalidURL, OSError) as error:
        raise RequestFailed(f"no response ({type(error).__name__}: {error})", sent=False) from None


def _piece(content: str) -> str:
    """The text of one event of a stream, or of a whole response."""
    try:
        choice = (json.loads(content)["choices"] or [{}])[0]
        text = (choice.get("delta") or choice.get("message") or {}).get("content")
    except (ValueError, LookupError, TypeError, AttributeError):
        raise RequestFailed(f"the stream contains no chat completion: {_error_message(content)}") from None
    return str(text or "")


def responds(url: str, seconds: float = 5.0) -> bool:
    """Whether GET succeeds, with any content."""
    import httpx2

    try:
        return bool(client(url).get(url, timeout=seconds).is_success)
    except (httpx2.HTTPError, OSError):
        return False


def client(url: str) -> "Client":
    """The shared client for a server; requests to this machine's own addresses ignore the environment's proxies."""
    return _client(urlsplit(url).hostname in LOOPBACK)


@cache
def _client(local: bool) -> "Client":
    import httpx2

    # Callers limit the number of open requests. Every request to this machine opens a new connection, because uvicorn
    # closes a connection after an exception without a notice, and the next request on it would fail.
    limits = httpx2.Limits(max_connections=None, max_keepalive_connections=0 if local else None)
    return httpx2.Client(follow_redirects=False, trust_env=not local, limits=limits)


def _error_message(text: str) -> str:
    """The message in a server's error response, shortened; unwraps OpenAI's and FastAPI's formats."""
    try:
        content = json.loads(text)
        inner = content.get("error", content)
        text = str(inner.get("message", inner) if isinstance(inner, dict) else inner)
    except (ValueError, AttributeError):
        pass
    return " ".join(text.split())[:MAX_MESSAGE]


def png(image: Image) -> bytes:
    """The picture as an RGB PNG, which preserves its pixels."""
    file = BytesIO()
    image.convert("RGB").save(file, "PNG")
    return file.getvalue()


def data_url(content: bytes) -> str:
    """The content of a PNG or JPEG file as a data URL."""
    kind = "jpeg" if content.startswith(b"\xff\xd8") else "png"
    return f"data:image/{kind};base64,{base64.b64encode(content).decode()}"


def message(text: str, image: bytes) -> dict[str, Any]:
    """A user message with a picture (the content of a PNG or JPEG file), then the text."""
    parts = [{"type": "image_url", "image_url": {"url": data_url(image)}}, {"type": "text", "text": text}]
    return {"role": "user", "content": parts}
