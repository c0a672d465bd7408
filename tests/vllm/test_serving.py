"""A real vLLM behind `mmq serve` answers about the demo models: curl, openai, load, abuse, a crash, Ctrl-C."""

import io
import json
import os
import socket
import subprocess
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from exporter.data.tasks.sample import Sample
from exporter.errors import ServeError
from exporter.model.inference.openai_client import message, png
from exporter.model.inference.predict import prompt_text
from exporter.pipeline.serving_check import questions
from exporter.serving.vllm_engine import post
from tests.vllm.served import CLIENTS, LONGEST, Served, alive, mmq

ROUNDS = 4
SURE = -0.2  # log-probability of the least likely token: below it, another batch may round to another token


@pytest.fixture(scope="module")
def sent_samples(served: Served) -> list[Sample]:
    return [sample for sample in questions(served.folder, (), 64) if sample.question]


@pytest.fixture(scope="module")
def answers(served: Served, sent_samples: list[Sample]) -> dict[str, str]:
    """Sample id -> answer, for the answers that the model is sure of, asked one after the other."""
    replies = {sample.identity: served.ask(sample) for sample in sent_samples}
    sure = {name: reply.text for name, reply in replies.items() if min(reply.logprobs) > SURE}
    assert len(sure) >= 10
    return sure


@pytest.fixture(scope="module")
def sure(sent_samples: list[Sample], answers: dict[str, str]) -> list[Sample]:
    return [sample for sample in sent_samples if sample.identity in answers]


def expected(samples: Sequence[Sample], answers: dict[str, str]) -> list[str]:
    return [answers[sample.identity] for sample in samples]


def test_answers_are_right(sure: list[Sample], answers: dict[str, str]):
    """Not only some text: the trained demo model knows the shapes."""
    right = [answers[sample.identity].strip() in sample.references for sample in sure]
    assert sum(right) >= 0.85 * len(right)


@pytest.mark.parametrize("line", ["ask", "curl", "python"])
def test_the_lines_that_serve_prints_work(served: Served, engine_python: str, line: str):
    path = f"{Path(engine_python).parent}{os.pathsep}{os.environ['PATH']}"
    environment = {**os.environ, "PATH": path}
    command = ["bash", "-c", served.ready[line]]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, env=environment)
    assert done.returncode == 0, done.stderr
    answer = json.loads(done.stdout)["choices"][0]["message"]["content"] if line == "curl" else done.stdout
    assert answer.strip()


def test_eight_openai_clients_get_the_answers_of_one(
    served: Served, engine_python: str, sure: list[Sample], answers: dict[str, str]
):
    repeated = sure * ROUNDS
    pictures = [message("", png(sample.image()))["content"][0]["image_url"]["url"] for sample in repeated]
    texts = [prompt_text(served.family, sample) for sample in repeated]
    request = {"url": served.ready["url"], "model": served.ready["model"], "tokens": LONGEST}
    request["questions"] = list(zip(texts, pictures, strict=True))
    command = [engine_python, str(Path(__file__).with_name("clients.py"))]
    done = subprocess.run(command, input=json.dumps(request), capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    assert json.loads(done.stdout) == expected(repeated, answers)


def post_body(served: Served, **changed: Any) -> Any:
    body = {"model": served.ready["model"], "max_tokens": 4, **changed}
    return post(f"{served.ready['url']}/v1/chat/completions", body, 60)


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
    served: Served, sure: list[Sample], answers: dict[str, str], url: str
):
    content = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": "what ?"}]
    with pytest.raises(ServeError, match=r"answered [45]\d\d"):
        post_body(served, messages=[{"role": "user", "content": content}])
    assert served.ask(sure[0]).text == answers[sure[0].identity]


def test_two_images_are_refused(served: Served, sure: list[Sample]):
    picture = message("what ?", png(sure[0].image()))
    picture["content"] = [picture["content"][0], *picture["content"]]
    with pytest.raises(ServeError, match="answered 4"):
        post_body(served, messages=[picture])


def test_a_huge_image_is_answered_or_refused(served: Served, sure: list[Sample], answers: dict[str, str]):
    """Thirty-six million pixels, and a side of one: neither may hang or end the server."""
    for size in ((6000, 6000), (1, 3000), (1, 1)):
        file = io.BytesIO()
        Image.new("RGB", size, (255, 0, 0)).save(file, "PNG")
        with suppress(ServeError):  # a refusal; what must not happen shows below
            post_body(served, messages=[message("what ?", file.getvalue())])
    assert served.ask(sure[0]).text == answers[sure[0].identity]


def test_cancelled_requests_leave_no_trace(served: Served, sure: list[Sample], answers: dict[str, str]):
    """Clients that hang up while they wait; those that stay get their answers."""

    def hang_up(sample: Sample) -> None:
        request = {
            "model": served.ready["model"],
            "messages": [message("what ?", png(sample.image()))],
            "max_tokens": 64,
        }
        data = json.dumps(request).encode()
        with socket.create_connection(("127.0.0.1", served.port), timeout=30) as connection:
            head = "POST /v1/chat/completions HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\n"
            connection.sendall(f"{head}Content-Length: {len(data)}\r\n\r\n".encode() + data)

    with ThreadPoolExecutor(CLIENTS) as pool:
        for hung in [pool.submit(hang_up, sample) for sample in sure * 2]:
            hung.result()
    assert served.together(sure) == expected(sure, answers)


def test_a_taken_port_is_refused_and_its_server_lives(served: Served, sure: list[Sample], answers: dict[str, str]):
    done = mmq("serve", str(served.folder), "--port", str(served.port), seconds=60)
    assert done.returncode == 1
    assert f"port {served.port} of 127.0.0.1 is in use" in done.stderr
    assert served.ask(sure[0]).text == answers[sure[0].identity]


@pytest.mark.parametrize("served", ["demo-llava"], indirect=True)  # no model does it in another way
def test_a_killed_server_answers_the_same_after_a_restart(served: Served, sure: list[Sample], answers: dict[str, str]):
    """SIGKILL in the middle of requests: no client hangs, none gets a wrong answer, and a new server is as the old."""

    def outcome(sample: Sample) -> str | None:
        try:
            return str(served.ask(sample).text)
        except ServeError:
            return None

    with ThreadPoolExecutor(CLIENTS) as pool:
        pending = [pool.submit(outcome, sample) for sample in sure * 4]
        pending[0].result()
        served.kill_server()
        got = [(sample, future.result(timeout=120)) for sample, future in zip(sure * 4, pending, strict=True)]
    assert any(text is None for _, text in got)
    assert all(text in (None, answers[sample.identity]) for sample, text in got)
    assert served.ended() == 1
    assert "vllm was killed by signal 9" in served.said()
    assert alive(served.ready["pid"]) == []
    served.start()
    assert served.together(sure) == expected(sure, answers)


def test_ctrl_c_ends_it_and_leaves_nothing(served: Served):
    """Last, because nothing is served afterwards. vLLM's log already has tracebacks of refused pictures."""
    before = len(served.log.read_text().splitlines())
    assert served.interrupt() == 0
    lines = served.log.read_text().splitlines()[before:]
    assert lines
    assert not [line for line in lines if line.startswith("Traceback")]  # vLLM's own stand behind its process's name
    assert alive(served.ready["pid"]) == []
    with socket.socket() as probe:
        assert probe.connect_ex(("127.0.0.1", served.port)) != 0
