"""A stand-in for the package ray: one process, but arguments, results and stored values are pickled, as on a cluster.

Tasks complete in the reverse of their order. `tests/test_cluster.py` also runs with a real Ray, where it is installed.
"""

import pickle
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest


@dataclass(frozen=True)
class Reference:
    number: int


class RayError(Exception):
    """Failure of a task. cause: the task's own error."""

    def __init__(self, cause: BaseException) -> None:
        super().__init__(str(cause))
        self.cause = cause


class RemoteFunction:
    def __init__(self, ray: "StandIn", function: Callable[..., Any]) -> None:
        self._ray, self._function = ray, function

    def options(self, **_: Any) -> "RemoteFunction":
        return self

    def remote(self, *arguments: Any) -> Reference:
        function, sent = pickle.loads(pickle.dumps((self._function, arguments)))
        self._ray.calls += 1
        try:
            return self._ray.put(function(*sent))
        except Exception as error:  # noqa: BLE001 - Ray too returns every error of a task
            return self._ray.put(RayError(error))


class StandIn(ModuleType):
    """The members of ray that mmq uses."""

    def __init__(self) -> None:
        super().__init__("ray")
        self.values: list[bytes] = []
        self.calls = 0
        self._running = False
        self.exceptions = SimpleNamespace(RayError=RayError)

    def init(self, address: str | None, **_: Any) -> None:
        if address == "nowhere:1":
            raise ConnectionError("no route")
        self._running = True

    def is_initialized(self) -> bool:
        return self._running

    def shutdown(self) -> None:
        self._running = False

    def put(self, value: Any) -> Reference:
        self.values.append(pickle.dumps(value))
        return Reference(len(self.values) - 1)

    def get(self, reference: Reference) -> Any:
        value = pickle.loads(self.values[reference.number])
        if isinstance(value, RayError):
            raise value
        return value

    def remote(self, **_: Any) -> Callable[[Callable[..., Any]], RemoteFunction]:
        return lambda function: RemoteFunction(self, function)

    def wait(self, references: Sequence[Reference], num_returns: int, timeout: float | None = None) -> Any:
        return references[-num_returns:], references[:-num_returns]

    def cancel(self, reference: Reference, force: bool) -> None:
        pass

    def cluster_resources(self) -> dict[str, float]:
        return {"CPU": 2.0}

    def get_runtime_context(self) -> Any:
        return SimpleNamespace(get_node_id=lambda: f"stand-in-{id(self)}")

    def nodes(self) -> list[dict[str, Any]]:
        return [{"NodeID": "here", "Alive": True}, {"NodeID": "gone", "Alive": False}]


def install_ray(patch: pytest.MonkeyPatch) -> StandIn:
    """Let `import ray` give a stand-in."""
    ray, strategies = StandIn(), ModuleType("ray.util.scheduling_strategies")
    patch.setitem(sys.modules, "ray", ray)
    patch.setitem(sys.modules, "ray.util", ModuleType("ray.util"))
    patch.setitem(sys.modules, "ray.util.scheduling_strategies", strategies)
    strategies.NodeAffinitySchedulingStrategy = lambda node, soft: node  # type: ignore[attr-defined]
    return ray
