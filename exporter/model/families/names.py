"""`Names`: how the tensors of a family are called in checkpoints, in transformers' live model, and inside vLLM."""

from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True)
class Names:
    """Prefixes of module names, without the final dot.

    rows: the prefix in checkpoints of the hub, in the live model, and inside vLLM; names without a row are the same in
    all three. also: prefixes that other programs saved -> the prefix of the hub.
    """

    rows: tuple[tuple[str, str, str], ...] = ()
    also: tuple[tuple[str, str], ...] = ()

    def canonical(self, name: str) -> str:
        """The hub's name of a tensor that may have been saved under another name, for example the live one."""
        hub = [(stored, stored) for stored, _, _ in self.rows]
        return _renamed(name, [*self.also, *((live, stored) for stored, live, _ in self.rows), *hub])

    def live(self, name: str) -> str:
        """Name of a checkpoint's tensor or module in the transformers class."""
        return _renamed(name, ((stored, live) for stored, live, _ in self.rows))

    def runtime(self, name: str) -> str:
        """Name of a checkpoint's tensor or module inside vLLM."""
        return _renamed(name, ((stored, runtime) for stored, _, runtime in self.rows))


def _renamed(name: str, pairs: Iterable[tuple[str, str]]) -> str:
    """The name with its longest matching prefix replaced; of equal prefixes the last one counts."""
    matching = [pair for pair in pairs if f"{name}.".startswith(f"{pair[0]}.")]
    if not matching:
        return name
    old, new = max(reversed(matching), key=lambda pair: len(pair[0]))
    return new + name.removeprefix(old)
