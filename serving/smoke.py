"""Smoke test of a running server: one question about one image; exit code 0 only for a non-empty or expected answer.

    python serving/smoke.py [--url http://127.0.0.1:8000] [--image PICTURE] [--question TEXT] [--expect TEXT] [--wait S]

Needs only the standard library. Without --image it sends a generated red square.
"""

import argparse
import base64
import json
import mimetypes
import struct
import sys
import time
import urllib.error
import urllib.request
import zlib
from pathlib import Path
from typing import Any

QUESTION = "What color is the shape?\nAnswer the question using a single word or phrase."


def red_square(side: int = 64) -> bytes:
    """A PNG of one red square, `[side, side]` pixels of 8-bit RGB (PNG specification, sections 5 and 11)."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    rows = (b"\0" + b"\xff\0\0" * side) * side  # each row starts with its filter type, 0
    size = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", size) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


def data_url(path: str | None) -> str:
    """The picture at `path` (default: a red square) as a data URL for a chat request."""
    data = Path(path).read_bytes() if path else red_square()
    kind = (mimetypes.guess_type(path)[0] if path else None) or "image/png"
    return f"data:{kind};base64,{base64.b64encode(data).decode()}"


def fetch(url: str, timeout: float, body: dict[str, Any] | None = None) -> Any:
    """The JSON response to a GET, or to a POST of `body`."""
    data = json.dumps(body).encode() if body is not None else None
    request = urllib.request.Request(url, data, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=timeout) as answer:
        return json.loads(answer.read())


def wait_until_up(url: str, seconds: float) -> str:
    """Name of the served model; retries until the server responds or `seconds` have passed."""
    deadline = time.monotonic() + seconds
    while True:
        try:
            return str(fetch(f"{url}/v1/models", timeout=10)["data"][0]["id"])
        except (urllib.error.URLError, ConnectionError, TimeoutError):
            if time.monotonic() >= deadline:
                raise
            time.sleep(1)


def ask(url: str, model: str, question: str, image: str, timeout: float) -> str:
    """The model's greedy answer to `question` about `image` (a data URL)."""
    content = [{"type": "image_url", "image_url": {"url": image}}, {"type": "text", "text": question}]
    messages = [{"role": "user", "content": content}]
    body = {"model": model, "messages": messages, "max_tokens": 32, "temperature": 0}
    return str(fetch(f"{url}/v1/chat/completions", timeout, body)["choices"][0]["message"]["content"] or "").strip()


def main(arguments: list[str] | None = None) -> int:
    """Run the smoke test; returns the exit code."""
    parser = argparse.ArgumentParser(description="Ask a running server one question about one image.")
    parser.add_argument("--url", default="http://127.0.0.1:8000")
    parser.add_argument("--image", help="picture file (default: a red square)")
    parser.add_argument("--question", default=QUESTION)
    parser.add_argument("--expect", default="", metavar="TEXT", help="fail unless the answer contains this text")
    parser.add_argument("--wait", type=float, default=0, help="seconds to wait for the server to start")
    parser.add_argument("--timeout", type=float, default=120, help="seconds to wait for the answer")
    options = parser.parse_args(arguments)
    url = options.url.rstrip("/").removesuffix("/v1")
    try:
        model = wait_until_up(url, options.wait)
        answer = ask(url, model, options.question, data_url(options.image), options.timeout)
    except urllib.error.HTTPError as error:
        print(f"{error.url} answered {error.code}: {error.read(2000).decode(errors='replace')}", file=sys.stderr)
        return 1
    except (OSError, ValueError, LookupError) as error:
        print(f"no valid answer from {url}: {error!r}", file=sys.stderr)
        return 1
    if not answer:
        print(f"{model} returned an empty answer", file=sys.stderr)
        return 1
    if options.expect.lower() not in answer.lower():
        print(f"{model} answered '{answer}', which does not contain '{options.expect}'", file=sys.stderr)
        return 1
    print(f"{model}: {answer}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
