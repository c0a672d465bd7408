"""A stand-in for the package ray that records calls; tasks run at once in this process.

Whole commands run on it with pickled arguments and results, as on a cluster; `test_cluster.py` has the real package.
"""

import pickle
import sys
from collections.abc import Callable, Sequence
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest


class RayError(Exception):
    """Base of Ray's errors."""


class FakeTaskError(RayError):
    """A task raised `cause`."""

    def __init__(self, text: str = "", cause: BaseException | None = None) -> None:
        super().__init__(text)
        self.cause = cause


class FakeTask:
    """`ray.remote(...)(function)`; every call is recorded with its options."""

    def __init__(self, ray: "FakeRay", function: Callable[..., Any], options: dict[str, Any]) -> None:
        self._ray, self._function, self._options = ray, function, options

    def options(self, **options: Any) -> "FakeTask":
        return FakeTask(self._ray, self._function, self._options | options)

    def remote(self, *arguments: Any) -> int:
        self._ray.calls.append(self._options)
        function, sent = self._ray.sent((self._function, arguments))
        try:
            return self._ray.put(function(*sent))
        except Exception as error:  # noqa: BLE001 (`get` raises it)
            return self._ray.put(error if isinstance(error, RayError) else FakeTaskError(f"trace\n{error}", error))


class FakeRay(ModuleType):
    """The functions of ray that mmq calls. machines: those of the cluster. calls: the options of every task.

    pickled: whether tasks, arguments and values are pickled.
    """

    def __init__(self, pickled: bool = False) -> None:
        super().__init__("ray")
        self.pickled = pickled
        self.exceptions = SimpleNamespace(RayError=RayError)
        self.values: list[Any] = []
        self.calls: list[dict[str, Any]] = []
        self.cancelled: list[int] = []
        self.waits: list[int] = []
        self.machines = [{"NodeID": "a" * 40, "Alive": True}]
        self.resources: dict[str, float] = {"CPU": 2}
        self.address: str | None = ""  # of the running cluster
        self.unreachable: Exception | None = None

    def sent(self, value: Any) -> Any:
        """The value as another process has it."""
        return pickle.loads(pickle.dumps(value)) if self.pickled else value

    def put(self, value: Any) -> int:
        self.values.append(value if isinstance(value, RayError) else self.sent(value))
        return len(self.values) - 1

    def get(self, reference: int) -> Any:
        value = self.values[reference]
        if isinstance(value, RayError):
            raise value
        return self.sent(value)

    def wait(self, references: Sequence[int], num_returns: int, timeout: float | None = None) -> tuple[list[int], Any]:
        """The newest tasks end first."""
        assert references
        self.waits.append(num_returns)
        ready = sorted(references, reverse=True)[:num_returns]
        return ready, [reference for reference in references if reference not in ready]

    def cancel(self, reference: int, force: bool) -> None:
        assert force  # a task that computes does not end otherwise
        self.cancelled.append(reference)

    def remote(self, **options: Any) -> Callable[[Callable[..., Any]], FakeTask]:
        return lambda function: FakeTask(self, function, options)

    def nodes(self) -> list[dict[str, Any]]:
        return self.machines

    def cluster_resources(self) -> dict[str, float]:
        return self.resources

    def get_runtime_context(self) -> Any:
        return SimpleNamespace(get_node_id=lambda: self.machines[0]["NodeID"])

    def is_initialized(self) -> bool:
        return self.address != ""

    def init(self, address: str | None, log_to_driver: bool, include_dashboard: bool) -> None:
        assert not log_to_driver  # the workers' output would disturb the progress display
        assert not include_dashboard
        if self.unreachable:
            raise self.unreachable
        self.address = address

    def shutdown(self) -> None:
        self.address = ""


def install_ray(patch: pytest.MonkeyPatch, pickled: bool = False) -> FakeRay:
    """Let `import ray` find a stand-in."""
    fake = FakeRay(pickled)
    strategies = ModuleType("ray.util.scheduling_strategies")
    strategies.NodeAffinitySchedulingStrategy = lambda node, soft: (node, soft)  # type: ignore[attr-defined]
    modules = {"ray": fake, "ray.util": ModuleType("ray.util"), strategies.__name__: strategies}
    for name, module in modules.items():
        patch.setitem(sys.modules, name, module)
    return fake


@pytest.fixture
def ray(monkeypatch: pytest.MonkeyPatch) -> FakeRay:
    """The stand-in, without pickling."""
    return install_ray(monkeypatch)
