"""The operator's scripts with a fake server on the loopback address and a fake `vllm` command."""

import base64
import io
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest
from PIL import Image

SERVING = Path(__file__).parent.parent / "serving"


class Server(HTTPServer):
    """Answers like vLLM and stores the last chat request."""

    answer: str | None = "red"
    status = 200
    request: dict | None = None


class Handler(BaseHTTPRequestHandler):
    server: Server

    def reply(self, status: int, body: dict) -> None:
        data = json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def do_GET(self) -> None:
        self.reply(*((200, {"data": [{"id": "tiny"}]}) if self.path == "/v1/models" else (404, {})))

    def do_POST(self) -> None:
        self.server.request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        message = {"role": "assistant", "content": self.server.answer}
        ok = self.server.status == 200 and self.path == "/v1/chat/completions"
        self.reply(200 if ok else 400, {"choices": [{"message": message}]} if ok else {"error": "no such image"})

    def log_message(self, *arguments: object) -> None:
        """Keep the test output quiet."""


@pytest.fixture
def server() -> Iterator[Server]:
    running = Server(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=running.serve_forever, daemon=True)
    thread.start()
    yield running
    running.shutdown()
    thread.join()
    running.server_close()


def smoke(server: Server, *arguments: str) -> subprocess.CompletedProcess[str]:
    url = f"http://127.0.0.1:{server.server_port}/v1/"
    command = [sys.executable, str(SERVING / "smoke.py"), "--url", url, *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=60)


def sent_image(server: Server) -> Image.Image:
    assert server.request is not None
    url = server.request["messages"][0]["content"][0]["image_url"]["url"]
    kind, _, data = url.partition(",")
    assert kind == "data:image/png;base64"
    return Image.open(io.BytesIO(base64.b64decode(data, validate=True)))


def test_smoke_sends_a_question_with_a_readable_picture(server):
    done = smoke(server, "--question", "What color?")
    assert (done.returncode, done.stdout) == (0, "tiny: red\n"), done.stderr
    assert server.request["model"] == "tiny"
    assert server.request["messages"][0]["content"][1] == {"type": "text", "text": "What color?"}
    picture = sent_image(server)
    assert picture.getcolors() == [(64 * 64, (255, 0, 0))]


def test_smoke_sends_the_given_picture(server, tmp_path):
    Image.new("RGB", (5, 7), (1, 2, 3)).save(tmp_path / "own.png")
    assert smoke(server, "--image", str(tmp_path / "own.png")).returncode == 0
    assert sent_image(server).size == (5, 7)


@pytest.mark.parametrize("answer", ["", "  \n", None])
def test_smoke_fails_on_an_empty_answer(server, answer):
    server.answer = answer
    done = smoke(server)
    assert done.returncode == 1
    assert "empty answer" in done.stderr


def test_smoke_waits_for_the_right_answer(server):
    assert smoke(server, "--expect", "RED").returncode == 0
    done = smoke(server, "--expect", "blue")
    assert done.returncode == 1
    assert "answered 'red', which does not contain 'blue'" in done.stderr


def test_smoke_fails_with_the_servers_own_words(server):
    server.status = 400
    done = smoke(server)
    assert done.returncode == 1
    assert "400" in done.stderr
    assert "no such image" in done.stderr


def test_smoke_fails_without_a_server(server):
    url = f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()
    command = [sys.executable, str(SERVING / "smoke.py"), "--url", url]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 1
    assert "Traceback" not in done.stderr


@pytest.fixture
def launch(tmp_path):
    """Runs launch.sh with a `vllm` that prints its arguments, one per line."""
    fake = tmp_path / "bin" / "vllm"
    fake.parent.mkdir()
    fake.write_text('#!/bin/sh\necho "offline=$HF_HUB_OFFLINE"\nprintf "%s\\n" "$@"\n')
    fake.chmod(0o755)

    def run(*arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
        environment = {"PATH": f"{fake.parent}{os.pathsep}{os.environ['PATH']}", **variables}
        command = ["bash", str(SERVING / "launch.sh"), *arguments]
        return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=60)

    return run


def test_launch_serves_the_folder_on_loopback_under_its_name(launch, tmp_path):
    artifact = tmp_path / "my artifact"
    artifact.mkdir()
    (artifact / "config.json").write_text("{}")
    lines = launch(str(artifact), "--enforce-eager").stdout.splitlines()
    assert lines[0] == "offline=1"
    assert lines[1:3] == ["serve", str(artifact)]
    flags = dict(zip(lines[3:-1:2], lines[4::2], strict=True))
    assert flags["--host"] == "127.0.0.1"
    assert flags["--port"] == "8000"
    assert flags["--served-model-name"] == "my artifact"
    assert json.loads(flags["--limit-mm-per-prompt"]) == {"image": 1}
    assert lines[-1] == "--enforce-eager"


def test_launch_listens_on_the_given_address(launch, tmp_path):
    (tmp_path / "config.json").write_text("{}")
    lines = launch(str(tmp_path), HOST="0.0.0.0", PORT="9").stdout.splitlines()
    assert lines[lines.index("--host") + 1] == "0.0.0.0"
    assert lines[lines.index("--port") + 1] == "9"


@pytest.mark.parametrize(("arguments", "word"), [((), "usage"), (("nowhere",), "no folder"), ((".",), "config.json")])
def test_launch_refuses_what_is_no_artifact(launch, tmp_path, monkeypatch, arguments, word):
    monkeypatch.chdir(tmp_path)
    done = launch(*arguments)
    assert done.returncode == 2
    assert word in done.stderr
    assert done.stdout == ""
