"""A connection to a Ray cluster, and tasks on it (Ray is an extra)."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from exporter.distribution import install_extra
from exporter.errors import DataError, MmqError
from exporter.out_of_memory import keeping_shortage

_HINT = "`ray start --head` starts a cluster; if it requires a token, set RAY_AUTH_TOKEN to the cluster's token"

Function = Callable[..., Any]
Call = tuple[Any, ...]  # the function's arguments


class RayCluster:
    """Tasks of one job on a cluster. gpus: GPUs per task (fractions are allowed)."""

    def __init__(self, ray: Any, gpus: float) -> None:
        self._ray = ray
        self._gpus = gpus

    def put(self, value: Any) -> Any:
        """A reference to a value in the object store."""
        return self._ray.put(value)

    @property
    def slots(self) -> int:
        """The number of tasks that the cluster's machines can run at once; at least 1."""
        resources = self._ray.cluster_resources()
        count = resources.get("GPU", 0) / self._gpus if self._gpus else resources.get("CPU", 1)
        return max(1, int(count))

    def results(self, function: Function, calls: Sequence[Call]) -> Iterator[tuple[int, Any]]:
        """Run the calls on all machines; yields (number of the call, result) in the order of completion.

        Raises a task's own MmqError or MemoryError, and MmqError for a failure of Ray. Open tasks are then cancelled.
        """
        remote = self._ray.remote(num_cpus=1, num_gpus=self._gpus)(keeping_shortage)
        pending = {remote.remote(function, *call): i for i, call in enumerate(calls)}
        try:
            while pending:
                ready, _ = self._ray.wait(list(pending), num_returns=1)
                for reference in ready:
                    yield pending.pop(reference), self._result(reference)
        finally:
            for reference in pending:
                self._ray.cancel(reference, force=True)

    def on_every_machine(self, function: Function, *arguments: Any) -> None:
        """Run a function once on every machine; machines that do not answer within a minute are left out."""
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        nodes = [node["NodeID"] for node in self._ray.nodes() if node["Alive"]]
        pinned = [NodeAffinitySchedulingStrategy(node, soft=False) for node in nodes]
        remote = self._ray.remote(num_cpus=0)(function)
        calls = [remote.options(scheduling_strategy=strategy).remote(*arguments) for strategy in pinned]
        self._ray.wait(calls, num_returns=len(calls), timeout=60) if calls else None

    def _result(self, reference: Any) -> Any:
        try:
            return self._ray.get(reference)
        except self._ray.exceptions.RayError as error:
            cause = getattr(error, "cause", None)
            if isinstance(cause, MmqError | MemoryError):
                raise cause from None
            lines = str(error).strip().splitlines()[-1:] or [type(error).__name__]
            raise MmqError(
                f"a task failed on the Ray cluster: {lines[0]}",
                "every machine needs this version of mmq; run the same command again to resume",
            ) from error


@contextmanager
def ray_cluster(address: str | None, gpus: float = 0) -> Iterator[RayCluster]:
    """A cluster. address: None starts one on this machine.

    Raises DataError if Ray is not installed or no cluster answers at `address`.
    """
    try:
        import ray
    except ImportError:
        raise DataError("--ray needs the package ray", f"{install_extra('ray')}, or leave out --ray") from None
    started = not ray.is_initialized()
    if started:
        try:
            ray.init(address=address, log_to_driver=False, include_dashboard=False)
        except (ConnectionError, RuntimeError, ValueError) as error:
            raise DataError(f"no Ray cluster at {address}: {error}", _HINT) from None
    try:
        yield RayCluster(ray, gpus)
    finally:
        if started:
            ray.shutdown()
