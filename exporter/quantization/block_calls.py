"""The arguments that a model's own forward pass gives to each block of a component.

Blocks are later run one at a time, each on the output of the one before. That equals the model's forward pass only
when the model passes hidden states from block to block untouched, and when the other arguments (masks, rotary
embeddings, windows) do not depend on them. Both are checked here with blocks that compute nothing and hand their
input on, so that no weights are needed; a model of another structure is refused.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from exporter.errors import CalibrationError
from exporter.inference.forward_hooks import ForwardStopped, replaced_forwards, run_until_stopped

Run = Callable[[Any, Mapping[str, Tensor]], Any]  # calls a model on one batch
FAILURES = (TypeError, ValueError, IndexError, KeyError, AttributeError, RuntimeError)  # of a forward pass
PLAIN = (bool, int, float, str, type(None), torch.dtype, torch.device)  # arguments without hidden state


@dataclass(frozen=True)
class BlockCall:
    """The arguments of one call of a block, without the hidden states.

    named: the hidden states were passed as `hidden_states=`, not as the first argument.
    """

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    named: bool

    def __call__(self, block: Callable[..., Any], hidden: Tensor) -> Any:
        """Call `block` with these arguments on other hidden states."""
        if self.named:
            return block(*self.args, **self.kwargs, hidden_states=hidden)
        return block(hidden, *self.args, **self.kwargs)


@dataclass(frozen=True)
class ChainInput:
    """What enters a chain of blocks for one batch: the hidden states of the first, and the arguments of each."""

    hidden: Tensor
    calls: tuple[BlockCall, ...]


class _NotAChain(Exception):
    """The model does something else between its blocks than passing the hidden states on."""


def capture_calls(
    model: nn.Module, blocks: Sequence[nn.Module], batches: Iterable[Mapping[str, Tensor]], run: Run, component: str
) -> Iterator[ChainInput]:
    """Run the model on each batch up to the last of `blocks`; yields what enters them.

    blocks: consecutive blocks from the first of the component on; they are not run and need no weights. Everything
    upstream of them runs. batches: on the model's device. run: calls the model on one batch.
    CalibrationError when running the blocks one after the other would not equal the model's forward pass, and when the
    pass fails.
    """
    tuples: bool | None = None
    for batch in batches:
        try:
            if tuples is None:
                tuples, entered = _first_pass(model, blocks, batch, run)
            else:
                entered = _one_pass(model, blocks, batch, run, tuples)
        except _NotAChain as error:
            raise CalibrationError(
                f"component '{component}' cannot be calibrated block by block: {error}",
                "use a method that needs no calibration data (rtn) for it, or another transformers version",
            ) from None
        except FAILURES as error:
            if isinstance(error, torch.OutOfMemoryError):
                raise
            reason = " ".join(str(error).split())
            raise CalibrationError(
                f"transformers' forward pass fails on calibration data, before component '{component}': "
                f"{type(error).__name__}: {reason}",
                "the model, its processor's files and the samples do not fit each other",
            ) from error
        yield entered


def _first_pass(
    model: nn.Module, blocks: Sequence[nn.Module], batch: Mapping[str, Tensor], run: Run
) -> tuple[bool, ChainInput]:
    """Whether blocks return tuples, and what enters them; checks that arguments do not depend on hidden states."""
    try:
        tuples, entered = False, _one_pass(model, blocks, batch, run, tuples=False)
    except (_NotAChain, *FAILURES) as first:
        try:
            tuples, entered = True, _one_pass(model, blocks, batch, run, tuples=True)
        except (_NotAChain, *FAILURES):
            raise first from None
    if len(blocks) > 1:
        other = _one_pass(model, blocks, batch, run, tuples, lambda hidden: hidden + 1)
        for i, (one, two) in enumerate(zip(entered.calls, other.calls, strict=True)):
            if not _same((one.args, one.kwargs), (two.args, two.kwargs)):
                raise _NotAChain(f"arguments of block {i} depend on the output of the blocks before it")
    return tuples, entered


def _one_pass(
    model: nn.Module,
    blocks: Sequence[nn.Module],
    batch: Mapping[str, Tensor],
    run: Run,
    tuples: bool,
    change: Callable[[Tensor], Tensor] = lambda hidden: hidden,
) -> ChainInput:
    """One forward pass in which block 0 returns `change(input)` and every other block its input."""
    recorder = _Recorder(len(blocks), tuples, change)
    with replaced_forwards([(block, recorder.stand_in(i)) for i, block in enumerate(blocks)]):
        run_until_stopped(run, model, batch)
    return recorder.result()


class _Recorder:
    """Records the calls of `count` blocks during one pass and checks that they form a chain."""

    def __init__(self, count: int, tuples: bool, change: Callable[[Tensor], Tensor]) -> None:
        self._count, self._tuples, self._change = count, tuples, change
        self._calls: list[BlockCall] = []
        self._versions: list[tuple[Tensor, int]] = []  # tensors seen so far and how often each was written to
        self._entered: Tensor | None = None
        self._handed: Tensor | None = None

    def stand_in(self, index: int) -> Callable[..., Any]:
        """What is called instead of block `index`."""

        def forward(*args: Any, **kwargs: Any) -> Any:
            return self._record(index, args, kwargs)

        return forward

    def _record(self, index: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        hidden, call = _split(args, kwargs)
        if index != len(self._calls):
            raise _NotAChain(f"the model runs block {index} where block {len(self._calls)} is expected")
        if index and hidden is not self._handed:
            raise _NotAChain(f"the input of block {index} is not the output of block {index - 1}")
        self._calls.append(call)
        tensors = list(_tensors((call.args, call.kwargs)))
        if index == 0:
            self._entered, self._handed = hidden, self._change(hidden)
            tensors.append(self._handed)
        self._versions += [(tensor, tensor._version) for tensor in tensors]
        if index + 1 == self._count:
            raise ForwardStopped
        return (self._handed,) if self._tuples else self._handed

    def result(self) -> ChainInput:
        """What was recorded; `_NotAChain` when the pass ended early or wrote into what blocks share."""
        if len(self._calls) < self._count or self._entered is None:
            raise _NotAChain(f"the model's forward pass ran {len(self._calls)} of its {self._count} blocks")
        if any(tensor._version != version for tensor, version in self._versions):
            raise _NotAChain("the model writes into the arguments of its blocks between them")
        return ChainInput(self._entered, tuple(self._calls))


def _split(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Tensor, BlockCall]:
    """The hidden states and the other arguments of a block's call."""
    if args:
        hidden, call = args[0], BlockCall(args[1:], kwargs, named=False)
    else:
        rest = {name: value for name, value in kwargs.items() if name != "hidden_states"}
        hidden, call = kwargs.get("hidden_states"), BlockCall((), rest, named=True)
    if not isinstance(hidden, Tensor):
        raise _NotAChain("a block is called without hidden states")
    for value in _leaves((call.args, call.kwargs)):
        if not isinstance(value, (Tensor, *PLAIN)):
            raise _NotAChain(f"a block receives a {type(value).__name__}, which may change while the block runs")
    return hidden, call


def _leaves(value: Any) -> Iterator[Any]:
    """Everything inside nested tuples, lists and dicts."""
    if isinstance(value, tuple | list):
        yield from chain.from_iterable(map(_leaves, value))
    elif isinstance(value, dict):
        yield from chain.from_iterable(map(_leaves, value.values()))
    else:
        yield value


def _tensors(value: Any) -> Iterator[Tensor]:
    return (leaf for leaf in _leaves(value) if isinstance(leaf, Tensor))


def _same(one: Any, two: Any) -> bool:
    """Whether two sets of arguments have equal values in equal places."""
    if isinstance(one, Tensor):
        return isinstance(two, Tensor) and torch.equal(one.nan_to_num(), two.nan_to_num())
    if isinstance(one, tuple | list):
        return type(one) is type(two) and len(one) == len(two) and all(map(_same, one, two))
    if isinstance(one, dict):
        return isinstance(two, dict) and one.keys() == two.keys() and all(_same(one[key], two[key]) for key in one)
    return bool(one == two)
