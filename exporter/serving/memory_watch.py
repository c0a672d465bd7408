"""Peak memory of a process group, sampled while it runs."""

import os
import re
import subprocess
import threading
from pathlib import Path
from types import TracebackType
from typing import Self

PAUSE = 0.5  # seconds between two samples
PROC = Path("/proc")


class MemoryWatch:
    """Samples the memory of a process group in a thread; use it as a context manager.

    host: largest proportional set size in bytes (shared pages count once); None where /proc has none. gpu: largest
    bytes on NVIDIA GPUs; None without one.
    """

    def __init__(self, group: int, gpu: bool) -> None:
        self.host: int | None = None
        self.gpu: int | None = None
        self._group, self._reads_gpu = group, gpu
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        self._thread.join()

    def _watch(self) -> None:
        while True:
            members = group_members(self._group)
            self.host = _larger(self.host, host_bytes(members))
            if self._reads_gpu:
                self.gpu = _larger(self.gpu, gpu_bytes(members))
            if self._stop.wait(PAUSE):
                return


def _larger(old: int | None, new: int | None) -> int | None:
    return new if old is None else old if new is None else max(old, new)


def group_members(group: int) -> list[int]:
    """Process ids of a process group."""
    members = []
    for folder in PROC.glob("[0-9]*"):
        try:
            if os.getpgid(int(folder.name)) == group:
                members.append(int(folder.name))
        except OSError:  # ended meanwhile
            continue
    return members


def host_bytes(members: list[int]) -> int | None:
    """Proportional set size of the processes in bytes; None if the system does not report it."""
    sizes = []
    for member in members:
        try:
            text = (PROC / str(member) / "smaps_rollup").read_text()
        except OSError:
            continue
        match = re.search(r"^Pss:\s+(\d+) kB", text, re.MULTILINE)
        sizes += [int(match[1]) * 1024] if match else []
    return sum(sizes) if sizes else None


def gpu_bytes(members: list[int]) -> int | None:
    """Bytes of the processes on NVIDIA GPUs by nvidia-smi; None without it, or if it lists none of them."""
    words = ["nvidia-smi", "--query-compute-apps=pid,used_gpu_memory", "--format=csv,noheader,nounits"]
    try:
        listed = subprocess.run(words, capture_output=True, text=True, timeout=20, check=False).stdout
    except (OSError, subprocess.TimeoutExpired):
        return None
    rows = [line.split(",") for line in listed.splitlines() if line.count(",") == 1]
    sizes = [int(size) * 2**20 for pid, size in rows if pid.strip().isdigit() and int(pid) in members]
    return sum(sizes) if sizes else None
