"""Requests to a server that closes connections without notice."""

import socket
import struct
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from threading import Thread

from exporter.model.inference.openai_client import request_json

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
