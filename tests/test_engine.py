"""The vLLM child process, its command and its answers, with a fake `vllm` on the loopback address."""

import os
import signal
import socket
import stat
import subprocess
import sys
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch

from bench.check_families import summary
from exporter.errors import ServeError
from exporter.model.embedded import MODELS
from exporter.model.families import FAMILIES
from exporter.numerics.activation_rounding import ServedRounding, round_inputs, round_rows
from exporter.numerics.quantized import InputRounding
from exporter.serving.launch import Launch, Program, dtype, find_program, launch
from exporter.serving.reference import Distance, EngineComparison, distance_of, listed_tokens
from exporter.serving.vllm_engine import Engine, Reply, free_port, log_tail, read_kernels, read_reply, read_schemes

FAKE = '''#!{python}
"""Answers like vllm serve; --bad makes it end at once, --deaf ignores SIGTERM; it starts a child of its own."""
import json, os, signal, subprocess, sys
from http.server import BaseHTTPRequestHandler, HTTPServer

arguments = sys.argv[1:]
print("DEBUG Using scheme: CompressedTensorsWNA16 for language_model.model.layers.0.mlp.gate_up_proj", flush=True)
if "--bad" in arguments:
    sys.exit("ValueError: There is no module named 'x'")
if "--deaf" in arguments:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
print("child", child.pid, flush=True)


class Handler(BaseHTTPRequestHandler):
    def reply(self, status, body):
        data = json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def do_GET(self):
        self.reply(200 if self.path == "/health" else 404, {{}})

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if not body["messages"][0]["content"][0]["image_url"]["url"].startswith("data:image/png"):
            return self.reply(400, {{"error": "not a picture"}})
        step = {{"logprob": -0.5, "top_logprobs": [{{"token": "token_id:7", "logprob": -0.5}}]}}
        choice = {{"message": {{"content": "red"}}, "token_ids": [7], "logprobs": {{"content": [step]}}}}
        self.reply(200, {{"prompt_token_ids": [1, 2], "choices": [choice]}})

    def log_message(self, *rest):
        pass


HTTPServer(("127.0.0.1", int(arguments[arguments.index("--port") + 1])), Handler).serve_forever()
'''
PNG = b"\x89PNG\r\n\x1a\n"


@pytest.fixture
def program(tmp_path: Path) -> Program:
    path = tmp_path / "bin" / "vllm"
    path.parent.mkdir()
    path.write_text(FAKE.format(python=sys.executable))
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return Program(str(path), "0.32.0", False)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    model = tmp_path / "model"
    model.mkdir()
    return model


def command(folder: Path, program: Program, *extra: str) -> Launch:
    return launch(folder, {}, program, port=free_port(), extra=extra)


@pytest.fixture
def engine(folder: Path, program: Program, tmp_path: Path) -> Iterator[Engine]:
    with Engine(command(folder, program), tmp_path / "log", debug=True) as running:
        running.wait_healthy(60)
        yield running


def children(engine: Engine) -> list[int]:
    assert engine.log
    return [int(line.split()[1]) for line in engine.log.read_text().splitlines() if line.startswith("child")]


def gone(pid: int) -> bool:
    """Whether a process ends (or is a zombie) before long."""
    for _ in range(600):
        try:
            state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
        except (FileNotFoundError, ProcessLookupError):
            return True
        if state in "ZX":
            return True
        time.sleep(0.05)
    return False


linux = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")


def test_an_answer_is_read_with_its_log_probabilities(engine):
    reply = engine.ask("What color?", PNG)
    assert reply == Reply("red", (1, 2), (7,), (-0.5,), ({7: -0.5},))
    assert engine.schemes() == {"language_model.model.layers.0.mlp.gate_up_proj": "CompressedTensorsWNA16"}


def test_a_refused_request_has_the_servers_message_and_the_server_keeps_running(engine):
    with pytest.raises(ServeError, match=r"answered 400.*not a picture"):
        engine.ask("What color?", b"\xff\xd8 a jpeg")
    assert engine.ask("What color?", PNG).text == "red"


@linux
@pytest.mark.parametrize("flag", [(), ("--deaf",)])
def test_stop_leaves_no_process(folder, program, tmp_path, monkeypatch, flag):
    monkeypatch.setattr("exporter.serving.vllm_engine.STOP_SECONDS", 0.5)
    with Engine(command(folder, program, *flag), tmp_path / "log") as engine:
        engine.wait_healthy(60)
        pids = [engine.pid, *children(engine)]
    assert len(pids) == 2
    assert all(gone(pid) for pid in pids)


@linux
def test_a_killed_server_is_reported_and_can_be_started_again(engine):
    pids = [engine.pid, *children(engine)]
    engine.kill()
    assert all(gone(pid) for pid in pids)
    with pytest.raises(ServeError, match="no response"):
        engine.ask("What color?", PNG)
    engine.stop()
    engine.start()
    engine.wait_healthy(60)
    assert engine.ask("What color?", PNG).text == "red"


@linux
def test_the_server_dies_with_a_killed_parent(folder, program, tmp_path):
    code = (
        "import sys, time; from pathlib import Path; from exporter.serving.launch import *; "
        "from exporter.serving.vllm_engine import *; "
        f"made = launch(Path({str(folder)!r}), {{}}, Program({program.path!r}, '0', False), port=free_port()); "
        f"engine = Engine(made, Path({str(tmp_path / 'log')!r})); engine.start(); engine.wait_healthy(60); "
        "print(engine.pid, flush=True); time.sleep(600)"
    )
    parent = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert parent.stdout
    pid = int(parent.stdout.readline())
    parent.send_signal(signal.SIGKILL)
    parent.wait()
    parent.stdout.close()
    ended = gone(pid)
    if not ended:
        os.killpg(pid, signal.SIGKILL)
    assert ended


def refusing_program(folder: Path, text: str) -> Program:
    """A vLLM whose environment lacks a package: it writes the library's text and exits."""
    path = folder / "refusing"
    path.write_text(f"#!{sys.executable}\nimport sys\nsys.exit({text!r})\n")
    path.chmod(0o755)
    return Program(str(path), "0", cpu=False)


def num2words_text(monkeypatch: pytest.MonkeyPatch) -> str:
    """transformers' own text about num2words."""
    from transformers.models.smolvlm import processing_smolvlm

    monkeypatch.setattr(processing_smolvlm, "num2words", None)
    with pytest.raises(ImportError) as caught:
        processing_smolvlm.SmolVLMProcessor(None, Mock(), None)
    return str(caught.value)


def test_a_package_that_vllms_environment_lacks_is_named_in_the_hint(folder, tmp_path, monkeypatch):
    from transformers.utils.import_utils import TORCHVISION_IMPORT_ERROR

    texts = {"num2words": num2words_text(monkeypatch), "torchvision": TORCHVISION_IMPORT_ERROR.format("Pixtral")}
    for package, text in texts.items():
        program = refusing_program(tmp_path, f"ImportError: {text}\n" * 2)
        with Engine(command(folder, program), tmp_path / "log") as engine, pytest.raises(ServeError) as caught:
            engine.wait_healthy(60)
        assert f"it lacks {package} in vLLM's environment, that of {program.path}" in str(caught.value.hint)
        assert f"run `pip install {package}` there" in str(caught.value.hint)
        result = {"error": caught.value.message, "hint": caught.value.hint}
        assert summary(result) == {"not run": f"it lacks {package} in vLLM's environment"}


@pytest.mark.parametrize(("family", "hint"), [("smolvlm", "pip install num2words"), ("llava", "None")])
def test_without_a_log_the_hint_names_what_the_family_needs(family, hint, folder, tmp_path):
    """`mmq serve` leaves vLLM's output on the terminal."""
    made = launch(folder, {}, refusing_program(tmp_path, "no"), port=free_port(), family=FAMILIES[family])
    with Engine(made) as engine, pytest.raises(ServeError) as caught:
        engine.wait_healthy(60)
    assert hint in str(caught.value.hint)


def test_a_server_that_exits_is_reported_with_the_end_of_its_log(folder, program, tmp_path):
    with (
        Engine(command(folder, program, "--bad"), tmp_path / "log") as engine,
        pytest.raises(ServeError, match=r"exited with code 1(.|\n)*There is no module named 'x'"),
    ):
        engine.wait_healthy(60)


def test_a_taken_port_is_refused(engine):
    with pytest.raises(ServeError, match="is in use"):
        Engine(engine.launch).start()


def flags(serve_command: Launch) -> dict[str, str]:
    return dict(zip(serve_command.command[3::2], serve_command.command[4::2], strict=False))


def test_the_command_has_the_flags_that_the_artifact_needs(folder):
    config = {"dtype": "float16", "text_config": {"max_position_embeddings": 8192}}
    gpu = launch(folder, config, Program("vllm", "0.32.0", False), tensor_parallel=2)
    assert gpu.command[:3] == ("vllm", "serve", str(folder))
    assert flags(gpu) == {
        "--host": "127.0.0.1",
        "--port": "8000",
        "--served-model-name": "model",
        "--dtype": "float16",
        "--limit-mm-per-prompt": '{"image": 1}',
        "--max-model-len": "8192",
        "--tensor-parallel-size": "2",
    }
    assert gpu.environment["HF_HUB_OFFLINE"] == "1"
    plain = launch(folder, config, Program("vllm", "0.32.0+cpu", True))
    assert flags(plain)["--dtype"] == "bfloat16"
    cpu = launch(folder, config, Program("vllm", "0.32.0+cpu", True), extra=("--max-model-len=256", "--dtype", "half"))
    assert flags(cpu)["--dtype"] == "half"
    assert cpu.command.count("--dtype") == 1
    assert "--max-model-len" not in cpu.command
    assert "--enforce-eager" in cpu.command
    assert cpu.environment["VLLM_CPU_OMP_THREADS_BIND"] == "nobind"
    assert cpu.shell().startswith("HF_HUB_OFFLINE=1 ")


@pytest.mark.parametrize(
    ("config", "cpu", "expected"),
    [
        ({"dtype": "bfloat16"}, False, "bfloat16"),
        ({"torch_dtype": "float16"}, False, "float16"),
        ({"torch_dtype": "float16"}, True, "bfloat16"),
        ({"dtype": "float32"}, False, "bfloat16"),
        ({}, False, "bfloat16"),
    ],
)
def test_dtype(config, cpu, expected):
    assert dtype(config, cpu) == expected


def test_the_engine_gets_a_template_where_the_models_own_lacks_the_start_token():
    """vLLM tokenizes a rendered template without special tokens; LLaVA-1.5's template does not write `<s>`."""
    folder, vllm = MODELS["demo-llava"], Program("vllm", "0", False)
    own = (folder / "chat_template.jinja").read_text()
    assert flags(launch(folder, {}, vllm, family=FAMILIES["llava"]))["--chat-template"] == "{{ '<s>' }}" + own
    assert "--chat-template" not in flags(launch(folder, {}, vllm))


def test_a_missing_or_silent_program_is_refused(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("MMQ_VLLM", raising=False)
    with pytest.raises(ServeError, match="the program 'vllm' does not exist"):
        find_program()
    silent = tmp_path / "vllm"
    silent.write_text("#!/bin/sh\nexit 1\n")
    silent.chmod(0o755)
    with pytest.raises(ServeError, match="does not print a version"):
        find_program()
    silent.write_text("#!/bin/sh\necho noise\necho 0.32.0+cpu\n")
    assert find_program(str(silent)) == Program(str(silent), "0.32.0+cpu", True)


def test_a_command_of_several_words_is_a_program(tmp_path, monkeypatch):
    """A vLLM in a folder of PYTHONPATH without an executable: the interpreter reports the version."""
    metadata = tmp_path / "vllm-0.26.0.dist-info" / "METADATA"
    metadata.parent.mkdir()
    metadata.write_text("Metadata-Version: 2.1\nName: vllm\nVersion: 0.26.0\n")
    monkeypatch.setenv("MMQ_VLLM", f"env PYTHONPATH={tmp_path} {sys.executable} -m vllm.entrypoints.cli.main")
    vllm = find_program()
    assert (vllm.version, vllm.cpu) == ("0.26.0", False)
    serve_command = launch(tmp_path, {}, vllm)
    serve = serve_command.command.index("serve")
    assert serve_command.command[1:serve] == (
        f"PYTHONPATH={tmp_path}",
        sys.executable,
        "-m",
        "vllm.entrypoints.cli.main",
    )
    monkeypatch.setenv("MMQ_VLLM", "nosuchprogram -m vllm")
    with pytest.raises(ServeError, match="the program 'nosuchprogram -m vllm' does not exist"):
        find_program()


def test_logs_are_read():
    log = "x\nINFO a\nERROR [core] one\nnanobind: leaked\n - leaked\nValueError: two\ny\n"
    assert log_tail(log) == "  ERROR [core] one\n  ValueError: two"
    assert log_tail("a\n\nb\n") == "  a\n  b"
    twice = "INFO Using MacheteLinearKernel for A\n" * 2
    assert read_kernels(f"{twice}INFO Selected FooKernel for B") == ("FooKernel for B", "MacheteLinearKernel for A")
    two = "DEBUG Using scheme: A for m.0\nDEBUG Using scheme: B for m.1 \n"
    assert read_schemes(two) == {"m.0": "A", "m.1": "B"}
    with pytest.raises(ServeError, match="no token ids"):
        read_reply({"choices": [{"message": {"content": "red"}}]})


def test_every_listed_token_is_compared():
    reply = Reply("", (), (0,), (-0.2,), ({0: -0.2, 1: -3.5, 2: -8.0, 3: -1.0},))
    assert sorted(t[1] for t in listed_tokens(reply)) == [0, 1, 2, 3]
    assert distance_of([0.1, 0.3]) == Distance(0.3, pytest.approx(0.2), 2)


def test_an_empty_comparison_is_never_close():
    empty = distance_of([])
    assert not EngineComparison(empty, empty).close(0.015)
    floor = Distance(0.4, 0.1, 9)
    assert EngineComparison(Distance(0.79, 0.139, 9), floor).close(0.015)
    assert not EngineComparison(Distance(0.81, 0.139, 9), floor).close(0.015)
    assert not EngineComparison(Distance(0.79, 0.141, 9), floor).close(0.015)
    still = Distance(0.001, 0.0002, 9)
    assert EngineComparison(Distance(0.059, 0.014, 9), still).close(0.015)
    assert not EngineComparison(Distance(0.059, 0.016, 9), still).close(0.015)
    assert not EngineComparison(Distance(0.061, 0.014, 9), still).close(0.015)


def test_rows_are_rounded_to_their_own_scale():
    x = torch.tensor([[0.0, 1.0, -127.0], [0.0, 0.0, 0.0], [0.5, 63.4, 127.0]])
    assert torch.equal(round_rows(x, "int8"), torch.tensor([[0.0, 1.0, -127.0], [0.0, 0.0, 0.0], [0.0, 63.0, 127.0]]))
    eights = torch.tensor([[448.0, 447.0, 1.0]])
    assert torch.equal(round_rows(eights, "fp8"), torch.tensor([[448.0, 448.0, 1.0]]))


def test_a_model_rounds_the_inputs_of_the_linears_that_are_named():
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(16, 16), torch.nn.Linear(16, 4))
    x = torch.randn(3, 16)
    hidden = model[0](x)
    round_inputs(model, ServedRounding({"1": "int8"}))
    assert torch.equal(model(x), torch.nn.functional.linear(round_rows(hidden, "int8"), model[1].weight, model[1].bias))
    assert not torch.equal(round_rows(hidden, "int8"), hidden)


@pytest.mark.parametrize("kind", ["int8", "fp8"])
def test_every_gpu_rounds_its_part_of_a_divided_input(kind: InputRounding) -> None:
    """Tensor parallelism: each GPU sees some columns of a token, and their largest number gives the scale."""
    torch.manual_seed(0)
    model, x = torch.nn.Sequential(torch.nn.Linear(12, 4), torch.nn.Identity()), torch.randn(3, 12)
    parts = torch.cat([round_rows(part, kind) for part in x.split(6, dim=1)], dim=1)
    expected = model(parts)
    round_inputs(model, ServedRounding({"0": kind}, parts={"0": 2}))
    assert torch.equal(model(x), expected)
    assert not torch.equal(round_rows(x, kind), parts)


def test_a_free_port_stays_reserved_until_a_server_uses_it() -> None:
    """The system does not assign the port to others, and a server with SO_REUSEADDR can listen on it."""
    port = free_port()
    ports = []
    for _ in range(300):
        with socket.socket() as other:
            other.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            other.bind(("127.0.0.1", 0))
            ports.append(other.getsockname()[1])
    assert port not in ports
    with socket.socket() as stranger, pytest.raises(OSError, match="in use"):
        stranger.bind(("127.0.0.1", port))
    with HTTPServer(("127.0.0.1", port), BaseHTTPRequestHandler) as server:
        assert server.server_port == port
