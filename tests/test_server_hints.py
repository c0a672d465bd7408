"""A server that does not respond: the hint is the command that starts it, for what it should serve."""

import re
import shlex
import shutil
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from exporter.commands import next_steps
from exporter.commands.main import cli
from exporter.errors import DataError
from exporter.model.embedded import MODELS
from exporter.model.embedded.example import PICTURE, QUESTION
from exporter.model.inference.predict_server import Server
from tests.chat_server import chat_server


def mmq(*words: str | Path) -> Result:
    return CliRunner().invoke(cli, [str(word) for word in words])


def nowhere() -> str:
    """A URL where no server listens."""
    with chat_server(lambda *_: "") as server:
        return str(server.url)


def start_command(text: str) -> list[str]:
    """Words after the program of the command that the hint starts the server with."""
    (command,) = re.findall(rf"start the server with `{re.escape(next_steps.program())} ([^`]*)`", text)
    return shlex.split(command)


def test_a_question_to_a_dead_server_leads_to_the_command_that_serves_the_model(finished: Path, tmp_path: Path) -> None:
    artifact, url = tmp_path / "my artifact", nowhere()
    shutil.copytree(finished, artifact)
    for model, served in ((str(artifact), artifact), ("demo-llava", MODELS["demo-llava"])):
        asked = mmq("ask", model, PICTURE, QUESTION, "--server", url)
        assert asked.exit_code == 1
        assert "answers so far" not in asked.stderr  # one question stores none
        words = start_command(asked.stderr)
        assert words == ["serve", str(served), "--port", url.rpartition(":")[2]]
        printed = mmq(*words, "--print")
        assert printed.exit_code == 0, printed.output


def test_an_evaluation_names_the_command_of_the_server_that_is_dead(finished: Path, tmp_path: Path) -> None:
    artifact, url = tmp_path / "artifact", nowhere()
    shutil.copytree(finished, artifact)
    with chat_server(lambda *_: "") as alive:
        for source, other, served in (
            (url, alive.url, MODELS["demo-llava"]),
            (alive.url, url, artifact),
        ):
            done = mmq("evaluate", artifact, "--baseline-server", source, "--server", other)
            assert done.exit_code == 1
            assert start_command(done.stderr) == ["serve", str(served), "--port", url.rpartition(":")[2]]


@pytest.mark.parametrize(
    ("server", "expected"),
    [
        (Server("http://127.0.0.1:8000"), "start the server, or correct its URL"),
        (Server("http://gpu.example:8000/v1"), "start the server on gpu.example, or correct its URL"),
        (Server("http://localhost:8001", serves="org/name"), "with `vllm serve org/name --port 8001`"),
        (Server("https://gpu.example", serves="org/name"), "on gpu.example with `vllm serve org/name --port 443`"),
    ],
)
def test_the_hint_names_host_port_and_model(server: Server, expected: str) -> None:
    assert expected in server.start_hint()


def test_a_server_that_is_overloaded_need_not_be_started() -> None:
    with chat_server(lambda *_: "") as server:
        server.faults = [(503, {}, "busy")] * 2
        with pytest.raises(DataError) as caught:
            Server(server.url, tries=2, pause=lambda seconds: None, serves="org/name").fetch("/v1/chat/completions", {})
    assert "wait until the server is less loaded" in str(caught.value.hint)
    assert "keeps the answers so far" in str(caught.value.hint)
    assert "start the server" not in str(caught.value.hint)
