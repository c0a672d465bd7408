"""The tensors of one setting of a study, block by block: no more than one block of them is in memory."""

from collections.abc import Callable, Iterable, Sequence

from torch import Tensor

from exporter.planning.plan import Unit
from exporter.quantization.workdir import UnitResult


class Setting:
    """What units change in a model. read: the finished unit; called again whenever its block is needed."""

    def __init__(self, units: Sequence[Unit], read: Callable[[Unit], UnitResult]) -> None:
        self._read = read
        self._units: dict[str, list[Unit]] = {}
        for unit in units:
            self._units.setdefault(unit.block, []).append(unit)
        self._last: tuple[str, dict[str, Tensor]] = ("", {})

    @property
    def blocks(self) -> list[str]:
        """Checkpoint prefixes of the blocks that it changes."""
        return list(self._units)

    def changes(self, block: str) -> dict[str, Tensor]:
        """Checkpoint name -> the tensor that a runtime sees, for everything that changes in one of `blocks`."""
        if self._last[0] != block:
            self._last = ("", {})  # before the next one is read
            self._last = (block, changes(self._read(unit) for unit in self._units[block]))
        return self._last[1]

    def tensor(self, name: str) -> Tensor | None:
        """One tensor by its checkpoint name; None when it does not change."""
        block = name
        while block and block not in self._units:
            block = block.rpartition(".")[0]
        return self.changes(block).get(name) if block else None

    def forget(self) -> None:
        """Let the block go that was asked for last."""
        self._last = ("", {})


def changes(results: Iterable[UnitResult]) -> dict[str, Tensor]:
    """Checkpoint name -> the tensor that a runtime sees, for everything that units of one block change."""
    found: dict[str, Tensor] = {}
    for result in results:
        found |= {f"{module}.weight": linear.as_served() for module, linear in result.linears.items()}
        both = found.keys() & result.altered.keys()
        assert not both, f"two units change {sorted(both)}"
        found |= result.altered
    return found
