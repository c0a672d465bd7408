"""sha256 of whole files in background threads, each file read once per process.

A hash is reused while the file's path, inode, size and times are unchanged, and only inside this process. hashlib
releases the GIL, so several files are hashed at full speed while the main thread does other work.
"""

import hashlib
import os
import threading
import time
from collections.abc import Callable, Iterable
from concurrent.futures import Future
from concurrent.futures import TimeoutError as NotReady
from pathlib import Path
from typing import NamedTuple

from exporter.errors import CheckpointError

READ_BYTES = 32 * 2**20  # large reads, because a thread waits for the GIL after each
AT_ONCE = 8  # files read in parallel
SMALL_BYTES = 2**18  # files up to this size are hashed without a thread
SETTLED_NS = 10**8  # a file modified more recently may change again without a new timestamp
REPORT_SECONDS = 0.5  # interval of progress reports


def sha256(path: Path, on_read: Callable[[int], None] = lambda read: None) -> str:
    """sha256 of a file, hex. on_read: called with the number of bytes of every read."""
    hasher = hashlib.sha256()
    with path.open("rb", buffering=0) as file:
        size = os.fstat(file.fileno()).st_size
        buffer = memoryview(bytearray(min(READ_BYTES, size + 1)))  # of a small file: zeroing 32 MiB takes 10 ms
        while count := file.readinto(buffer):
            hasher.update(buffer[:count])
            on_read(count)
    return hasher.hexdigest()


class FileState(NamedTuple):
    """Attributes that change with a file's content. Unlike mtime_ns, programs cannot set ctime_ns."""

    path: Path
    device: int
    inode: int
    size: int
    mtime_ns: int
    ctime_ns: int

    @classmethod
    def of(cls, path: Path) -> "FileState":
        """The current state of `path`; CheckpointError if the file is missing."""
        try:
            stat = path.stat()
        except OSError as error:
            raise CheckpointError(f"{path}: cannot be read ({error.strerror})") from None
        return cls(path.absolute(), stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns)


class _Hashing:
    """Hash job of one file, running or finished: bytes read so far, and the result."""

    def __init__(self, state: FileState) -> None:
        self.state = state
        self.done = 0
        self.result: Future[str] = Future()
        self.settled = time.time_ns() - state.ctime_ns > SETTLED_NS

    def run(self) -> None:
        """Hash the file and set the result; target of the thread."""
        try:
            with _turns:
                self.result.set_result(self._digest())
        except Exception as error:  # noqa: BLE001 (`result()` raises it in the waiting thread)
            self.result.set_exception(error)

    def _digest(self) -> str:
        path = self.state.path
        try:
            digest = sha256(path, self._count)
        except OSError as error:
            raise CheckpointError(f"{path}: cannot be read ({error.strerror})") from None
        if FileState.of(path) != self.state:
            raise CheckpointError(f"{path} changed while it was read", "let its writer finish, then run again")
        return digest

    def _count(self, read: int) -> None:
        self.done += read


_known: dict[Path, _Hashing] = {}
_known_lock = threading.Lock()
_turns = threading.BoundedSemaphore(AT_ONCE)


def start_hashing(paths: Iterable[Path]) -> None:
    """Start hashing files in daemon threads; `hash_files` waits for the results."""
    for path in paths:
        _hashing(path)


def hash_files(
    paths: Iterable[Path], on_progress: Callable[[int, int], None] = lambda done, total: None
) -> dict[Path, str]:
    """Path -> sha256 of the whole file, hex.

    on_progress: called with bytes read and total bytes, twice a second while waiting. CheckpointError if a file cannot
    be read or changes while it is read.
    """
    running = {path: _hashing(path) for path in paths}
    total = sum(hashing.state.size for hashing in running.values())
    hashes = {}
    for path, hashing in running.items():
        while path not in hashes:
            try:
                hashes[path] = hashing.result.result(timeout=REPORT_SECONDS)
            except NotReady:
                on_progress(sum(job.done for job in running.values()), total)
    return hashes


def _hashing(path: Path) -> _Hashing:
    """The hash job of a file in its current state; started now unless a valid one exists."""
    state = FileState.of(path)
    with _known_lock:
        known = _known.get(state.path)
        if known and known.state == state and known.settled and not _failed(known.result):
            return known
        hashing = _known[state.path] = _Hashing(state)
    if state.size <= SMALL_BYTES:
        hashing.run()
        return hashing
    threading.Thread(target=hashing.run, name=f"sha256 {path.name}", daemon=True).start()
    return hashing


def _failed(result: Future[str]) -> bool:
    return result.done() and result.exception() is not None
