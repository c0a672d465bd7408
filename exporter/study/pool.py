"""Worker pools of a study: this process, processes of this machine, or a Ray cluster.

Each takes a module-level function and a list of tasks, and yields results in the order of completion. Workers share the
study's folder, so a cluster of several machines needs shared storage for it.
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

from exporter.distribution import install_extra
from exporter.errors import DataError, MmqError

_RAY_HINT = "`ray start --head` starts a cluster; if it requires a token, set RAY_AUTH_TOKEN to the cluster's token"

Function = Callable[..., Any]
Call = tuple[Any, ...]  # the function's arguments
WorkerPool = Callable[[Function, Sequence[Call]], Iterator[tuple[int, Any]]]  # (index of the task, its result)


def inline(function: Function, tasks: Sequence[Call]) -> Iterator[tuple[int, Any]]:
    """Run the tasks one after the other in this process."""
    for i, task in enumerate(tasks):
        yield i, function(*task)


def keeping_shortage(function: Function, *task: Any) -> Any:
    """Run a task in a worker; MemoryError when one of mmq's errors replaced a lack of memory.

    An error that is sent to another process loses the error that it replaced.
    """
    try:
        return function(*task)
    except MmqError as error:
        from exporter.out_of_memory import shortage_behind

        cause = shortage_behind(error)
        if cause is None:
            raise
        raise MemoryError(str(cause)) from None


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

    signal.signal(signal.SIGINT, signal.SIG_IGN)
    torch.set_num_threads(1)
    parent = multiprocessing.parent_process()
    assert parent is not None

    def follow() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=follow, daemon=True).start()


@contextmanager
def ray_cluster(address: str | None, gpus: float = 0) -> Iterator[WorkerPool]:
    """A pool on a Ray cluster. address: None starts one on this machine. gpus: GPUs per task (fractions are allowed).

    Raises DataError if Ray is not installed or no cluster answers at `address`.
    """
    try:
        import ray
    except ImportError:
        raise DataError("--ray needs the package ray", f"{install_extra('ray')}, or use --workers N") from None

    started = not ray.is_initialized()
    if started:
        try:
            ray.init(address=address, log_to_driver=False, include_dashboard=False)
        except (ConnectionError, RuntimeError, ValueError) as error:
            raise DataError(f"no Ray cluster at {address}: {error}", _RAY_HINT) from None

    def run(function: Function, tasks: Sequence[Call]) -> Iterator[tuple[int, Any]]:
        remote = ray.remote(num_cpus=1, num_gpus=gpus)(keeping_shortage)
        pending = {remote.remote(function, *task): i for i, task in enumerate(tasks)}
        try:
            while pending:
                ready, _ = ray.wait(list(pending), num_returns=1)
                for reference in ready:
                    yield pending.pop(reference), _result(ray, reference)
        finally:
            for reference in pending:
                ray.cancel(reference, force=True)

    try:
        yield run
    finally:
        if started:
            ray.shutdown()


def _result(ray: Any, reference: Any) -> Any:
    """Result of a task. Raises the own MmqError or MemoryError of the task, or an MmqError for a failure of Ray."""
    try:
        return ray.get(reference)
    except ray.exceptions.RayError as error:
        cause = getattr(error, "cause", None)
        if isinstance(cause, MmqError | MemoryError):
            raise cause from None
        message_lines = str(error).strip().splitlines()[-1:] or [type(error).__name__]
        raise MmqError(
            f"a task of the study failed on the Ray cluster: {message_lines[0]}",
            "every machine needs this version of mmq and the study's folder; run the same command again to resume",
        ) from error
