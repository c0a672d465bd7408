"""A batch size that is halved whenever memory runs out, and stays at the smaller size."""

from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

from exporter.device import empty_caches
from exporter.out_of_memory import is_shortage

PAIRS = 8  # the batch of pairs of picture and text relative to that of pictures; pairs skip the ViT
T = TypeVar("T")
R = TypeVar("R")


class BatchSize:
    """A batch size that only shrinks.

    now: the current size. on_smaller: called with the size that did not fit and the next size.
    """

    def __init__(self, size: int, on_smaller: Callable[[int, int], None] = lambda large, small: None) -> None:
        self.now = size
        self._on_smaller = on_smaller

    def each(self, items: Sequence[T], work: Callable[[Sequence[T]], R], times: int = 1) -> Iterator[R]:
        """Yield the results of `work` on consecutive batches of the items, each at most `times` the current size.

        When a batch runs out of memory, the size is halved and the batch is repeated; at size 1 the error is raised.
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
        except Exception as error:
            if self.now == 1 or not is_shortage(error):
                raise
        return False, None  # outside of the handler, because the error's frames hold references to the tensors

    def _shrink(self) -> None:
        empty_caches()
        self._on_smaller(self.now, self.now // 2)
        self.now //= 2
