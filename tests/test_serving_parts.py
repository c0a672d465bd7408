"""Parts of `mmq serve`, `mmq check` and `mmq bench` without an engine: memory, commands, verdicts, retries."""

import math
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest
import torch
from safetensors.torch import load_file, save_file

from exporter.device import Device
from exporter.errors import MemoryShortage, ServeError
from exporter.events import Event
from exporter.model.families import FAMILIES
from exporter.numerics.quantized import Scheme
from exporter.serving import (
    check,
    comparison,
    launch,
    memory_watch,
    negative_control,
    plugin,
    reference,
    request_load,
    speed,
    vllm_engine,
)
from exporter.serving.comparison import CheckSettings, Control, DoubledRun, distance_problems
from exporter.serving.launch import Launch, Program
from exporter.serving.reference import Distance, EngineComparison
from exporter.serving.request_load import LoadResult, TimedAnswer
from exporter.serving.speed import SpeedSettings
from exporter.serving.vllm_engine import Engine, log_tail, read_reply, read_schemes, refuse_taken_port

GPU, CPU = (Program("vllm", "0.32.0", cpu=cpu) for cpu in (False, True))


# Memory


def test_the_memory_of_processes_is_summed_from_their_proportional_sizes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(memory_watch, "PROC", tmp_path)
    for member, text in ((3, "Rss: 9 kB\nPss:   100 kB\nPss_Anon: 7 kB\n"), (4, "Pss: 20 kB\n"), (5, "nothing")):
        (tmp_path / str(member)).mkdir()
        (tmp_path / str(member) / "smaps_rollup").write_text(text)
    assert memory_watch.host_bytes([3, 4, 5, 6]) == 120 * 1024
    assert memory_watch.host_bytes([5, 6]) is None
    monkeypatch.setattr(os, "getpgid", lambda number: {3: 7, 4: 8, 5: 7}[number])
    assert sorted(memory_watch.group_members(7)) == [3, 5]


def test_the_memory_on_gpus_is_that_which_nvidia_smi_lists(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    program = tmp_path / "nvidia-smi"
    program.write_text("#!/bin/sh\nprintf '3, 100\\n4, 20\\n9, 5\\nx, 1\\nNo devices\\n'\nexit 1\n")
    program.chmod(0o755)
    assert memory_watch.gpu_bytes([3, 4]) == 120 * 2**20
    assert memory_watch.gpu_bytes([5]) is None
    monkeypatch.setenv("PATH", "")
    assert memory_watch.gpu_bytes([3, 4]) is None


def test_the_largest_sample_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    samples = iter([(5, None), (7, 2), (None, 3), (6, 1)])
    monkeypatch.setattr(memory_watch, "group_members", lambda group: next(samples))
    monkeypatch.setattr(memory_watch, "host_bytes", lambda members: members[0])
    monkeypatch.setattr(memory_watch, "gpu_bytes", lambda members: members[1])
    watch = memory_watch.MemoryWatch(1, gpu=True)
    watch._stop = SimpleNamespace(wait=lambda pause: samples.__length_hint__() == 0)  # type: ignore[assignment]
    watch._watch()
    assert (watch.host, watch.gpu) == (7, 3)
    samples = iter([(5, 9)])
    unseen = memory_watch.MemoryWatch(1, gpu=False)
    unseen._stop = watch._stop
    unseen._watch()
    assert (unseen.host, unseen.gpu) == (5, None)


# Commands


def test_the_script_of_the_installation_is_the_packages_or_the_checkouts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(launch, "__file__", str(tmp_path / "exporter" / "serving" / "launch.py"))
    assert f"bash {tmp_path}/serving/cpu/install.sh DIR" in launch.installation()
    inside = tmp_path / "exporter" / "serving" / "cpu"
    inside.mkdir(parents=True)
    (inside / "install.sh").touch()
    assert f"bash {inside}/install.sh DIR" in launch.installation()


def flags_of(command: Launch) -> dict[str, str]:
    """Flag -> value of a command."""
    words = command.command[command.command.index("serve") + 2 :]
    return dict(zip(words[::2], words[1::2], strict=False))


def test_a_command_has_the_flags_of_the_hardware(tmp_path: Path) -> None:
    config = {"text_config": {"max_position_embeddings": 2**20, "dtype": "float16"}}
    on_gpu = launch.launch(tmp_path, config, GPU)
    assert flags_of(on_gpu) == {
        "--host": "127.0.0.1",
        "--port": "8000",
        "--served-model-name": tmp_path.name,
        "--dtype": "float16",
        "--limit-mm-per-prompt": '{"image": 1}',
        "--max-model-len": str(2**15),
    }
    assert (on_gpu.url, on_gpu.model) == ("http://127.0.0.1:8000", tmp_path.name)
    assert on_gpu.environment == {"HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1"}
    on_cpu = launch.launch(tmp_path, config, CPU, port=9, tensor_parallel=2)
    assert on_cpu.command[-1] == "--enforce-eager"
    assert flags_of(on_cpu) == flags_of(on_gpu) | {
        "--port": "9",
        "--dtype": "bfloat16",
        "--max-model-len": "4096",
        "--tensor-parallel-size": "2",
    }
    assert on_cpu.environment["VLLM_CPU_KVCACHE_SPACE"] == "1"
    short = launch.launch(tmp_path, {"max_position_embeddings": 100}, GPU)
    assert (flags_of(short)["--max-model-len"], flags_of(short)["--dtype"]) == ("100", "bfloat16")
    assert "--max-model-len" not in flags_of(launch.launch(tmp_path, {}, GPU))


@pytest.mark.parametrize(
    ("extra", "model"),
    [
        (("--served-model-name", "mine"), "mine"),
        (("--served-model-name=mine",), "mine"),
        (("--seed", "1", "--served_model_name", "mine", "other"), "mine"),
        (("--served-model-name",), None),
        (("--seed", "1"), None),
    ],
)
def test_the_served_name_is_the_users_or_the_folders(extra: tuple[str, ...], model: str | None, tmp_path: Path) -> None:
    command = launch.launch(tmp_path, {}, CPU, extra=("--no-enforce-eager", *extra))
    assert command.model == (model or tmp_path.name)
    assert "--enforce-eager" not in command.command
    assert command.command.count("--served-model-name") == (
        0 if "--served_model_name" in extra or "=" in extra[0] else 1
    )


@pytest.mark.parametrize(
    ("host", "address"),
    [("0.0.0.0", "127.0.0.1"), ("::", "127.0.0.1"), ("", "127.0.0.1"), ("::1", "[::1]"), ("a", "a")],
)
def test_a_client_reaches_the_address_that_the_server_listens_on(host: str, address: str, tmp_path: Path) -> None:
    assert launch.launch(tmp_path, {}, GPU, host=host).url == f"http://{address}:8000"


@pytest.mark.parametrize(
    ("output", "code", "version"),
    [("0.32.0+cpu", 0, "0.32.0+cpu"), ("warning\\nv0.27.1", 0, "v0.27.1"), ("0.32.0", 1, None), ("vllm", 0, None)],
)
def test_the_version_that_a_program_prints(output: str, code: int, version: str | None, tmp_path: Path) -> None:
    program = tmp_path / "vllm"
    program.write_text(f"#!/bin/sh\nprintf '{output}\\n'\nexit {code}\n")
    program.chmod(0o755)
    if version is None:
        with pytest.raises(ServeError, match="does not print a version of vllm"):
            launch.find_program(str(program))
    else:
        assert launch.find_program(str(program)) == Program(str(program), version, "+cpu" in version)


def test_the_plugin_is_added_to_paths_before_serve_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    words = ("env", "PYTHONPATH=/site", "vllm", "serve", "PYTHONPATH=x")
    folder = plugin.plugin_folder()
    assert folder.parent == tmp_path / "mmq"
    assert len(folder.name) == len("vllm-plugin-") + 12
    made = plugin.with_plugin(Launch(words, {"A": "1"}, "u", "m"), "0.32.0", {"PYTHONPATH": "/mine"})
    assert made.command == ("env", f"PYTHONPATH=/site:{folder}", "vllm", "serve", "PYTHONPATH=x")
    assert made.environment == {"A": "1", plugin.SWITCH: "1", "PYTHONPATH": f"/mine:{folder}"}
    assert plugin.with_plugin(Launch(words, {}, "u", "m"), "0.32.0", {}).environment["PYTHONPATH"] == str(folder)


# The engine


ANSWER: dict[str, Any] = {
    "prompt_token_ids": [1, 2],
    "choices": [
        {
            "message": {"content": None},
            "token_ids": [7],
            "logprobs": {"content": [{"logprob": -0.5, "top_logprobs": [{"token": "token_id:7", "logprob": -0.5}]}]},
        }
    ],
}


def test_an_answer_of_the_engine_is_parsed_or_refused() -> None:
    reply = read_reply(ANSWER)
    assert (reply.text, reply.prompt, reply.tokens, reply.logprobs) == ("", (1, 2), (7,), (-0.5,))
    assert reply.top == ({7: -0.5},)
    for damaged in ({**ANSWER, "choices": []}, {**ANSWER, "prompt_token_ids": None}):
        with pytest.raises(ServeError, match="no token ids or log-probabilities"):
            read_reply(damaged)


def test_a_request_is_greedy_with_log_probabilities(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sent: list[Any] = []
    answers: list[Any] = [ANSWER, ServeError("refused"), ServeError("refused")]

    def post(url: str, body: Any) -> Any:
        sent.append((url, body))
        if isinstance(answer := answers.pop(0), ServeError):
            raise answer
        return answer

    monkeypatch.setattr(vllm_engine, "post", post)
    monkeypatch.setattr(vllm_engine, "message", lambda text, image: f"{text} {image.decode()}")
    engine = Engine(Launch((), {}, "http://a:1", "m"))
    assert engine.ask("what", b"picture").tokens == (7,)
    body = {
        "model": "m",
        "messages": ["what picture"],
        "max_tokens": 16,
        "temperature": 0,
        "seed": 0,
        "logprobs": True,
        "top_logprobs": 5,
        "return_token_ids": True,
        "return_tokens_as_token_ids": True,
    }
    assert sent == [("http://a:1/v1/chat/completions", body)]
    with pytest.raises(ServeError, match=r"^refused$"):
        engine.ask("what", b"picture", max_tokens=3, top=2, seed=4)
    assert sent[1][1] == body | {"max_tokens": 3, "top_logprobs": 2, "seed": 4}
    (tmp_path / "log").write_text("ERROR no memory\n")
    with pytest.raises(ServeError, match=r"^refused; the end of its log:\n  ERROR no memory$"):
        Engine(engine.launch, tmp_path / "log").ask("what", b"picture")


@pytest.mark.parametrize("debug", [False, True])
def test_variables_of_the_user_precede_those_of_the_launch(
    debug: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    started: list[Any] = []
    monkeypatch.setattr(vllm_engine, "refuse_taken_port", lambda url: None)
    popen = SimpleNamespace(Popen=lambda command, **options: started.append((command, options)), DEVNULL="nothing")
    monkeypatch.setattr(vllm_engine, "subprocess", popen)
    monkeypatch.setattr(os, "environ", {"A": "user", "PYTHONPATH": "/user", "TMPDIR": str(tmp_path)})
    launch_of = {"A": "mmq", "B": "mmq", "PYTHONPATH": "/user:/plugin"}
    engine = Engine(Launch(("vllm", "serve"), launch_of, "u", "m"), tmp_path / "log", debug)
    engine.start()
    command, options = started[0]
    environment = options["env"]
    assert command[1:] == ["-c", vllm_engine.DIE_WITH_PARENT, str(os.getpid()), "vllm", "serve"]
    assert {name: environment[name] for name in ("A", "B", "PYTHONPATH")} == {
        "A": "user",
        "B": "mmq",
        "PYTHONPATH": "/user:/plugin",
    }
    assert environment.get("VLLM_LOGGING_LEVEL") == ("DEBUG" if debug else None)
    sockets = Path(environment["VLLM_RPC_BASE_PATH"])
    assert sockets.is_dir()
    assert (options["stdin"], options["start_new_session"]) == ("nothing", True)
    assert options["stdout"] is options["stderr"] is engine._output
    engine.stop()
    assert not sockets.exists()
    assert options["stdout"].closed
    os.environ["VLLM_RPC_BASE_PATH"] = "/mine"
    alone = Engine(Launch(("vllm",), {}, "u", "m"))
    alone.start()
    assert started[1][1]["env"]["VLLM_RPC_BASE_PATH"] == "/mine"
    assert started[1][1]["env"]["PYTHONPATH"] == "/user"
    assert started[1][1]["stdout"] is vllm_engine.sys.stderr
    alone.stop()


def test_the_end_of_a_log_is_its_errors() -> None:
    lines = [f"INFO {i}" for i in range(20)] + ["", " - leaked", "nanobind: leaked"]
    assert log_tail("\n".join(lines)).splitlines() == [f"  INFO {i}" for i in range(5, 20)]
    assert log_tail("\n".join([*lines, "ValueError: x" + "y" * 500])) == "  ValueError: x" + "y" * 387
    assert read_schemes("Using scheme: A for b.c\nother\n") == {"b.c": "A"}


def test_a_taken_port_is_refused_for_both_kinds_of_addresses(monkeypatch: pytest.MonkeyPatch) -> None:
    tried: list[tuple[Any, ...]] = []

    class Probe:
        def __init__(self, family: int) -> None:
            tried.append((family,))

        def __enter__(self) -> "Probe":
            return self

        def __exit__(self, *error: object) -> None:
            pass

        def settimeout(self, seconds: float) -> None:
            pass

        def connect_ex(self, place: tuple[str, int]) -> int:
            tried[-1] += place
            return 0 if place[1] == 1 else 111

    monkeypatch.setattr(vllm_engine.socket, "socket", Probe)
    refuse_taken_port("http://[::1]:2")
    with pytest.raises(ServeError, match="port 1 of localhost is in use"):
        refuse_taken_port("http://localhost:1")
    assert tried == [(vllm_engine.socket.AF_INET6, "::1", 2), (vllm_engine.socket.AF_INET, "localhost", 1)]


def test_a_server_that_is_not_ready_in_time_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = Engine(Launch((), {}, "http://127.0.0.1:1", "m"), tmp_path / "log")
    (tmp_path / "log").write_text("INFO loading\n")
    now = iter([0.0, 1.0, 8.9, 9.5])
    monkeypatch.setattr(vllm_engine, "time", SimpleNamespace(monotonic=lambda: next(now), sleep=lambda seconds: None))
    monkeypatch.setattr(vllm_engine, "responds", lambda url: False)
    monkeypatch.setattr(Engine, "ended", lambda self: None)
    with pytest.raises(ServeError, match=r"vllm was not ready after 9 s; the end of its log:\n  INFO loading"):
        engine.wait_healthy(9.0)
    now = iter([2.0, 3.0, 5.5])
    monkeypatch.setattr(vllm_engine, "responds", lambda url: url == "http://127.0.0.1:1/health")
    assert engine.wait_healthy(9.0) == 3.5
    without = Engine(engine.launch)
    assert (without.kernels(), without.schemes(), without._log_tail()) == ((), {}, "")


# Verdicts


FLOOR = Distance(1.0, 0.1, 50)
NEAR, FAR = Distance(0.5, 0.05, 50), Distance(9.0, 3.0, 50)


def test_problems_of_a_check_have_figures() -> None:
    near, far = (EngineComparison(distance, FLOOR) for distance in (NEAR, FAR))
    text = "mean 3.0000 of 0.1400 allowed, largest 9.0000 of 2.0000 allowed"
    assert distance_problems(near, None, 0.015) == []
    assert distance_problems(far, Control("vision", NEAR, far), 0.015) == [
        f"log-probabilities are too far from the reference: {text}",
        "doubling the scales of vision moved the answers by only 0.0500 on average: the comparison cannot detect an "
        "error",
        f"with doubled scales of vision on both sides, the log-probabilities are too far apart: {text}",
    ]
    nan = Distance(math.nan, math.nan, 50)
    assert len(distance_problems(near, Control("vision", nan, near), 0.015)) == 1  # no number moves nothing


class FakeReference:
    """A reference that runs out of memory at first."""

    short: ClassVar[list[Exception]] = []

    def __init__(self, artifact: Any, processor: Any, device: Device, gpu: bool, placement: Any, gpus: int) -> None:
        assert gpus == 2
        self.gpu = gpu
        if FakeReference.short:
            raise FakeReference.short.pop()

    def prompt_problems(self, samples: Any, replies: Any) -> list[str]:
        return ["other prompts"] if replies == ["wrong"] else []

    def compare(self, samples: Any, replies: Any) -> EngineComparison:
        return EngineComparison(NEAR, FLOOR)

    def distance(self, samples: Any, replies: Any) -> Distance:
        return FAR


def test_the_reference_runs_with_less_where_memory_is_short(monkeypatch: pytest.MonkeyPatch) -> None:
    device, events = Device("cpu", "a CPU", 2**30), list[Event]()
    monkeypatch.setattr(comparison, "Reference", FakeReference)
    bfloat16 = SimpleNamespace(itemsize=2)
    monkeypatch.setattr(comparison, "reference_placements", lambda *_: [(device, "torch.float32"), (device, bfloat16)])
    monkeypatch.setattr(comparison.Artifact, "open", lambda folder: folder)
    artifact: Any = SimpleNamespace(parameters=lambda: 2**30)
    session = CheckSettings(GPU, device, events.append, tensor_parallel=2)

    def judged(replies: list[Any], doubled: DoubledRun | None = None) -> Any:
        return comparison.judge(artifact, [], replies, doubled, None, session)

    near = EngineComparison(NEAR, FLOOR)
    assert judged([]) == (near, None, [])
    assert judged(["wrong"]) == (None, None, ["other prompts"])
    assert judged([], DoubledRun("vision", Path("copy"), [])) == (near, Control("vision", FAR, near), [])
    assert not events
    FakeReference.short = [MemoryError()]
    assert judged([]) == (near, None, [])
    assert [(event.stage, event.done, event.total) for event in events] == [("note", 0, 0)]
    assert events[0].message.endswith("ran out of memory in float32 on a CPU: mmq tries it with less")
    FakeReference.short = [MemoryError(), MemoryError()]
    with pytest.raises(MemoryShortage, match=r"reference of the check.*predicted to take 2\.50 GiB") as caught:
        judged([])
    assert "close other programs" in str(caught.value.hint)
    FakeReference.short = [ValueError("a fault")]
    with pytest.raises(ValueError, match="a fault"):
        judged([])


def test_numbers_that_are_not_finite_are_stored_as_nothing() -> None:
    assert check._finite({"a": {"b": math.inf, "c": 0.5}, "d": math.nan, "e": 3, "f": "x"}) == {
        "a": {"b": None, "c": 0.5},
        "d": None,
        "e": 3,
        "f": "x",
    }


def test_linears_with_another_scheme_in_the_log_are_problems() -> None:
    scheme = Scheme(8, "row", activations="int8")
    (expected,) = check.engine_classes(scheme)
    artifact: Any = SimpleNamespace(
        manifest=SimpleNamespace(linears=["a", "b", "c", "d"]),
        family=SimpleNamespace(engine_name=lambda module: "fused" if module in "cd" else f"engine.{module}"),
        scheme_of=lambda module: scheme,
    )
    assert check.scheme_problems(artifact, {"engine.a": expected, "b": expected, "fused": expected}) == []
    assert check.scheme_problems(artifact, {"engine.a": expected, "engine.b": "Other"}) == [
        f"engine.b: the scheme in vllm's log is Other; expected {expected}",
        "fused: the scheme in vllm's log is none (the linear runs unquantized or under another name); "
        f"expected {expected}",
    ]


# Speed


def test_a_model_is_measured_for_one_client_and_for_those_that_are_asked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sent: list[tuple[str, int, int]] = []
    entered: list[Any] = []

    class Entered:
        pid, host, gpu = 1, 5, 7

        def __init__(self, *arguments: Any) -> None:
            entered.append(arguments[-1])

        def __enter__(self) -> "Entered":
            return self

        def __exit__(self, *error: object) -> None:
            pass

        def wait_healthy(self, seconds: float) -> float:
            return 1.234

    def load(url: str, bodies: Any, clients: int, requests: int) -> LoadResult:
        """The first load of a number of clients takes longer."""
        known = any(clients == number for _, number, _ in sent)
        sent.append((bodies[0], clients, requests))
        return LoadResult(2.0 if known else 1000.0, (TimedAnswer(0.1234567 * clients, 1.0, 30 * clients),))

    log, events = tmp_path / "log", list[Event]()
    log.write_text("Model loading took 0.5 GiB\n")
    monkeypatch.setattr(speed, "Engine", Entered)
    monkeypatch.setattr(speed, "MemoryWatch", Entered)
    monkeypatch.setattr(speed, "request_bodies", lambda *_: ["first", "last"])
    monkeypatch.setattr(speed, "run_load", load)
    settings, place = SpeedSettings(clients=(4, 2), requests=3), Launch((), {}, "http://a", "m")
    figures = speed.serve_and_measure(place, FAMILIES["llava"], [], settings, True, log, events.append)
    assert entered == [log, True]
    assert sent == [load for clients in (1, 2, 4) for load in (("last", clients, 1), ("first", clients, 3))]
    assert (figures.load_seconds, figures.first_token_seconds) == (1.23, 0.1235)
    assert figures.tokens_per_second == {"1": 15.0, "2": 30.0, "4": 60.0}
    assert (figures.peak_bytes, figures.gpu_bytes, figures.weight_bytes) == (5, 7, 2**29)
    assert [(event.done, event.total, event.message) for event in events] == [
        (0, 3, "m: 1 client"),
        (1, 3, "m: 2 clients"),
        (2, 3, "m: 4 clients"),
        (3, 3, "m"),
    ]


def test_pieces_of_an_answer_are_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    now = iter([10.0, 10.5, 13.0])
    events = [
        '{"choices": [{"delta": {"role": "a"}}]}',
        '{"choices": [{"delta": {"content": "x"}}]}',
        '{"choices": []}',
    ]

    def streamed(url: str, body: Any, seconds: float) -> Iterator[str]:
        assert body == {"model": "m", "stream_options": {"include_usage": True}}
        yield from [*events, events[1]]

    monkeypatch.setattr(request_load, "time", SimpleNamespace(perf_counter=lambda: next(now)))
    monkeypatch.setattr(request_load, "stream_events", streamed)
    assert request_load.timed_answer("u", {"model": "m"}) == TimedAnswer(0.5, 3.0, 2)
    now, events[1] = iter([0.0, 2.0]), events[0]
    assert request_load.timed_answer("u", {"model": "m"}) == TimedAnswer(2.0, 2.0, 0)


def test_killing_a_group_that_has_ended_is_no_error() -> None:
    child = subprocess.Popen(["true"], start_new_session=True)
    child.wait()
    vllm_engine.kill_group(child.pid)


# The check


class Checked:
    """A check with stand-ins for the engine, the reference and the artifact; records what runs."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.ran: list[tuple[str, str]] = []
        self.judged: list[DoubledRun | None] = []
        self.scheme_problems: list[str] = []
        self.component: str | None = "vision"
        manifest = SimpleNamespace(format="compressed_tensors", linears=[])
        self.artifact: Any = SimpleNamespace(manifest=manifest)
        self.folder = folder / "artifact"
        self.folder.mkdir()
        monkeypatch.setattr(check, "Artifact", SimpleNamespace(open=lambda folder: self.artifact))
        for name in ("refuse_unservable", "refuse_artifact_here", "reference_placements", "hardware"):
            monkeypatch.setattr(check, name, lambda *arguments: None)
        monkeypatch.setattr(check, "disturbed_component", lambda artifact, requested: requested or self.component)
        monkeypatch.setattr(check, "scheme_problems", lambda artifact, schemes: self.scheme_problems)
        monkeypatch.setattr(check, "double_scales", lambda artifact, folder, component, out: out)
        monkeypatch.setattr(check, "_run_engine", self._run)
        monkeypatch.setattr(check, "judge", self._judge)

    def _run(self, folder: Path, artifact: Any, samples: Any, settings: Any, log: Path, note: str = "") -> Any:
        assert log.parent.is_dir()
        self.ran.append((log.name, note))
        replies: Any = [f"reply of {log.stem}"] * len(samples)
        return check.EngineRun(replies, {"a": "X", "b": "Y", "c": "X"}, ("K",), 12.5)

    def _judge(self, artifact: Any, samples: Any, replies: Any, doubled: Any, processor: Any, settings: Any) -> Any:
        assert replies == ["reply of engine"] * 2
        self.judged.append(doubled)
        return EngineComparison(NEAR, FLOOR), None, ["too far"] if doubled else []

    def result(self, control: bool = True, **settings: Any) -> check.CheckResult:
        samples: Any = ["a", "b"]
        session = CheckSettings(CPU, Device("cpu", "a CPU", 2**30), lambda event: None, **settings)
        return check.check(self.folder, samples, None, session, control)


def test_a_check_runs_the_engine_and_its_control(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checked = Checked(tmp_path, monkeypatch)
    result = checked.result(logs=tmp_path / "logs" / "new")
    assert checked.ran == [("engine.log", ""), ("doubled.log", " with the scales of vision doubled")]
    (doubled,) = checked.judged
    assert doubled is not None
    assert (doubled.component, doubled.folder.name) == ("vision", "artifact")
    assert doubled.replies == ["reply of doubled"] * 2
    assert (result.engine, result.build, result.questions, result.bound) == ("0.32.0", "cpu", 2, 0.015)
    assert (result.schemes, result.kernels, result.startup_seconds) == ({"X": 2, "Y": 1}, ("K",), 12.5)
    assert (result.problems, result.passed) == (("too far",), False)
    assert check.as_plain(result)["passed"] is False
    assert check.as_plain(result)["schemes"] == {"X": 2, "Y": 1}
    assert (tmp_path / "logs" / "new").is_dir()


def test_a_check_has_no_control_where_it_proves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checked = Checked(tmp_path, monkeypatch)
    assert checked.result(control=False).passed
    checked.component = None  # nothing is packed
    assert checked.result().passed
    assert checked.judged == [None, None]
    checked.component, checked.scheme_problems = "vision", ["another scheme"]
    result = checked.result()
    assert (result.problems, result.compared, len(checked.judged)) == (("another scheme",), None, 2)
    assert [name for name, _ in checked.ran] == ["engine.log"] * 3
    checked.artifact.manifest.format = "gptq"  # vLLM logs no schemes of it
    assert checked.result().problems == ("too far",)
    assert checked.ran[-1][0] == "doubled.log"


def test_every_question_is_asked_with_its_task_s_longest_answer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[Any] = []

    class Server:
        def __init__(self, command: Launch, log: Path, debug: bool) -> None:
            assert (command, log, debug) == ("command with plugin for 0.32.0", tmp_path / "log", True)

        def __enter__(self) -> "Server":
            return self

        def __exit__(self, *error: object) -> None:
            pass

        def wait_healthy(self, seconds: float) -> float:
            assert seconds == 7.0
            return 3.5

        def ask(self, *words: Any) -> str:
            asked.append(words)
            return f"answer {len(asked)}"

        def schemes(self) -> dict[str, str]:
            return {"a": "X"}

        def kernels(self) -> tuple[str, ...]:
            return ("K",)

    launched: list[Any] = []
    monkeypatch.setattr(check, "Engine", Server)
    monkeypatch.setattr(check, "launch", lambda *places, **options: launched.append((places, options)) or "command")
    monkeypatch.setattr(check, "needs_plugin", lambda artifact: True)
    monkeypatch.setattr(check, "with_plugin", lambda command, version: f"{command} with plugin for {version}")
    monkeypatch.setattr(check, "free_port", lambda: 77)
    monkeypatch.setattr(check, "task_of", lambda sample: sample.task)
    monkeypatch.setattr(check, "prompt_text", lambda family, sample: f"{family.name} {sample.task}")
    monkeypatch.setattr(check, "png", lambda picture: picture)
    family = SimpleNamespace(name="llava", max_new_tokens={"vqa": 8, "captioning": 40})
    manifest = SimpleNamespace(kv_cache="fp8")
    artifact: Any = SimpleNamespace(family=family, manifest=manifest, checkpoint=SimpleNamespace(config="config"))
    samples: Any = [SimpleNamespace(task=task, image=lambda: b"picture") for task in ("vqa", "captioning")]
    events = list[Event]()
    settings = CheckSettings(CPU, Device("cpu", "a CPU", 2**30), events.append, 2, ("--x",), 7.0)
    run = check._run_engine(tmp_path, artifact, samples, settings, tmp_path / "log", " again")
    assert asked == [("llava vqa", b"picture", 8), ("llava captioning", b"picture", 40)]
    assert (run.replies, run.schemes, run.kernels, run.seconds) == (["answer 1", "answer 2"], {"a": "X"}, ("K",), 3.5)
    options = {"port": 77, "family": family, "tensor_parallel": 2, "kv_cache": "fp8", "extra": ("--x",)}
    assert launched == [((tmp_path, "config", CPU), options)]
    assert events[0].message == f"starting vllm 0.32.0 on {tmp_path.name} again"
    assert [(event.stage, event.done, event.total) for event in events[1:]] == [("ask", 1, 2), ("ask", 2, 2)]


def test_the_component_of_the_control_is_the_first_one_or_the_users(monkeypatch: pytest.MonkeyPatch) -> None:
    packed = {"vision": [], "language": ["a"], "head": ["b"]}
    monkeypatch.setattr(negative_control, "modules_of", lambda artifact, component: packed[component])
    components = [SimpleNamespace(name=name) for name in packed]
    artifact: Any = SimpleNamespace(family=SimpleNamespace(components=components))
    assert negative_control.disturbed_component(artifact) == "language"
    assert negative_control.disturbed_component(artifact, "head") == "head"
    with pytest.raises(ServeError, match="component 'vision' has no packed linears in this artifact") as caught:
        negative_control.disturbed_component(artifact, "vision")
    assert caught.value.hint == "components with packed linears: language, head"
    packed |= {"language": [], "head": []}
    assert negative_control.disturbed_component(artifact) is None


def test_files_without_scales_are_linked_in_the_copy(tmp_path: Path) -> None:
    source, out = tmp_path / "source", tmp_path / "out"
    (source / "folder").mkdir(parents=True)
    for name in ("a.safetensors", "b.safetensors"):
        save_file({f"{name[0]}.weight_scale": torch.ones(2), f"{name[0]}.weight": torch.ones(2)}, source / name)
    (source / "config.json").write_text("{}")
    tensors = {f"{name}.weight_scale": SimpleNamespace(file=f"{name}.safetensors") for name in "ab"}
    artifact: Any = SimpleNamespace(
        family=SimpleNamespace(component=lambda name: SimpleNamespace(holds=lambda module: module == "a")),
        manifest=SimpleNamespace(linears=["a", "b"]),
        checkpoint=SimpleNamespace(tensors=tensors),
    )
    assert negative_control.double_scales(artifact, source, "vision", out) == out
    assert sorted(path.name for path in out.iterdir()) == ["a.safetensors", "b.safetensors", "config.json"]
    assert {name: tensor.tolist() for name, tensor in load_file(out / "a.safetensors").items()} == {
        "a.weight_scale": [2.0, 2.0],
        "a.weight": [1.0, 1.0],
    }
    assert (out / "b.safetensors").is_symlink()
    assert (out / "b.safetensors").resolve() == source / "b.safetensors"
    assert not (out / "config.json").is_symlink()


@pytest.mark.parametrize("noise", [0, 3])
def test_noise_on_the_picture_is_below_a_step_of_16_bits(noise: int, monkeypatch: pytest.MonkeyPatch) -> None:
    pixels, seen = torch.full((1, 3, 8, 8), 0.5), list[Any]()

    class Model:
        def parameters(self) -> Iterator[torch.Tensor]:
            return iter([torch.zeros(1)])

        def __call__(self, **inputs: Any) -> Any:
            seen.append(inputs)
            return SimpleNamespace(logits=torch.arange(20.0).reshape(1, 5, 4))

    inputs = {"input_ids": torch.tensor([[1, 2, 3]]), "pixel_values": pixels}
    monkeypatch.setattr(reference, "prompt_inputs", lambda *arguments: dict(inputs))
    monkeypatch.setattr(reference, "continued", lambda inputs, tokens: inputs | {"tokens": torch.tensor(tokens)})
    made = object.__new__(reference.Reference)
    vars(made).update(_processor=None, _family=None, _device="cpu", _low=torch.bfloat16, _model=Model())
    sample: Any = None
    rows = made.log_probabilities(sample, vllm_engine.Reply("", (), (7, 8, 9), (), ()), noise=noise)
    assert rows.shape == (3, 4)
    assert torch.allclose(rows.exp().sum(-1), torch.ones(3))
    assert seen[0]["tokens"].tolist() == [7, 8]
    assert seen[0]["use_cache"] is False
    moved = (seen[0]["pixel_values"] / pixels - 1).abs()
    step = torch.finfo(torch.bfloat16).eps
    if noise:
        assert 0.2 * step < moved.max() <= 0.2501 * step
        assert abs(float((seen[0]["pixel_values"] / pixels - 1).mean())) < 0.05 * step  # to both sides
    else:
        assert torch.equal(seen[0]["pixel_values"], pixels)
