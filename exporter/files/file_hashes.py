"""sha256 of whole files in background threads, each file read once per process.

A hash is reused while the file's path, inode, size and times are what they were when it was computed, and only inside
this process: no hash outlives the run. hashlib releases the GIL, so that several files are hashed at full speed while
the main thread does something else.
"""

import hashlib
import threading
import time
from collections.abc import Callable, Iterable
from concurrent.futures import Future
from concurrent.futures import TimeoutError as NotReady
from pathlib import Path
from typing import NamedTuple

from exporter.errors import CheckpointError

READ_BYTES = 8 * 2**20  # large reads: after each, a thread waits for the GIL
AT_ONCE = 8  # files that are read at the same time
SETTLED_NS = 10**8  # a file changed less than this before it was read may change again within one tick of its clock
REPORT_SECONDS = 0.5  # interval of progress reports


def sha256(path: Path, on_read: Callable[[int], None] = lambda read: None) -> str:
    """sha256 of a file as it is now, hex. on_read: called with the bytes of every read."""
    hasher, buffer = hashlib.sha256(), memoryview(bytearray(READ_BYTES))
    with path.open("rb", buffering=0) as file:
        while count := file.readinto(buffer):
            hasher.update(buffer[:count])
            on_read(count)
    return hasher.hexdigest()


class FileState(NamedTuple):
    """What changes when a file's content does. ctime_ns cannot be set by programs, unlike mtime_ns."""

    path: Path
    device: int
    inode: int
    size: int
    mtime_ns: int
    ctime_ns: int

    @classmethod
    def of(cls, path: Path) -> "FileState":
        """The state now (CheckpointError when there is no such file)."""
        try:
            stat = path.stat()
        except OSError as error:
            raise CheckpointError(f"{path}: cannot be read ({error.strerror})") from None
        return cls(path.absolute(), stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns)


class _Hashing:
    """One file that is being hashed, or was: bytes read so far, and the result."""

    def __init__(self, state: FileState) -> None:
        self.state = state
        self.done = 0
        self.result: Future[str] = Future()
        self.settled = time.time_ns() - state.ctime_ns > SETTLED_NS

    def run(self) -> None:
        """Hash the file; the end of a thread."""
        try:
            with _turns:
                self.result.set_result(self._digest())
        except Exception as error:  # noqa: BLE001 (whoever waits for the result raises it)
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
    """Begin to hash files in background threads, which end with the process; `hash_files` waits for the results."""
    for path in paths:
        _hashing(path)


def hash_files(
    paths: Iterable[Path], on_progress: Callable[[int, int], None] = lambda done, total: None
) -> dict[Path, str]:
    """Path -> sha256 of the whole file, hex.

    on_progress: called with bytes read and bytes in all, twice a second while this waits. CheckpointError when a file
    cannot be read, or changes while it is read.
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
    """The work on a file in its present state: started earlier, or now."""
    state = FileState.of(path)
    with _known_lock:
        known = _known.get(state.path)
        if known and known.state == state and known.settled and not _failed(known.result):
            return known
        hashing = _known[state.path] = _Hashing(state)
    threading.Thread(target=hashing.run, name=f"sha256 {path.name}", daemon=True).start()
    return hashing


def _failed(result: Future[str]) -> bool:
    return result.done() and result.exception() is not None
