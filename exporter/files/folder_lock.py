"""A lock on a folder: one process writes there at a time, and a second one is told which process that is.

The lock is `flock` on a small file, which the kernel releases when its process ends, however it ends. The file names
the holder, and is removed when the lock is released.
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
from exporter.events import Event, Listener, ignore
from exporter.files.writing import disk_error, make_folder

FIELDS = ("pid", "host", "since", "command")  # what a lock file says of its holder
MAX_BYTES = 4096  # read of a lock file
MAX_SHOWN = 300  # characters of a holder's command in an error


@contextmanager
def hold(file: Path, folder: Path, shared: bool = False, on_event: Listener = ignore) -> Iterator[None]:
    """Hold the lock `file` of `folder` inside the block; LockedError names the process that holds it already.

    shared: several processes may hold it like this at the same time, while none holds it alone.
    Where the file system has no locks, or for a shared lock no room for the file, a note says so and the block runs
    without one. CheckpointError when the file of a lock that is not shared cannot be written.
    """
    try:
        descriptor = _acquire(file, folder, shared)
    except OSError as error:
        on_event(Event("note", 0, 0, f"{folder} cannot be locked ({error.strerror}): let no other process use it"))
        yield
        return
    try:
        yield
    finally:
        _release(file, descriptor)


def _acquire(file: Path, folder: Path, shared: bool) -> int:
    """A descriptor that holds the lock; OSError when the file system has no locks."""
    while True:
        descriptor = _open(file, shared)
        try:
            fcntl.flock(descriptor, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
            if _is_open_file(file, descriptor):  # else its holder removed it after we opened it
                os.ftruncate(descriptor, 0)
                os.pwrite(descriptor, json.dumps(_holder()).encode(), 0)
                return descriptor
        except BlockingIOError:
            holder = _described(os.pread(descriptor, MAX_BYTES, 0))
            os.close(descriptor)
            raise LockedError(
                f"{folder} is used by another process: {holder}",
                "wait until it has ended, or stop it; the lock of a process that ended is free by itself",
            ) from None
        except OSError:
            os.close(descriptor)
            raise
        os.close(descriptor)


def _open(file: Path, shared: bool) -> int:
    """The lock file, made with its folder where it is absent; else CheckpointError, for a shared lock OSError."""
    while True:
        make_folder(file.parent)
        try:
            return os.open(file, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o644)
        except FileNotFoundError:
            continue  # another process removed the folder meanwhile
        except OSError as error:
            if shared:
                raise
            raise disk_error(file, error) from None


def _is_open_file(file: Path, descriptor: int) -> bool:
    try:
        return os.path.samestat(file.lstat(), os.fstat(descriptor))
    except FileNotFoundError:
        return False


def _release(file: Path, descriptor: int) -> None:
    """Remove the file unless other processes share the lock, and let go."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if _is_open_file(file, descriptor):
            file.unlink(missing_ok=True)
    except OSError:
        pass  # shared with others (the last one removes it), or the folder is gone
    finally:
        os.close(descriptor)


def _holder() -> dict[str, Any]:
    """This process, as a lock file names it."""
    since = datetime.now().astimezone().isoformat(sep=" ", timespec="seconds")
    return dict(zip(FIELDS, (os.getpid(), platform.node(), since, shlex.join(sys.argv)), strict=True))


def _described(content: bytes) -> str:
    """The holder in words; it may not have written its name yet."""
    try:
        holder = json.loads(content)
        pid, host, since, command = (str(holder[name]) for name in FIELDS)
    except (ValueError, TypeError, KeyError):
        return "it has just begun"
    shown = "".join(letter if letter.isprintable() else "?" for letter in command)
    shown = shown if len(shown) <= MAX_SHOWN else shown[:MAX_SHOWN] + "..."
    return f"process {pid} on {host} since {since} ({shown})"
