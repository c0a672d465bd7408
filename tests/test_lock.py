"""One process writes to a folder at a time; the second one learns which process that is."""

import json
import os
import platform
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from exporter.errors import CheckpointError, LockedError
from exporter.events import Event
from exporter.files import folder_lock as lock
from exporter.files.folder_lock import hold

HOLDS = """
import sys, time
from pathlib import Path
from exporter.files.folder_lock import hold
with hold(Path(sys.argv[1]), Path(sys.argv[1]).parent, shared=sys.argv[2] == "shared"):
    print("held", flush=True)
    time.sleep(600)
"""


@contextmanager
def locked_by_another_process(file: Path, how: str = "alone") -> Iterator[subprocess.Popen[str]]:
    """Another process that holds the lock."""
    process = subprocess.Popen([sys.executable, "-c", HOLDS, str(file), how], stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        yield process
    finally:
        process.kill()
        process.wait()


def test_the_error_of_a_second_process_names_the_holder_of_the_lock(tmp_path: Path) -> None:
    file = tmp_path / ".lock"
    with locked_by_another_process(file) as process:
        with pytest.raises(LockedError) as caught, hold(file, tmp_path):
            pytest.fail("it was locked")
        message = caught.value.message
        assert str(tmp_path) in message
        assert f"process {process.pid} on {platform.node()} since 20" in message
        assert "alone" in message  # its command
        assert "wait until it ends" in str(caught.value.hint)


def test_a_killed_process_leaves_no_lock(tmp_path: Path) -> None:
    file = tmp_path / ".lock"
    with locked_by_another_process(file) as process:
        process.send_signal(signal.SIGKILL)
        process.wait()
        assert file.exists()
        with hold(file, tmp_path):
            assert json.loads(file.read_text())["pid"] == os.getpid()
    assert not file.exists()


def test_nothing_is_left_behind_by_success_or_failure(tmp_path: Path) -> None:
    file = tmp_path / "made" / ".lock"
    with hold(file, tmp_path):
        assert file.exists()
    with pytest.raises(ZeroDivisionError), hold(file, tmp_path):
        raise ZeroDivisionError
    assert not file.exists()


def test_two_threads_of_one_process_exclude_each_other(tmp_path: Path) -> None:
    with (
        hold(tmp_path / ".lock", tmp_path),
        pytest.raises(LockedError, match=f"process {os.getpid()}"),
        hold(tmp_path / ".lock", tmp_path),
    ):
        pytest.fail("it was locked")


def test_shared_locks_go_together_and_exclude_a_single_one(tmp_path: Path) -> None:
    file = tmp_path / ".lock"
    with locked_by_another_process(file, "shared"):
        with hold(file, tmp_path, shared=True):
            pass
        assert file.exists()  # the other one is still there
        with pytest.raises(LockedError), hold(file, tmp_path):
            pytest.fail("it was shared")
    with hold(file, tmp_path):
        pass
    assert not file.exists()


def test_a_lock_file_that_was_removed_meanwhile_is_not_taken_for_the_lock(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A process that opened the file before its holder removed it would hold a lock that nobody else sees."""
    file, opened = tmp_path / ".lock", []
    real = lock._open

    def open_and_lose(file: Path, shared: bool) -> int:
        opened.append(real(file, shared))
        if len(opened) == 1:
            file.unlink()
        return opened[-1]

    monkeypatch.setattr(lock, "_open", open_and_lose)
    with hold(file, tmp_path):
        assert len(opened) == 2
        with pytest.raises(LockedError), hold(file, tmp_path):
            pytest.fail("it was locked")


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b'{"pid": 1}', b"\xff\xfe", b"null"])
def test_any_content_of_a_lock_file_makes_a_sentence(content: bytes, tmp_path: Path) -> None:
    file = tmp_path / ".lock"
    with locked_by_another_process(file):
        file.write_bytes(content)
        with pytest.raises(LockedError, match="another process: it has just started"), hold(file, tmp_path):
            pytest.fail("it was locked")


def test_a_holder_cannot_print_control_characters_or_pages(tmp_path: Path) -> None:
    file = tmp_path / ".lock"
    with locked_by_another_process(file):
        file.write_text(json.dumps({"pid": 1, "host": "h", "since": "s", "command": "mmq \x1b[2J" + "x" * 2000}))
        with pytest.raises(LockedError) as caught, hold(file, tmp_path):
            pytest.fail("it was locked")
    assert "\x1b" not in caught.value.message
    assert len(caught.value.message) < 600 + len(str(tmp_path))


def test_a_file_system_without_locks_gives_a_note(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def unsupported(descriptor: int, operation: int) -> None:
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(lock.fcntl, "flock", unsupported)
    events: list[Event] = []
    with hold(tmp_path / ".lock", tmp_path, on_event=events.append):
        pass
    assert [event.stage for event in events] == ["note"]
    assert "cannot be locked" in events[0].message


def test_a_link_in_place_of_the_lock_is_not_followed(tmp_path: Path) -> None:
    (tmp_path / "precious").write_text("text")
    (tmp_path / ".lock").symlink_to(tmp_path / "precious")
    with pytest.raises(CheckpointError, match=r"\.lock"), hold(tmp_path / ".lock", tmp_path):
        pytest.fail("it was locked")
    assert (tmp_path / "precious").read_text() == "text"


def test_many_processes_take_turns(tmp_path: Path) -> None:
    """Each counts up once, without a lost count: the lock file is removed and made again all the time."""
    script = """
import sys
from pathlib import Path
from exporter.errors import LockedError
from exporter.files.folder_lock import hold
folder = Path(sys.argv[1])
done = 0
while done < 50:
    try:
        with hold(folder / ".lock", folder):
            count = int((folder / "count").read_text())
            (folder / "count").write_text(str(count + 1))
            done += 1
    except LockedError:
        pass
"""
    (tmp_path / "count").write_text("0")
    processes = [subprocess.Popen([sys.executable, "-c", script, str(tmp_path)]) for _ in range(3)]
    assert [process.wait(timeout=120) for process in processes] == [0, 0, 0]
    assert (tmp_path / "count").read_text() == "150"
    assert not (tmp_path / ".lock").exists()


@pytest.mark.parametrize("shared", [False, True])
def test_a_folder_that_cannot_be_written_to(shared: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Reading an artifact beside which nothing may be written is fine; writing one there is not."""

    def refuse(path: object, flags: int, mode: int = 0) -> int:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(lock.os, "open", refuse)
    events: list[Event] = []
    if shared:
        with hold(tmp_path / ".lock", tmp_path, shared=True, on_event=events.append):
            pass
        assert "cannot be locked (Permission denied)" in events[0].message
        return
    with pytest.raises(CheckpointError, match="Permission denied"), hold(tmp_path / ".lock", tmp_path):
        pytest.fail("it was locked")


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="needs procfs")
def test_a_file_system_that_takes_no_file_is_an_error() -> None:
    """procfs answers a new file with "no such file or directory", like a folder that was removed."""
    place = Path("/proc")
    with pytest.raises(CheckpointError, match=r"write failed: .*No such file"), hold(place / ".lock", place):
        pass
