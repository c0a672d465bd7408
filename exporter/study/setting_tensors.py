"""The changed tensors of a setting, read block by block with at most one block in memory."""

from collections.abc import Callable, Iterable, Sequence

from torch import Tensor

from exporter.planning.plan import Unit
from exporter.quantization.workdir import UnitResult


class SettingTensors:
    """The tensors that the units of a `Setting` replace. read: reads a finished unit, each time its block is needed."""

    def __init__(self, units: Sequence[Unit], read: Callable[[Unit], UnitResult]) -> None:
        self._read = read
        self._units: dict[str, list[Unit]] = {}
        for unit in units:
            self._units.setdefault(unit.block, []).append(unit)
        self._last: tuple[str, dict[str, Tensor]] = ("", {})

    @property
    def blocks(self) -> list[str]:
        """Checkpoint prefixes of the changed blocks."""
        return list(self._units)

    def changes(self, block: str) -> dict[str, Tensor]:
        """Checkpoint name -> dequantized tensor, for all changed tensors of `block`, one of `blocks`."""
        if self._last[0] != block:
            self._last = ("", {})  # free the memory of the last block before reading the next
            self._last = (block, changes(self._read(unit) for unit in self._units[block]))
        return self._last[1]

    def tensor(self, name: str) -> Tensor | None:
        """A changed tensor by its checkpoint name; None for an unchanged one."""
        block = name
        while block and block not in self._units:
            block = block.rpartition(".")[0]
        return self.changes(block).get(name) if block else None

    def forget(self) -> None:
        """Free the memory of the last block."""
        self._last = ("", {})


def changes(results: Iterable[UnitResult]) -> dict[str, Tensor]:
    """Checkpoint name -> dequantized tensor, for all tensors that units of one block change."""
    tensors: dict[str, Tensor] = {}
    for result in results:
        tensors |= {f"{module}.weight": linear.as_served() for module, linear in result.linears.items()}
        duplicates = tensors.keys() & result.altered.keys()
        assert not duplicates, f"two units change {sorted(duplicates)}"
        tensors |= result.altered
    return tensors
