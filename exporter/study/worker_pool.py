"""Worker pools of a study on this machine: this process, or several processes; `ray_workers` has that of a Ray cluster.

Each takes a module-level function and a list of tasks, and yields results in the order of completion.
"""

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from types import TracebackType
from typing import Any, Self

from exporter.errors import MmqError
from exporter.evaluation.cluster.ray_cluster import Call, Function
from exporter.out_of_memory import keeping_shortage
from exporter.transformers_import import only_mmq_runs_here

WorkerPool = Callable[[Function, Sequence[Call]], Iterator[tuple[int, Any]]]  # (index of the task, its result)


def inline(function: Function, tasks: Sequence[Call]) -> Iterator[tuple[int, Any]]:
    """Run the tasks one after the other in this process."""
    for i, task in enumerate(tasks):
        yield i, function(*task)


class Processes:
    """`workers` processes of this machine with one torch thread each; they exit when this process exits.

    Use as a context manager: the workers persist between calls, with their open models.
    """

    def __init__(self, workers: int) -> None:
        self._workers = workers
        self._executor: ProcessPoolExecutor | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._executor is None:
            return
        if error is not None:
            for child in multiprocessing.active_children():
                child.terminate()
        self._executor.shutdown(wait=True, cancel_futures=True)

    def __call__(self, function: Function, tasks: Sequence[Call]) -> Iterator[tuple[int, Any]]:
        if self._executor is None:
            context = multiprocessing.get_context("spawn")  # torch's threads do not survive a fork
            self._executor = ProcessPoolExecutor(self._workers, context, _begin)
        task_index = {self._executor.submit(keeping_shortage, function, *task): i for i, task in enumerate(tasks)}
        try:
            for future in as_completed(task_index):
                yield task_index[future], future.result()
        except BrokenProcessPool:
            raise MmqError(
                "a worker process of the study was killed, possibly because memory ran out",
                "run the same command again with fewer --workers to resume",
            ) from None


@contextmanager
def local(workers: int) -> Iterator[WorkerPool]:
    """A pool on this machine: `workers` processes, or this process if `workers` is 1."""
    if workers < 2:
        yield inline
    else:
        with Processes(workers) as pool:
            yield pool


def _begin() -> None:
    """Initialize a worker: ignore SIGINT, use one torch thread, and exit when the parent process exits."""
    import torch

    only_mmq_runs_here()
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    torch.set_num_threads(1)
    parent = multiprocessing.parent_process()
    assert parent is not None

    def follow() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=follow, daemon=True).start()
