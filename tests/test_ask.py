"""`mmq ask`: answers that grow, from this process and from servers; comparison; the lines that `mmq serve` prints."""

import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner, Result
from PIL import Image

from exporter.artifact.manifest import MANIFEST
from exporter.commands.main import cli
from exporter.commands.serving_text import example_lines
from exporter.data.demo.samples import picture
from exporter.device import choose
from exporter.dtypes import BFLOAT16, DTYPES, FLOAT16, FLOAT32
from exporter.evaluation.word_differences import marked, spans
from exporter.events import Event
from exporter.model.embedded.example import ANSWER, PICTURE, QUESTION, SCENE
from exporter.model.inference.text_stream import TextStream
from exporter.model.source import open_source
from exporter.numerics.activation_rounding import EXACT
from exporter.pipeline import ask as pipeline_ask
from exporter.pipeline.ask import placement_of
from exporter.serving.launch import Launch
from tests.chat_server import chat_server, reply

CPU = choose("cpu")


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> str:
    """demo-llava with 2 bits, whose captions are wrong."""
    out = str(tmp_path_factory.mktemp("ask") / "coarse")
    words = ["export", "--recipe", "llava-w8", "--model", "demo-llava", "--out", out, "--skip-evaluation"]
    done = CliRunner().invoke(cli, [*words, "--bits", "language=2", "--samples", "2", "--device", "cpu"])
    assert done.exit_code == 0, done.output
    return out


def ask(*words: str) -> Result:
    return CliRunner().invoke(cli, ["ask", *words, "--device", "cpu"])


def test_the_example_is_a_scene_and_the_demo_model_answers_its_question() -> None:
    assert np.array_equal(np.asarray(Image.open(PICTURE)), np.asarray(picture(*SCENE)))  # type: ignore[arg-type]
    done = ask("demo-llava", str(PICTURE), QUESTION)
    assert done.exit_code == 0, done.output
    assert done.stdout == f"{ANSWER}\n"


def test_the_pieces_are_printed_as_they_come_and_joined_are_the_answer() -> None:
    from exporter.events import ignore
    from exporter.pipeline.ask import ask as run
    from exporter.pipeline.picture_question import question

    pieces: list[str] = []
    request = question(PICTURE, None, 8, False)
    answer = run("demo-llava", request, CPU, ignore, pieces.append)
    assert len(pieces) > 3
    assert "".join(pieces) == answer
    longer = run("demo-llava", question(PICTURE, None, 64, False), CPU, ignore, lambda piece: None)
    assert longer.startswith(answer)
    assert len(longer) > len(answer)


class Bytes:
    """A tokenizer whose tokens are bytes of UTF-8."""

    def decode(self, tokens: list[int], skip_special_tokens: bool) -> str:
        return bytes(tokens).decode("utf-8", "replace")


def test_a_character_of_several_tokens_is_sent_whole() -> None:
    pieces: list[str] = []
    stream = TextStream(Bytes(), pieces.append)
    stream.put(torch.tensor([[1, 2, 3]]))  # the prompt
    for token in " blå ".encode():
        stream.put(torch.tensor([token]))
    stream.end()
    assert pieces == ["b", "l", "å"]
    assert stream.text == "blå"


def test_compare_asks_both_models_and_marks_what_differs(artifact: str) -> None:
    done = ask(artifact, str(PICTURE), "--compare")
    assert done.exit_code == 0, done.output
    source = ask("demo-llava", str(PICTURE)).stdout.strip()
    coarse = ask(artifact, str(PICTURE)).stdout.strip()
    assert source != coarse
    lines = done.stdout.splitlines()
    assert lines[:2] == [f"full precision: {source}", f"artifact: {coarse}"]
    assert "[" in lines[-1]
    assert lines[-1].replace("[", "").replace("]", "").split() == f"artifact: {coarse}".split()
    result = json.loads(ask(artifact, str(PICTURE), "--compare", "--json").stdout)
    assert result["answers"] == {"full precision": source, "artifact": coarse}
    assert result["differences"]
    assert "The answers differ at" in done.stdout


def test_words_are_compared_in_order() -> None:
    parts = spans("a red circle at the top", "a blue circle at top left")
    assert marked(parts, False) == "a [red] circle at [the] top []"
    assert marked(parts, True) == "a [blue] circle at [] top [left]"
    assert not any(part.differs for part in spans("same words", "same  words"))


def test_a_served_answer_grows_and_has_the_wording_of_the_family(artifact: str) -> None:
    with chat_server(lambda text, image: "a red bar") as server:
        done = ask(artifact, str(PICTURE), "what is it?", "--server", server.url, "--max-tokens", "7")
        plain = ask(artifact, str(PICTURE), "what is it?", "--server", server.url, "--as-is")
        server.faults += [(200, {}, reply("whole"))]  # a server that does not stream
        whole = ask(artifact, str(PICTURE), "--server", server.url)
        server.models[0]["max_model_len"] = 126  # as vLLM lists it; the demo model's context
        ask(artifact, str(PICTURE), "what is it?", "--server", server.url)
        server.faults += [(400, {}, '{"error": {"message": "too long"}}')]
        failed = ask(artifact, str(PICTURE), "--server", server.url)
    assert done.stdout == plain.stdout == "a red bar\n"
    assert [body["max_tokens"] for body in server.bodies] == [7, 128, 63]
    texts = [body["messages"][0]["content"][1]["text"] for body in server.bodies[:2]]
    assert texts == [open_source("demo-llava")[1].text("what is it?"), "what is it?"]
    assert whole.stdout == "whole\n"
    assert failed.exit_code == 1
    assert "HTTP 400: too long" in failed.stderr


def test_asking_a_server_imports_neither_torch_nor_transformers(artifact: str) -> None:
    """Their import takes longer than the answer."""
    with chat_server(lambda text, image: "a red bar") as server:
        arguments = ["mmq", "ask", artifact, str(PICTURE), "what is it?", "--server", server.url]
        code = (
            f"import sys; from exporter.__main__ import main\nsys.argv = {arguments}\n"
            "try: main()\n"
            "except SystemExit as end: assert not end.code\n"
            "finally: print([name for name in ('torch', 'transformers') if name in sys.modules])"
        )
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == ["a red bar", "[]"]


def test_two_servers_are_compared(artifact: str) -> None:
    with chat_server(lambda text, image: "a red bar") as first, chat_server(lambda text, image: "a bar") as second:
        urls = ["--baseline-server", first.url, "--server", second.url]
        done = ask(artifact, str(PICTURE), "what?", "--compare", "--json", *urls)
    result = json.loads(done.stdout)
    assert result["answers"] == {"full precision": "a red bar", "artifact": "a bar"}
    assert result["differences"] == [{"full precision": "red", "artifact": ""}]


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        (["demo-llava", "PICTURE", "--compare"], 1, "not an artifact"),
        (["demo-llava", "PICTURE", "--baseline", "x"], 2, "--baseline needs --compare"),
        (["demo-llava", "PICTURE", "--baseline-server", "x"], 2, "--baseline-server needs --compare"),
        (["demo-llava", "PICTURE", "--served-model", "x"], 2, "--served-model needs --server"),
        (["demo-llava", "PICTURE", "--compare", "--server", "x"], 2, "needs both --server and --baseline-server"),
        (["demo-llava", "PICTURE", " "], 1, "the question is empty"),
        (["demo-llava", __file__, "what?"], 1, "it cannot be read as a picture"),
        (["demo-blip2-itm", "PICTURE", "what?"], 1, "do not answer with text"),
        (["demo-llava", "PICTURE", "--server", "http://127.0.0.1:9"], 1, "no response"),
        (["demo-lava", "PICTURE"], 1, "Did you mean 'demo-llava'?"),
    ],
)
def test_what_cannot_be_answered_is_refused(words: list[str], code: int, message: str) -> None:
    done = ask(*(str(PICTURE) if word == "PICTURE" else word for word in words))
    assert (done.exit_code, message in done.stderr) == (code, True), done.output


def test_a_model_that_does_not_fit_runs_in_less_or_block_by_block() -> None:
    parameters = 1_000
    whole, narrow, streamed = (placement_of(parameters, FLOAT32, CPU, room) for room in (5_000, 4_999, 2_499))
    assert (whole.dtype, whole.streamed) == (FLOAT32, False)
    assert (narrow.dtype, narrow.streamed) == (BFLOAT16, False)
    assert streamed.streamed
    assert "block by block" in streamed.note


@pytest.mark.parametrize("is_artifact", [False, True])
def test_a_model_and_an_artifact_are_opened_with_their_own_weights(
    is_artifact: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tensors = {"a": SimpleNamespace(dtype=DTYPES["I32"], size=8), "b": SimpleNamespace(dtype=FLOAT16, size=500)}
    source: Any = SimpleNamespace(tensors=tensors, folder=tmp_path, config="config", read="its reader")
    packed = SimpleNamespace(
        source_config=lambda: "source config",
        names=lambda: ["c"],
        read="dequantized",
        rounded=lambda: "as served",
        parameters=lambda: 1000,
    )
    opened: list[Any] = []

    @contextmanager
    def predictor(*arguments: Any) -> Iterator[str]:
        opened.extend(arguments)
        yield "predictor"

    if is_artifact:
        (tmp_path / MANIFEST).touch()
    monkeypatch.setattr(pipeline_ask, "open_source", lambda model: (source, SimpleNamespace(tasks=("vqa",))))
    monkeypatch.setattr(pipeline_ask.Artifact, "open", lambda folder, device: packed)
    monkeypatch.setattr(pipeline_ask, "free_bytes", lambda device: 10**6)
    monkeypatch.setattr(pipeline_ask, "opened_predictor", predictor)
    events: list[Event] = []
    with pipeline_ask.opened_model(str(tmp_path), lambda family: "worded", CPU, events.append) as made:  # type: ignore
        assert (made, opened[0]) == ("predictor", "worded")
    config, names, read, rounded, placement = opened[1:6]
    if is_artifact:
        assert (config, names, read, rounded) == ("source config", ["c"], "dequantized", "as served")
    else:
        assert (config, names, read, rounded) == ("config", ["a", "b"], "its reader", EXACT)
    assert placement == placement_of(1000 if is_artifact else 508, FLOAT16, CPU, 10**6)
    assert opened[6:] == [CPU, opened[7], events.append]
    assert events == [Event("prepare", done, 1, f"loading {tmp_path.name}") for done in (0, 1)]


@pytest.mark.skipif(shutil.which("curl") is None, reason="needs curl")
def test_the_printed_requests_ask_about_the_picture_that_is_there(artifact: str, tmp_path: Path) -> None:
    def answer(text: str, image: Image.Image) -> str:
        assert np.array_equal(np.asarray(image), np.asarray(picture(*SCENE)))  # type: ignore[arg-type]
        return ANSWER

    family = open_source("demo-llava")[1]
    with chat_server(answer, "it's") as server:
        lines = example_lines(Launch((), {}, server.url, "it's"), artifact, family)
        done = subprocess.run(["bash", "-c", lines["curl"]], capture_output=True, text=True, check=True)
        ask_run = CliRunner().invoke(cli, shell_words(lines["ask"]))
    response: Any = json.loads(done.stdout)
    assert response["choices"][0]["message"]["content"] == ANSWER
    assert ask_run.stdout == f"{ANSWER}\n"
    texts = [body["messages"][0]["content"][1]["text"] for body in server.bodies]
    assert texts == [family.text(QUESTION)] * 2
    compile(shell_words(lines["python"])[-1], "printed", "exec")
    assert lines["python"].startswith("python -c ")
    for name in ("vllm", "python"):
        (tmp_path / name).touch(mode=0o755)
    installed = example_lines(Launch((f"{tmp_path}/vllm", "serve"), {}, server.url, "it's"), artifact, family)
    assert shell_words(installed["python"])[0] == f"{tmp_path}/python"


def shell_words(line: str) -> list[str]:
    """Words of a printed command after its program."""
    import shlex

    words = shlex.split(line)
    return words[words.index("ask") :] if "ask" in words else words
