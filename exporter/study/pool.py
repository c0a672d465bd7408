"""Where the work of a study runs: in this process, in processes of this machine, or on a Ray cluster.

All three take a function of a module and a list of tasks, and give results as they come. Workers share the study's
folder; on several machines it has to be on storage that all of them see.
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

_START = "`ray start --head` starts one; where Ray asks for a token, give RAY_AUTH_TOKEN as its machines have it"

Function = Callable[..., Any]
Call = tuple[Any, ...]  # the function's arguments
WorkerPool = Callable[[Function, Sequence[Call]], Iterator[tuple[int, Any]]]  # (number of the task, its result)


def inline(function: Function, tasks: Sequence[Call]) -> Iterator[tuple[int, Any]]:
    """One after the other, here."""
    for i, task in enumerate(tasks):
        yield i, function(*task)


class Processes:
    """`workers` processes of this machine with one thread of torch each; they end when this one does.

    Use as a context manager: workers stay between calls, and keep what they have opened.
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
        numbers = {self._executor.submit(function, *task): i for i, task in enumerate(tasks)}
        try:
            for done in as_completed(numbers):
                yield numbers[done], done.result()
        except BrokenProcessPool:
            raise MmqError(
                "a worker of the study was killed, for instance for the memory it took",
                "give the same command again to go on, with fewer --workers",
            ) from None


@contextmanager
def local(workers: int) -> Iterator[WorkerPool]:
    """This machine: processes, or for one worker this process."""
    if workers < 2:
        yield inline
    else:
        with Processes(workers) as pool:
            yield pool


def _begin() -> None:
    """A worker leaves interrupts to its parent, and ends when that was killed."""
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
    """A Ray cluster; address None starts one on this machine. gpus: what a task asks for (shares are allowed).

    DataError when Ray is not installed or does not answer.
    """
    try:
        import ray
    except ImportError:
        raise DataError("--ray needs the package ray", f"{install_extra('ray')}; --workers N needs nothing") from None

    started = not ray.is_initialized()
    if started:
        try:
            ray.init(address=address, log_to_driver=False, include_dashboard=False)
        except (ConnectionError, RuntimeError, ValueError) as error:
            raise DataError(f"no Ray cluster at {address}: {error}", _START) from None

    def run(function: Function, tasks: Sequence[Call]) -> Iterator[tuple[int, Any]]:
        remote = ray.remote(num_cpus=1, num_gpus=gpus)(function)
        waiting = {remote.remote(*task): i for i, task in enumerate(tasks)}
        try:
            while waiting:
                ready, _ = ray.wait(list(waiting), num_returns=1)
                for one in ready:
                    yield waiting.pop(one), _result(ray, one)
        finally:
            for one in waiting:
                ray.cancel(one, force=True)

    try:
        yield run
    finally:
        if started:
            ray.shutdown()


def _result(ray: Any, reference: Any) -> Any:
    """A task's result; its own errors as they were raised there."""
    try:
        return ray.get(reference)
    except ray.exceptions.RayError as error:
        cause = getattr(error, "cause", None)
        if isinstance(cause, MmqError):
            raise cause from None
        said = str(error).strip().splitlines()[-1:] or [type(error).__name__]
        raise MmqError(
            f"a task of the study failed on the Ray cluster: {said[0]}",
            "every machine needs this version of mmq and the study's folder; give the same command again to go on",
        ) from error
