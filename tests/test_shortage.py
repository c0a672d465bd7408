"""Out of memory: the error states device, bytes and advice, and batches shrink to avoid it."""

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from PIL import Image
from safetensors import SafetensorError

from exporter import data
from exporter import out_of_memory as shortage
from exporter.__main__ import main as entry
from exporter.commands.main import cli
from exporter.device import Device
from exporter.errors import CheckpointError, DataError, MemoryShortage, WorkdirError
from exporter.evaluation.answers import Store
from exporter.events import ignore
from exporter.model.inference.batch_size import BatchSize
from exporter.out_of_memory import explain_shortage, is_shortage, requested_bytes
from exporter.planning.plan import Unit
from exporter.quantization.block_calls import capture_calls
from exporter.quantization.workdir import UnitResult, Workdir

CPU = Device("cpu", "CPU", 2**30)
GPU = Device("cuda:0", "H100", 2**30)
CUDA_TEXT = (
    "CUDA out of memory. Tried to allocate 2.50 GiB. GPU 0 has a total capacity of 79.10 GiB of which 1.2 GiB is free."
)
FAILURES = {
    "torch on a GPU": torch.OutOfMemoryError(CUDA_TEXT),
    "CUDA itself": RuntimeError("CUDA error: out of memory"),
    "cuBLAS": RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    "a mapping": OSError(12, "Cannot allocate memory"),
    "Python": MemoryError(),
    "oneDNN": RuntimeError("could not create a primitive"),
    "safetensors": SafetensorError("Error while mapping: Cannot allocate memory (os error 12)"),
    "C++": RuntimeError("std::bad_alloc"),
    "a thread": RuntimeError("can't start new thread"),
}
OTHERS = [RuntimeError("shapes do not match"), OSError(28, "No space left on device"), ValueError("out of memory")]


@pytest.mark.parametrize("name", FAILURES)
def test_every_out_of_memory_error_is_recognized(name: str) -> None:
    assert is_shortage(FAILURES[name])
    assert not any(map(is_shortage, OTHERS))


@pytest.mark.parametrize("name", FAILURES)
@pytest.mark.parametrize("hidden", [True, False])
def test_an_error_that_replaced_one_of_memory_is_recognized(name: str, hidden: bool) -> None:
    """Wrappers turn every error of a library into one of mmq; a lack of memory stays one."""

    def read(error: Exception) -> NoReturn:
        try:
            raise error
        except type(error) as raised:
            raise CheckpointError("the file is damaged") from (None if hidden else raised)

    with pytest.raises(MemoryShortage, match="x: out of memory on the host"), explain_shortage("x", CPU):
        read(FAILURES[name])
    with pytest.raises(CheckpointError, match="the file is damaged"), explain_shortage("x", CPU):
        read(OTHERS[0])


def test_a_thread_that_cannot_start_is_named() -> None:
    with pytest.raises(MemoryShortage) as caught, explain_shortage("verify", CPU, (0, 2**30)):
        raise FAILURES["a thread"]
    assert "no thread can be started" in caught.value.message
    assert "predicted to take 1.00 GiB" in caught.value.message


@pytest.mark.parametrize("error", [MemoryError(), OSError(12, "Cannot allocate memory"), PermissionError(13, "denied")])
def test_finished_blocks_and_answers_that_cannot_be_read_now_are_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    """Only a file whose content is wrong is damaged; a full memory must not delete finished work."""

    def fail(*args: Any, **kwargs: Any) -> NoReturn:
        raise error

    unit = Unit(0, "vision", "block", ())
    work = Workdir.open(tmp_path / "work", {"a": 1})
    work.commit(unit, UnitResult({}, {}, ()))
    store = Store(tmp_path / "answers")
    store.add({"weights": "w"}, {"key": "yes"})
    with monkeypatch.context() as patched:
        patched.setattr("exporter.quantization.workdir.safe_open", fail)
        with pytest.raises((WorkdirError, MemoryError)) as first:
            work.drop_damaged([unit], ignore)
        patched.setattr(Path, "read_text", fail)
        with pytest.raises((DataError, MemoryError)) as second:
            store.read({"weights": "w"})
    assert is_shortage(first.value) == is_shortage(second.value) == is_shortage(error)
    work.drop_damaged([unit], ignore)
    assert work.done((unit,)) == 1
    assert store.read({"weights": "w"}) == {"key": "yes"}


def test_a_picture_that_does_not_fit_into_memory_is_not_called_damaged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(path: Path) -> NoReturn:
        raise MemoryError

    (tmp_path / "train").mkdir()
    Image.new("RGB", (9, 9)).save(tmp_path / "train" / "a.png")
    (tmp_path / "train" / "metadata.jsonl").write_text('{"file_name": "a.png", "caption": "c"}')
    monkeypatch.setattr("exporter.data.rows.open_picture", fail)
    with pytest.raises(MemoryShortage), explain_shortage("read data", CPU):
        data.samples("folder", tmp_path, "captioning", "train", 1, 0)


def test_a_forward_pass_out_of_memory_is_not_called_a_misfit() -> None:
    def run(model: Any, batch: Any) -> NoReturn:
        raise RuntimeError("[enforce fail at alloc_cpu.cpp:127] DefaultCPUAllocator: can't allocate memory")

    block = torch.nn.Linear(2, 2)
    with pytest.raises(MemoryShortage), explain_shortage("quantize", CPU):
        list(capture_calls(torch.nn.Sequential(block), [block], [{}], run, "language"))


def test_memory_that_is_full_before_a_command_starts_is_no_traceback(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail() -> NoReturn:
        raise MemoryError

    monkeypatch.setattr("exporter.commands.main.main", fail)
    monkeypatch.setattr(sys, "argv", ["mmq", "doctor"])
    with pytest.raises(SystemExit) as end:
        entry()
    assert end.value.code == 4
    assert capsys.readouterr().err == "Error: out of memory on the host\n"


@pytest.mark.parametrize("fill", [torch.empty, np.empty, bytearray], ids=["torch", "numpy", "Python"])
def test_out_of_memory_errors_of_libraries_on_this_host_are_recognized(fill: type) -> None:
    with pytest.raises((RuntimeError, MemoryError)) as caught:
        fill(2**55)
    assert is_shortage(caught.value)


def test_requested_bytes_are_read_from_the_message() -> None:
    assert requested_bytes(FAILURES["torch on a GPU"]) == int(2.5 * 2**30)
    with pytest.raises(RuntimeError) as caught:
        torch.empty(2**55, dtype=torch.uint8)
    assert requested_bytes(caught.value) == 2**55
    assert requested_bytes(MemoryError()) == 0


def test_the_error_states_step_device_sizes_and_advice(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shortage, "free_bytes", lambda device: 3 * 2**28)
    monkeypatch.setattr(shortage, "free_host_bytes", lambda: 5 * 2**30)
    with (
        pytest.raises(MemoryShortage) as caught,
        explain_shortage("quantize", GPU, (4 * 2**30, 2**30), "fewer --samples"),
    ):
        raise FAILURES["torch on a GPU"]
    expected = "quantize: out of memory on H100: 2.50 GiB more were requested, 0.75 GiB are free, "
    assert caught.value.message == expected + "the step was predicted to take 4.00 GiB"
    assert (caught.value.hint, caught.value.exit_code) == ("fewer --samples", 4)
    with pytest.raises(MemoryShortage) as caught, explain_shortage("write", GPU):
        raise MemoryError
    assert caught.value.message == "write: out of memory on the host: 5.00 GiB are free"
    with (
        pytest.raises(MemoryShortage, match=r"on the host: .* predicted to take 2\.00 GiB$"),
        explain_shortage("x", CPU, (0, 2**31)),
    ):
        torch.empty(2**55)


def test_a_known_shortage_and_other_errors_pass_through() -> None:
    inner = MemoryShortage("inner step")
    for error in (inner, *OTHERS):
        with pytest.raises(type(error)) as caught, explain_shortage("outer step", CPU):
            raise error
        assert caught.value is error


@pytest.mark.parametrize("options", [[], ["--json"]])
def test_commands_print_the_message_and_exit_with_code_4(options: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def examine() -> None:
        raise FAILURES["torch on a GPU"]

    monkeypatch.setattr("exporter.commands.doctor.examine", examine)
    result = CliRunner().invoke(cli, ["doctor", *options])
    assert result.exit_code == 4
    report = json.loads(result.stdout) if options else {"error": result.stderr}
    assert "doctor: out of memory on the host: 2.50 GiB more were requested" in report["error"]


def halves(room: int, items: int, size: int, times: int = 1) -> tuple[list[Sequence[int]], list[tuple[int, int]]]:
    """Completed batches if at most `room` items fit in memory, and the announced reductions (from, to)."""
    reductions: list[tuple[int, int]] = []

    def work(batch: Sequence[int]) -> Sequence[int]:
        if len(batch) > room:
            raise torch.OutOfMemoryError
        return batch

    batches = BatchSize(size, lambda large, small: reductions.append((large, small)))
    return list(batches.each(range(items), work, times)), reductions


def test_a_batch_that_does_not_fit_is_halved_permanently() -> None:
    batches, reductions = halves(room=3, items=11, size=8)
    assert [list(batch) for batch in batches] == [[0, 1], [2, 3], [4, 5], [6, 7], [8, 9], [10]]
    assert reductions == [(8, 4), (4, 2)]
    assert [len(batch) for batch in halves(room=8, items=11, size=8)[0]] == [8, 3]
    assert [len(batch) for batch in halves(room=8, items=20, size=4, times=4)[0]] == [8, 8, 4]


def test_one_item_that_does_not_fit_is_an_error() -> None:
    with pytest.raises(torch.OutOfMemoryError):
        halves(room=0, items=4, size=2)


def test_other_errors_are_not_retried() -> None:
    def work(batch: Sequence[int]) -> None:
        raise RuntimeError(f"a mistake in {len(batch)}")

    with pytest.raises(RuntimeError, match="in 4"):
        list(BatchSize(4).each(range(8), work))
