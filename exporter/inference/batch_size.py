"""How many samples go through a model at once: fewer, for good, whenever memory runs out."""

from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

from exporter.device import empty_caches
from exporter.out_of_memory import is_shortage

T = TypeVar("T")
R = TypeVar("R")


class BatchSize:
    """The size `now`; it only shrinks. on_smaller: called with the size that did not fit and the next one."""

    def __init__(self, size: int, on_smaller: Callable[[int, int], None] = lambda large, small: None) -> None:
        self.now = size
        self._on_smaller = on_smaller

    def each(self, items: Sequence[T], work: Callable[[Sequence[T]], R], times: int = 1) -> Iterator[R]:
        """`work` on the items in order, at most `times` the size at once.

        A batch that runs out of memory is halved; one of a single item raises what it ran into.
        """
        start = 0
        while start < len(items):
            batch = items[start : start + self.now * times]
            fits, result = self._try(batch, work)
            if not fits:
                self._shrink()
                continue
            start += len(batch)
            yield result  # type: ignore[misc]  # a batch that fits has a result

    def _try(self, batch: Sequence[T], work: Callable[[Sequence[T]], R]) -> tuple[bool, R | None]:
        try:
            return True, work(batch)
        except (RuntimeError, MemoryError, OSError) as error:
            if self.now == 1 or not is_shortage(error):
                raise
        return False, None  # outside of the handler: the error's frames hold what took the memory

    def _shrink(self) -> None:
        empty_caches()
        self._on_smaller(self.now, self.now // 2)
        self.now //= 2
