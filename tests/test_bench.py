"""`mmq bench`: the load generator, the memory of a process group, the record in the report, report and card."""

import json
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result
from PIL import Image

from exporter.commands.main import cli
from exporter.commands.serving_text import speed_page
from exporter.data.tasks.sample import Sample
from exporter.errors import ArtifactError, ServeError
from exporter.evaluation.report_file import read_report, write_report, write_speed
from exporter.evaluation.speed_record import SpeedFigures, SpeedRecord, read_speed
from exporter.evaluation.speed_table import conditions, figures_rows
from exporter.model.families import FAMILIES
from exporter.pipeline import speed
from exporter.pipeline.speed import SpeedRequest, measure_here
from exporter.publishing.artifact_summary import folder_reader, read_summary
from exporter.publishing.card import CardDeclarations, render
from exporter.publishing.report import collect, html
from exporter.serving.memory_watch import MemoryWatch
from exporter.serving.request_load import LoadResult, TimedAnswer, run_load, timed_answer
from exporter.serving.speed import loaded_bytes, request_bodies
from tests.chat_server import chat_server
from tests.children import preloaded_context
from tests.test_evaluate import crafted

FIGURES = SpeedFigures(
    load_seconds=12.5, first_token_seconds=0.05, tokens_per_second={"1": 40.0, "8": 160.0}, peak_bytes=3_000_000
)
SOURCE = FIGURES.model_copy(update={"load_seconds": 25.0, "tokens_per_second": {"1": 20.0, "8": 160.0}})
RECORD = SpeedRecord(
    engine="vllm 0.32.0", device="CPU, cpu build", tokens=64, requests=4, warm_up=1, artifact=FIGURES, source=SOURCE
)


def mmq(*arguments: object) -> Result:
    return CliRunner().invoke(cli, [str(argument) for argument in arguments])


def bodies(count: int) -> list[dict[str, object]]:
    samples = [
        Sample(f"s{i}", lambda i=i: Image.new("RGB", (8, 8), (i, 0, 0)), f"question {i}?", ("x",)) for i in range(count)
    ]
    return request_bodies("m", FAMILIES["llava"], samples, 5)


def test_requests_are_fixed_in_length_and_have_their_own_pictures() -> None:
    first, second = bodies(2)
    assert (first["max_tokens"], first["ignore_eos"], first["temperature"]) == (5, True, 0)
    assert first["messages"] != second["messages"]


def test_every_client_sends_its_requests_one_after_the_other() -> None:
    lock, open_requests, most = threading.Lock(), 0, 0

    def answer(text: str, picture: Image.Image) -> str:
        nonlocal open_requests, most
        with lock:
            open_requests += 1
            most = max(most, open_requests)
        time.sleep(0.02)
        with lock:
            open_requests -= 1
        return "one two three"

    with chat_server(answer) as server:
        result = run_load(f"{server.url}/v1/chat/completions", bodies(4), clients=3, requests=4)
        texts = [body["messages"][0]["content"][1]["text"] for body in server.bodies]
    assert len(result.answers) == 12
    assert 1 < most <= 3
    assert len(set(texts)) == 4
    assert all(0 < answer.first <= answer.last for answer in result.answers)


def test_rates_count_the_tokens_of_all_clients() -> None:
    result = LoadResult(2.0, (TimedAnswer(0.1, 1.0, 10), TimedAnswer(0.3, 1.9, 30), TimedAnswer(0.2, 2.0, 20)))
    assert result.rate == 30
    assert result.first_token == 0.2


def test_the_server_s_count_of_tokens_is_used_and_pieces_without_it() -> None:
    with chat_server(lambda text, picture: "one two three") as server:
        url = f"{server.url}/v1/chat/completions"
        assert timed_answer(url, bodies(1)[0]).tokens == 3  # three pieces
        usage = 'data: {"choices": [{"delta": {"content": "a"}}]}\n\ndata: {"choices": [], "usage": '
        usage += '{"completion_tokens": 7}}\n\n'
        server.faults.append((200, {"Content-Type": "text/event-stream"}, usage))
        assert timed_answer(url, bodies(1)[0]).tokens == 7


def test_a_refused_request_ends_the_measurement() -> None:
    with chat_server(lambda text, picture: "x") as server:
        server.faults.append((400, {}, '{"error": {"message": "too long"}}'))
        with pytest.raises(ServeError, match=r"a request failed: .*too long"):
            timed_answer(f"{server.url}/v1/chat/completions", bodies(1)[0])


def test_the_memory_of_all_processes_of_a_group_is_counted() -> None:
    script = "import time; x = bytearray(60_000_000); print(1, flush=True); time.sleep(60)"
    outer = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {script!r}])"
    child = subprocess.Popen([sys.executable, "-c", outer], stdout=subprocess.PIPE, start_new_session=True)
    try:
        assert child.stdout
        child.stdout.readline()
        with MemoryWatch(child.pid, gpu=False) as memory:
            threading.Event().wait(0.01)
        if memory.host is None:
            pytest.skip("this system has no /proc/PID/smaps_rollup")
        assert 60_000_000 < memory.host < 400_000_000
    finally:
        os.killpg(child.pid, signal.SIGKILL)
        child.wait()


def test_the_size_of_the_weights_is_read_from_the_log() -> None:
    log = "INFO 1\nINFO Model loading took 3.50 GiB memory and 2.1 seconds\n"
    assert loaded_bytes(log) == int(3.5 * 2**30)
    assert loaded_bytes(log * 2) == 7 * 2**30  # two GPUs
    assert loaded_bytes("nothing") is None


def test_the_record_stays_when_other_parts_of_the_report_are_written(tmp_path: Path) -> None:
    report = crafted(1, 1)
    write_report(tmp_path, report, None)
    write_speed(tmp_path, RECORD)
    assert read_report(tmp_path) == (report, None)
    assert read_speed(tmp_path / "mmq_report.json") == RECORD
    write_report(tmp_path, None, None)  # another evaluation
    assert read_speed(tmp_path / "mmq_report.json") == RECORD


def test_a_damaged_record_is_named(tmp_path: Path) -> None:
    write_speed(tmp_path, RECORD)
    path = tmp_path / "mmq_report.json"
    plain = json.loads(path.read_text())
    plain["speed"]["artifact"]["load_seconds"] = -1
    path.write_text(json.dumps(plain))
    with pytest.raises(ArtifactError, match="speed"):
        read_speed(path)


def test_rows_compare_artifact_and_source() -> None:
    assert figures_rows(FIGURES, SOURCE) == [
        ("load", "12.5 s", "25.0 s", "0.50 x"),
        ("first token, 1 client", "0.050 s", "0.050 s", "1.00 x"),
        ("tokens per second, 1 client", "40.0", "20.0", "2.00 x"),
        ("tokens per second, 8 clients", "160.0", "160.0", "1.00 x"),
        ("peak memory, host", "3.0 MB", "3.0 MB", "1.00 x"),
    ]
    assert figures_rows(FIGURES, None)[0] == ("load", "12.5 s", "", "")


def test_the_table_has_aligned_columns() -> None:
    assert speed_page(RECORD).splitlines() == [
        "vllm 0.32.0 on CPU, cpu build; 64 tokens a request, 4 requests a client, after 1 warm-up request "
        "of each client, not counted",
        "                              artifact   source",
        "load                            12.5 s   25.0 s  0.50 x",
        "first token, 1 client          0.050 s  0.050 s  1.00 x",
        "tokens per second, 1 client       40.0     20.0  2.00 x",
        "tokens per second, 8 clients     160.0    160.0  1.00 x",
        "peak memory, host               3.0 MB   3.0 MB  1.00 x",
    ]


def test_an_older_record_says_that_its_first_figure_includes_the_warm_up() -> None:
    old = SpeedRecord.model_validate({name: value for name, value in RECORD if name != "warm_up"})
    assert conditions(old).endswith("4 requests a client; the first figure includes the warm-up")


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("bench") / "artifact"
    words = ["export", "--recipe", "llava-w8", "--model", "demo-llava", "--skip-evaluation", "--samples", "4"]
    done = mmq(*words, "--out", out)
    assert done.exit_code == 0, done.output
    return out


@pytest.mark.parametrize("started", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_without_vllm_figures_of_transformers_reach_report_and_card(
    started: int, artifact: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(artifact))
    monkeypatch.delenv("MMQ_VLLM", raising=False)
    in_a_child, children = speed._here, list[str]()
    context = preloaded_context()  # a spawned process imports torch and transformers for seconds
    monkeypatch.setattr(multiprocessing, "get_context", {"spawn": context}.__getitem__)

    def here(request: SpeedRequest, on_event: Any, model: str) -> SpeedFigures:
        """The first models are measured in processes of their own, as all are; others in this one, which is faster."""
        children.append(model)
        return in_a_child(request, on_event, model) if len(children) <= started else measure_here(request, model)

    monkeypatch.setattr(speed, "_here", here)
    weights = {path.name: path.read_bytes() for path in artifact.glob("*.safetensors")}
    words = ["--clients", "1,2", "--tokens", "3", "--requests", "1", "--device", "cpu"]
    done = mmq("bench", artifact, *words, "--json")
    assert done.exit_code == 0, done.output
    assert "transformers measures, with dequantized weights" in " ".join(done.stderr.split())
    record = json.loads(done.stdout)
    assert record["engine"].startswith("transformers ")
    assert record["engine"].endswith("with dequantized weights")
    assert record["warm_up"] == 1
    for model in ("artifact", "source"):
        assert set(record[model]["tokens_per_second"]) == {"1", "2"}
        assert min(record[model]["tokens_per_second"].values()) > 0
        assert record[model]["peak_bytes"] > 50_000_000
    assert weights == {path.name: path.read_bytes() for path in artifact.glob("*.safetensors")}
    summary = read_summary("artifact", folder_reader(artifact))
    assert summary.speed is not None
    assert summary.speed.weights
    page = html(collect(summary, {}))
    assert "tokens per second, 2 clients" in page
    card = render("me/artifact", summary, CardDeclarations(), [], "")
    assert "## Speed and memory" in card
    assert "| tokens per second, 2 clients |" in card


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--clients", "0"], "not a list of numbers"),
        (["--clients", "1,x"], "not a list of numbers"),
        (["--engine", "transformers", "--", "--enforce-eager"], "for vLLM"),
        (["--engine", "vllm", "--vllm", "no-such-vllm"], "does not exist"),
        (["--vllm", "no-such-vllm"], "does not exist"),
    ],
)
def test_what_cannot_work_is_refused_at_once(artifact: Path, words: list[str], message: str) -> None:
    done = mmq("bench", artifact, *words)
    assert done.exit_code in (1, 2)
    assert message in done.stderr
    assert "Traceback" not in done.stderr


def test_transformers_on_request_measures_without_a_note(artifact: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In this process: the test above starts a process for each model."""
    measured: list[str] = []

    def figures(request: object, on_event: object, model: str) -> SpeedFigures:
        measured.append(model)
        return FIGURES

    monkeypatch.setattr("exporter.pipeline.speed._here", figures)
    done = mmq("bench", artifact, "--engine", "transformers", "--no-source")
    assert done.exit_code == 0, done.output
    assert "dequantized weights" not in done.stderr
    assert done.stdout.startswith("transformers ")
    assert len(measured) == 1
