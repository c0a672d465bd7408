"""A chat completions server on loopback for tests: it answers by a function and can fail first on request."""

import base64
import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from io import BytesIO
from typing import Any

from PIL import Image

Answer = Callable[[str, Image.Image], str]


class ChatServer(ThreadingHTTPServer):
    """faults: (status, headers, body) that the next requests get instead of an answer, in turn.

    start: what tokenizer and chat template put before a text, as vLLM's `/tokenize` shows; None: no such path.
    """

    daemon_threads = True

    def __init__(self, answer: Answer, models: list[dict[str, Any]]) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.answer = answer
        self.models = models
        self.start: tuple[str, str] | None = None
        self.faults: list[tuple[int, dict[str, str], str]] = []
        self.bodies: list[dict[str, Any]] = []
        self.headers: list[dict[str, str]] = []
        self.most_at_once = 0
        self.open = 0
        self.lock = threading.Lock()
        self.gate: threading.Barrier | None = None

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


class Handler(BaseHTTPRequestHandler):
    disable_nagle_algorithm = True  # headers and body are two writes: the second would wait 40 ms for the client's ACK
    server: ChatServer

    def log_message(self, *arguments: Any) -> None:
        pass

    def do_GET(self) -> None:
        self._send(200, {}, json.dumps({"object": "list", "data": self.server.models}))

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if self.path == "/tokenize":
            return self._tokenize(body)
        with self.server.lock:
            self.server.headers.append(dict(self.headers))
            fault = self.server.faults.pop(0) if self.server.faults else None
            self.server.open += 1
            self.server.most_at_once = max(self.server.most_at_once, self.server.open)
        try:
            if self.server.gate:
                self.server.gate.wait(timeout=10)
            if fault:
                return self._send(*fault)
            picture, text = body["messages"][0]["content"]
            image = Image.open(BytesIO(base64.b64decode(picture["image_url"]["url"].partition(",")[2])))
            answer = self.server.answer(text["text"], image)
            with self.server.lock:
                self.server.bodies.append(body)
            self._send(200, {}, events(answer) if body.get("stream") else reply(answer))
        finally:
            with self.server.lock:
                self.server.open -= 1

    def _tokenize(self, body: dict[str, Any]) -> None:
        if self.server.start is None:
            return self._send(404, {}, "{}")
        tokenizer, template = self.server.start
        text = body["prompt"] if "prompt" in body else f"{template}USER: {body['messages'][0]['content']}"
        shown = tokenizer * body["add_special_tokens"] + text
        self._send(200, {}, json.dumps({"count": len(shown), "tokens": [ord(letter) for letter in shown]}))

    def _send(self, status: int, headers: dict[str, str], body: str) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body.encode())))
        self.end_headers()
        self.wfile.write(body.encode())


def reply(content: str) -> str:
    """A whole chat completion."""
    return json.dumps({"choices": [{"message": {"role": "assistant", "content": content}}]})


def events(content: str) -> str:
    """A chat completion as server-sent events, as vLLM sends it: the role, one piece for every word, the end."""
    pieces = [{"role": "assistant", "content": ""}, *({"content": f"{word} "} for word in content.split(" ")), {}]
    lines = [f"data: {json.dumps({'choices': [{'index': 0, 'delta': piece}]})}\n\n" for piece in pieces]
    return "".join([": comment\n\n", *lines, f"data: {json.dumps({'choices': []})}\n\n", "data: [DONE]\n\n"])


@contextmanager
def chat_server(answer: Answer, *models: str, **details: Any) -> Iterator[ChatServer]:
    """A running server; details go into the entry of its first model."""
    entries: list[dict[str, Any]] = [{"id": name, "object": "model"} for name in models or ("tiny",)]
    entries[0] |= details
    server = ChatServer(answer, entries)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
