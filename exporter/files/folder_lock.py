"""Lock on a folder: only one process writes at a time; the error for a second process names the first.

The lock is `flock` on a small file. The kernel releases it when the process ends for any reason. The file names the
holder and is removed on release.
"""

import fcntl
import json
import os
import platform
import shlex
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import Any

from exporter.errors import LockedError
from exporter.events import Listener, ignore, notice
from exporter.files.writing import disk_error, make_folder

FIELDS = ("pid", "host", "since", "command")  # fields of a lock file that describe its holder
MAX_BYTES = 4096  # most bytes read of a lock file
TRIES = 1000  # to create a lock file in a folder that other processes remove
MAX_SHOWN = 300  # characters of a holder's command in an error


@contextmanager
def hold(file: Path, folder: Path, shared: bool = False, on_event: Listener = ignore) -> Iterator[None]:
    """Hold the lock `file` of `folder` inside the `with` block; LockedError names the process that already holds it.

    shared: several processes may hold a shared lock at the same time, but not together with an exclusive one.
    If the file system has no locks, or the file of a shared lock cannot be written, emit a note and run without a lock.
    CheckpointError if the file of an exclusive lock cannot be written.
    """
    try:
        descriptor = _acquire(file, folder, shared)
    except OSError as error:
        on_event(notice(f"{folder} cannot be locked ({error.strerror}); make sure that no other process uses it"))
        yield
        return
    try:
        yield
    finally:
        _release(file, descriptor)


def _acquire(file: Path, folder: Path, shared: bool) -> int:
    """Lock and return the file descriptor; OSError if the file system has no locks."""
    while True:
        descriptor = _open(file, shared)
        try:
            fcntl.flock(descriptor, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
            if _is_open_file(file, descriptor):  # otherwise the previous holder removed it after the open
                os.ftruncate(descriptor, 0)
                os.pwrite(descriptor, json.dumps(_holder()).encode(), 0)
                return descriptor
        except BlockingIOError:
            holder = _described(os.pread(descriptor, MAX_BYTES, 0))
            os.close(descriptor)
            raise LockedError(
                f"{folder} is used by another process: {holder}",
                "wait until it ends, or stop it; the lock is released when the process ends",
            ) from None
        except OSError:
            os.close(descriptor)
            raise
        os.close(descriptor)


def _open(file: Path, shared: bool) -> int:
    """Open the lock file; create it and its folder if missing. CheckpointError (shared lock: OSError) on failure."""
    for left in reversed(range(TRIES)):
        make_folder(file.parent)
        try:
            return os.open(file, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o644)
        except OSError as error:
            if isinstance(error, FileNotFoundError) and left:
                continue  # another process removed the folder meanwhile; /proc takes no file at all
            if shared:
                raise
            raise disk_error(file, error) from None
    raise AssertionError("the last try returns or raises")


def _is_open_file(file: Path, descriptor: int) -> bool:
    try:
        return os.path.samestat(file.lstat(), os.fstat(descriptor))
    except FileNotFoundError:
        return False


def _release(file: Path, descriptor: int) -> None:
    """Release the lock; remove its file unless other processes share the lock."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if _is_open_file(file, descriptor):
            file.unlink(missing_ok=True)
    except OSError:
        pass  # the lock is shared (the last holder removes the file), or the folder was removed
    finally:
        os.close(descriptor)


def _holder() -> dict[str, Any]:
    """Description of this process for the lock file."""
    since = datetime.now().astimezone().isoformat(sep=" ", timespec="seconds")
    return dict(zip(FIELDS, (os.getpid(), platform.node(), since, shlex.join(sys.argv)), strict=True))


def _described(content: bytes) -> str:
    """The holder as text, from the content of the lock file, which may still be empty."""
    try:
        holder = json.loads(content)
        pid, host, since, command = (str(holder[name]) for name in FIELDS)
    except (ValueError, TypeError, KeyError):
        return "it has just started"
    shown = "".join(letter if letter.isprintable() else "?" for letter in command)
    shown = shown if len(shown) <= MAX_SHOWN else shown[:MAX_SHOWN] + "..."
    return f"process {pid} on {host} since {since} ({shown})"
