"""What cannot succeed is refused before the work: servers, the hub, vLLM. The tests count requests, not seconds."""

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from threading import Thread

import pytest
from click.testing import CliRunner, Result

from exporter.commands.main import cli
from exporter.evaluation.answers import Store
from exporter.pipeline import reevaluation
from tests.chat_server import chat_server
from tests.slow import some


def mmq(*words: str) -> Result:
    return CliRunner().invoke(cli, words)


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> str:
    out = str(tmp_path_factory.mktemp("once") / "out")
    words = ["export", "--recipe", "llava-w8", "--model", "demo-llava", "--out", out, "--skip-evaluation"]
    assert mmq(*words, "--samples", "2", "--device", "cpu").exit_code == 0
    return out


@pytest.fixture
def no_work(monkeypatch: pytest.MonkeyPatch) -> None:
    """Planning, the first step of an evaluation, is an error."""

    def prepare(*arguments: object, **options: object) -> None:
        raise AssertionError("the evaluation has begun")

    monkeypatch.setattr(reevaluation, "prepare", prepare)


@pytest.mark.usefixtures("no_work")
def test_a_server_without_a_baseline_is_refused_before_anything_is_read(artifact: str, tmp_path: Path) -> None:
    with chat_server(lambda text, image: "a") as server:
        words = ["evaluate", artifact, "--server", server.url, "--answers", str(tmp_path / "answers")]
        refused = mmq(*words)
        assert refused.exit_code == 1
        assert "the full precision model has no server, and no answer of a server is stored" in refused.stderr
        assert "--baseline-server" in refused.stderr
        Store(tmp_path / "answers").add({"backend": "openai"}, {"key": "answer"})
        assert isinstance(mmq(*words).exception, AssertionError)  # stored answers may suffice: the evaluation begins


@pytest.mark.usefixtures("no_work")
def test_a_server_that_does_not_respond_is_refused_before_anything_is_read(artifact: str, tmp_path: Path) -> None:
    with chat_server(lambda text, image: "a") as server:
        both = ["--baseline-server", server.url, "--server", "http://127.0.0.1:9"]
        refused = mmq("evaluate", artifact, *both, "--answers", str(tmp_path / "answers"))
    assert refused.exit_code == 1
    assert "http://127.0.0.1:9/v1/models: no response" in refused.stderr


@contextmanager
def closing_hub() -> Iterator[tuple[str, list[str]]]:
    """A hub that closes every connection without a response, and the paths that were requested."""
    paths: list[str] = []

    class Closing(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            paths.append(self.path)

        do_HEAD = do_GET

        def log_message(self, *arguments: object) -> None:
            pass

    server = HTTPServer(("127.0.0.1", 0), Closing)
    Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}", paths
    finally:
        server.shutdown()
        server.server_close()


@pytest.mark.parametrize("command", some(["plan", "export"], ["plan"]))
def test_an_unreachable_hub_is_asked_once(command: str, tmp_path: Path) -> None:
    """In a child, because the hub library reads its address when it is imported."""
    with closing_hub() as (url, paths):
        environment = {"HF_ENDPOINT": url, "HF_HUB_OFFLINE": "0", "HF_HUB_CACHE": str(tmp_path / "cache")}
        words = ["-m", "exporter", command, "--recipe", "llava-w4-vit8", "--device", "cpu"]
        known = {**os.environ, "PYTHONPATH": str(Path(__file__).parent.parent)}
        child = [sys.executable, *words]
        done = subprocess.run(child, cwd=tmp_path, env=known | environment, capture_output=True, text=True)
    assert done.returncode == 1
    assert "is not in the hub cache and the hub cannot be reached" in done.stderr
    assert "Retry" not in done.stderr
    assert [path for path in paths if "llava" in path] == ["/api/models/llava-hf/llava-1.5-7b-hf"]


def test_serving_checks_need_vllm_before_the_plan(monkeypatch: pytest.MonkeyPatch, artifact: str) -> None:
    monkeypatch.setenv("MMQ_VLLM", "/nowhere/vllm")
    monkeypatch.setattr("exporter.pipeline.preparation.prepare", lambda *a, **b: pytest.fail("the plan was made"))
    export = ["export", "--recipe", "llava-w8", "--model", "demo-llava", "--out", f"{artifact}-2", "--serve-check"]
    for words in (export, ["check", artifact], ["serve", artifact]):
        done = mmq(*words)
        assert (done.exit_code, "the program '/nowhere/vllm' does not exist" in done.stderr) == (1, True), done.output
