"""The end of the `mmq` command: exit codes are the same with a GPU, where Python's teardown is skipped."""

import os
import sys

import pytest

from exporter import __main__, device


class Ended(Exception):
    """What `os._exit` is replaced by."""


@pytest.mark.parametrize(("code", "expected"), [(None, 0), (0, 0), (3, 3)])
def test_a_process_that_used_a_gpu_ends_at_once_with_its_exit_code(
    code: int | None, expected: int, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def ends(status: int) -> None:
        raise Ended(status)

    monkeypatch.setattr(device, "uses_gpu", lambda: True)
    monkeypatch.setattr(os, "_exit", ends)
    sys.stdout.write("last words")
    with pytest.raises(Ended) as end:
        __main__._leave(SystemExit(code))
    assert end.value.args == (expected,)
    assert capfd.readouterr().out == "last words"


def test_a_process_without_a_gpu_ends_as_usual() -> None:
    with pytest.raises(SystemExit) as end:
        __main__._leave(SystemExit(5))
    assert end.value.code == 5


def test_a_message_instead_of_a_code_is_printed_by_python(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device, "uses_gpu", lambda: True)
    with pytest.raises(SystemExit, match="message"):
        __main__._leave(SystemExit("message"))
