"""Requests: to a server that closes connections without notice, refusals, and the texts of responses."""

import socket
import struct
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, HTTPServer
from threading import Thread

import pytest

from exporter.model.inference.openai_client import RequestFailed, _error_message, _piece, request_json

REPLY = b'HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: 14\r\n\r\n{"answer": 42}'
RESET = struct.pack("ii", 1, 0)  # SO_LINGER: close sends a reset


@contextmanager
def server_that_closes_connections() -> Iterator[str]:
    """A server that promises to keep each connection, and resets it when a second request comes on it."""
    listener = socket.create_server(("127.0.0.1", 0))

    def serve() -> None:
        with suppress(OSError):
            while True:
                connection, _ = listener.accept()
                Thread(target=answer_once, args=(connection,), daemon=True).start()

    Thread(target=serve, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
    finally:
        listener.close()


def answer_once(connection: socket.socket) -> None:
    with connection:
        connection.recv(65536)
        connection.sendall(REPLY)
        connection.recv(65536)
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET)


def test_a_request_to_this_machine_never_uses_a_connection_that_the_server_may_have_closed():
    with server_that_closes_connections() as url:
        assert [request_json(url)["answer"] for _ in range(3)] == [42, 42, 42]


@contextmanager
def answering(status: int, headers: dict[str, str], body: bytes) -> Iterator[str]:
    """A server that gives one response to every request."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(status)
            for name, value in headers.items():
                self.send_header(name, value)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *arguments: object) -> None:
            """Write nothing."""

    with HTTPServer(("127.0.0.1", 0), Handler) as server:
        Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        try:
            yield f"http://127.0.0.1:{server.server_port}"
        finally:
            server.shutdown()


def test_a_refusal_has_the_servers_status_message_and_pause() -> None:
    body = b'{"error": {"message": "too\\n many"}}'
    with answering(429, {"Retry-After": "7"}, body) as url, pytest.raises(RequestFailed) as caught:
        request_json(url)
    failed = caught.value
    assert (failed.message, failed.status, failed.pause, failed.sent) == ("too many", 429, 7.0, True)


def test_a_response_that_is_not_json_is_an_error_without_a_status() -> None:
    with answering(200, {}, b"hello") as url, pytest.raises(RequestFailed, match="the response is not JSON") as caught:
        request_json(url)
    assert (caught.value.status, caught.value.pause, caught.value.sent) == (None, None, True)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"detail": "no"}', "{'detail': 'no'}"),
        ('{"error": "a  b"}', "a b"),
        ('{"error": {"message": "c"}}', "c"),
        ("[1]", "[1]"),
        ("plain", "plain"),
        ("x" * 600, "x" * 500),
    ],
)
def test_the_message_of_an_error_is_unwrapped_and_bounded(text: str, message: str) -> None:
    assert _error_message(text) == message


@pytest.mark.parametrize(
    ("event", "text"),
    [
        ('{"choices": [{"delta": {"content": "a"}}]}', "a"),
        ('{"choices": [{"message": {"content": "b"}}]}', "b"),
        ('{"choices": [{"delta": {"content": null}}]}', ""),
        ('{"choices": [{}, {"delta": {"content": "second"}}]}', ""),
        ('{"choices": []}', ""),
    ],
)
def test_the_text_of_an_event_is_that_of_its_first_choice(event: str, text: str) -> None:
    assert _piece(event) == text
    with pytest.raises(RequestFailed, match="the stream contains no chat completion: x"):
        _piece("x")
