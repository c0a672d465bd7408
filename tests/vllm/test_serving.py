"""A real vLLM serves the exported demo model: chat by curl and openai client, the check, load, abuse, and a crash."""

import io
import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from exporter.check import png
from exporter.cli_serve import questions
from exporter.errors import ServeError
from exporter.families import FAMILIES
from exporter.predict import prompt_text
from exporter.runtime.launch import Program
from exporter.runtime.vllm_engine import Engine, free_port, message, post
from exporter.show_serving import python_line, shell_line
from exporter.tasks.sample import Sample

CLIENTS, ROUNDS = 8, 4
SURE = -0.2  # log-probability of the least likely token: below it, another batch may round to another token


@pytest.fixture(scope="module")
def asked(artifact: Path) -> list[Sample]:
    return [sample for sample in questions(artifact, (), 64) if sample.question]


@pytest.fixture(scope="module")
def answers(engine: Engine, asked: list[Sample]) -> dict[str, str]:
    """Sample id -> answer, for the answers that the model is sure of, asked one after the other."""
    replies = {sample.identity: ask(engine, sample) for sample in asked}
    sure = {name: reply.text for name, reply in replies.items() if min(reply.logprobs) > SURE}
    assert len(sure) >= 10
    return sure


def ask(engine: Engine, sample: Sample) -> Any:
    return engine.ask(prompt_text(FAMILIES["llava"], sample), png(sample), max_tokens=8)


def test_answers_are_right(asked: list[Sample], answers: dict[str, str]):
    """Not only some text: the trained demo model knows the shapes."""
    sure = [sample for sample in asked if sample.identity in answers]
    right = [answers[s.identity].strip() in s.references for s in sure]
    assert sum(right) >= 0.85 * len(right)


@pytest.mark.parametrize("line", [shell_line, python_line], ids=["curl", "openai"])
def test_the_lines_that_serve_prints_work(engine: Engine, engine_python: str, line: Any):
    path = f"{Path(engine_python).parent}{os.pathsep}{os.environ['PATH']}"
    done = subprocess.run(
        ["bash", "-c", line(engine.launch)],
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, "PATH": path},
    )
    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout)["choices"][0]["message"]["content"] if line is shell_line else done.stdout
    assert said.strip()


def together(engine: Engine, chosen: Sequence[Sample]) -> list[str]:
    """Answers of eight clients that ask at once."""
    with ThreadPoolExecutor(CLIENTS) as pool:
        return [reply.text for reply in pool.map(lambda sample: ask(engine, sample), chosen)]


def test_eight_clients_get_the_answers_of_one(engine: Engine, asked: list[Sample], answers: dict[str, str]):
    chosen = [sample for sample in asked if sample.identity in answers] * ROUNDS
    assert together(engine, chosen) == [answers[sample.identity] for sample in chosen]


def body(engine: Engine, url: str) -> dict[str, Any]:
    content = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": "what ?"}]
    return {"model": engine.launch.model, "messages": [{"role": "user", "content": content}], "max_tokens": 4}


@pytest.mark.parametrize(
    "url",
    [
        "data:image/png;base64,bm90IGEgcGljdHVyZQ==",
        "data:image/png;base64,%%%",
        "data:image/png;base64,",
        "data:text/plain;base64,aGVsbG8=",
        "/etc/passwd",
        "file:///etc/passwd",
        "http://127.0.0.1:9/none.png",
    ],
)
def test_a_bad_image_is_refused_and_the_server_lives(
    engine: Engine, asked: list[Sample], answers: dict[str, str], url: str
):
    with pytest.raises(ServeError, match=r"answered [45]\d\d"):
        post(f"{engine.launch.url}/v1/chat/completions", body(engine, url), 60)
    sample = next(sample for sample in asked if sample.identity in answers)
    assert ask(engine, sample).text == answers[sample.identity]


def test_two_images_are_refused(engine: Engine, asked: list[Sample]):
    one = message("what ?", png(asked[0]))
    one["content"] = [one["content"][0], *one["content"]]
    with pytest.raises(ServeError, match="answered 4"):
        post(f"{engine.launch.url}/v1/chat/completions", {**body(engine, ""), "messages": [one]}, 60)


def test_a_huge_image_is_answered_or_refused(engine: Engine, asked: list[Sample], answers: dict[str, str]):
    """Thirty-six million pixels, and a side of one: neither may hang or end the server."""
    for size in ((6000, 6000), (1, 3000), (1, 1)):
        file = io.BytesIO()
        Image.new("RGB", size, (255, 0, 0)).save(file, "PNG")
        with suppress(ServeError):  # a refusal; what must not happen shows below
            engine.ask("what ?", file.getvalue(), 4)
    sample = next(sample for sample in asked if sample.identity in answers)
    assert ask(engine, sample).text == answers[sample.identity]


def test_cancelled_requests_leave_no_trace(engine: Engine, asked: list[Sample], answers: dict[str, str]):
    """Clients that hang up while they wait; those that stay get their answers."""
    host, port = engine.launch.url.removeprefix("http://").split(":")
    sure = [sample for sample in asked if sample.identity in answers]

    def hang_up(sample: Sample) -> None:
        request = {**body(engine, ""), "messages": [message("what ?", png(sample))], "max_tokens": 64}
        data = json.dumps(request).encode()
        with socket.create_connection((host, int(port)), timeout=30) as connection:
            head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: {host}\r\nContent-Type: application/json\r\n"
            connection.sendall(f"{head}Content-Length: {len(data)}\r\n\r\n".encode() + data)

    with ThreadPoolExecutor(CLIENTS) as pool:
        for hung in [pool.submit(hang_up, sample) for sample in sure * 2]:
            hung.result()
    assert together(engine, sure) == [answers[sample.identity] for sample in sure]


def test_a_killed_server_answers_the_same_after_a_restart(engine: Engine, asked: list[Sample], answers: dict[str, str]):
    """SIGKILL in the middle of requests: no client hangs, none gets a wrong answer, and a new server is as the old."""
    sure = [sample for sample in asked if sample.identity in answers]

    def outcome(sample: Sample) -> str | None:
        try:
            return str(ask(engine, sample).text)
        except ServeError:
            return None

    with ThreadPoolExecutor(CLIENTS) as pool:
        pending = [pool.submit(outcome, sample) for sample in sure * 4]
        pending[0].result()
        os.kill(engine.pid, signal.SIGKILL)
        got = [(sample, future.result(timeout=120)) for sample, future in zip(sure * 4, pending, strict=True)]
    assert any(text is None for _, text in got)
    assert all(text in (None, answers[sample.identity]) for sample, text in got)
    engine.stop()
    engine.start()
    engine.wait_healthy(300)
    assert together(engine, sure) == [answers[sample.identity] for sample in sure]


def mmq(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [str(Path(sys.executable).with_name("mmq")), *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=600)


def test_check_passes_and_is_kept(engine: Engine, program: Program, artifact: Path):
    engine.stop()  # two servers at once would share this machine's cores
    done = mmq("check", str(artifact), "--vllm", program.path, "--questions", "8", "--json")
    found = json.loads(done.stdout.splitlines()[0])
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
    assert found["passed"]
    assert found["schemes"] == {"CompressedTensorsW8A8Int8": 8, "CompressedTensorsWNA16": 8}
    assert found["control"]["moved"]["mean"] > 20 * found["compared"]["distance"]["mean"]
    assert json.loads((artifact / "mmq_report.json").read_text())["serving"] == found


def test_serve_says_how_to_ask_and_ends_with_ctrl_c(engine: Engine, program: Program, artifact: Path):
    engine.stop()
    arguments = ["serve", str(artifact), "--vllm", program.path, "--port", str(free_port()), "--json"]
    command = [str(Path(sys.executable).with_name("mmq")), *arguments]
    log = artifact.with_name("serve.log")
    with log.open("w") as said, subprocess.Popen(command, stdout=subprocess.PIPE, stderr=said, text=True) as running:
        assert running.stdout
        ready = json.loads(running.stdout.readline())
        done = subprocess.run(["bash", "-c", ready["curl"]], capture_output=True, text=True, timeout=120)
        running.send_signal(signal.SIGINT)
        code = running.wait(60)
    assert json.loads(done.stdout)["choices"][0]["message"]["content"].strip()
    assert code == 130
    assert "Traceback" not in log.read_text().rpartition("Application startup complete")[2]
    assert alive(ready["pid"]) == []


def alive(group: int) -> list[str]:
    """Running processes of a process group; those that ended and wait for a parent to notice do not count."""
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):
            name, _, rest = path.read_text().rpartition(")")
            state, _, of_group = rest.split()[:3]
            if int(of_group) == group and state not in "ZX":
                found.append(name)
    return found
