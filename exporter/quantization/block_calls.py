"""Records the arguments that a model's forward pass gives to each block of a component.

Calibration later runs the blocks one at a time, each on the output of the previous block. That equals the model's
forward pass only if the model passes hidden states between blocks unchanged, or adds a tensor that does not depend on
them (DeepStack adds features of the picture), and if the other arguments (masks, rotary embeddings, windows) do not
depend on them either. This module checks these conditions with stub blocks, so it needs no block weights.
CalibrationError when a model does not fulfil them.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from exporter.errors import CalibrationError
from exporter.model.inference.forward_hooks import ForwardStopped, replaced_forwards, run_until_stopped
from exporter.out_of_memory import is_shortage

Run = Callable[[Any, Mapping[str, Tensor]], Any]  # calls a model on one batch
FAILURES = (TypeError, ValueError, IndexError, KeyError, AttributeError, RuntimeError)  # of a forward pass
PLAIN = (bool, int, float, str, type(None), torch.dtype, torch.device)  # immutable argument types


@dataclass(frozen=True)
class BlockCall:
    """The arguments of one call of a block, without the hidden states.

    named: whether the hidden states were passed as `hidden_states=` instead of as the first argument.
    added: what the model adds to the previous block's output before this call, of the same shape; None: nothing.
    """

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    named: bool
    added: Tensor | None = None

    def __call__(self, block: Callable[..., Any], hidden: Tensor) -> Any:
        """Call `block` with these arguments and the given hidden states."""
        if self.named:
            return block(*self.args, **self.kwargs, hidden_states=hidden)
        return block(hidden, *self.args, **self.kwargs)

    def to(self, device: torch.device, moved: dict[int, Tensor]) -> "BlockCall":
        """The same call with its tensors on `device`, except `added`.

        moved: tensors that are already there, by `id` of the original; several calls of a batch share tensors.
        """

        def move(value: Any) -> Any:
            if isinstance(value, Tensor):
                return moved.setdefault(id(value), value.to(device))
            return device if isinstance(value, torch.device) else value

        return replace(self, args=_mapped(self.args, move), kwargs=_mapped(self.kwargs, move))


@dataclass(frozen=True)
class ChainInput:
    """Input of consecutive blocks for one batch: hidden states of the first block, other arguments of each block."""

    hidden: Tensor
    calls: tuple[BlockCall, ...]


class _NotAChain(Exception):
    """The model does more between its blocks than pass the hidden states from one to the next."""


class _Between(_NotAChain):
    """The model changes the hidden states between its blocks."""


def capture_calls(
    model: nn.Module, blocks: Sequence[nn.Module], batches: Iterable[Mapping[str, Tensor]], run: Run, component: str
) -> Iterator[ChainInput]:
    """Run the model on each batch up to the last of `blocks`, and yield the input of these blocks.

    blocks: consecutive blocks, starting with the component's first; they are replaced by stubs and need no weights.
    The model runs everything before them. batches: on the model's device. run: calls the model on one batch.
    CalibrationError when running the blocks one after the other would not equal the model's forward pass, and when the
    forward pass fails.
    """
    tuples, adds = None, False
    for batch in batches:
        try:
            if tuples is None:
                tuples, adds, entered = _first_pass(model, blocks, batch, run)
            else:
                entered = _one_pass(model, blocks, batch, run, tuples, adds=adds)
        except _NotAChain as error:
            raise CalibrationError(
                f"component '{component}' cannot be calibrated block by block: {error}",
                "use a method without calibration data (rtn) for this component, or another transformers version",
            ) from None
        except FAILURES as error:
            if is_shortage(error):
                raise
            reason = " ".join(str(error).split())
            raise CalibrationError(
                f"transformers' forward pass fails on calibration data, before component '{component}': "
                f"{type(error).__name__}: {reason}",
                "check that the model, the processor's files and the samples belong together",
            ) from error
        yield entered


def _first_pass(
    model: nn.Module, blocks: Sequence[nn.Module], batch: Mapping[str, Tensor], run: Run
) -> tuple[bool, bool, ChainInput]:
    """Whether the model expects tuples from its blocks, whether it adds to their outputs, and the input for this batch.

    Runs a second pass with other hidden states to check that nothing else depends on them.
    """
    adds = False
    try:
        tuples, entered = False, _one_pass(model, blocks, batch, run, tuples=False)
    except (_NotAChain, *FAILURES) as first:
        try:
            tuples, adds, entered = _second_try(model, blocks, batch, run, first)
        except (_NotAChain, *FAILURES):
            raise first from None
    if len(blocks) > 1:
        expected = [call.added for call in entered.calls] if adds else None
        other = _one_pass(model, blocks, batch, run, tuples, change=lambda hidden: hidden + 1, expected=expected)
        for i, (call, changed) in enumerate(zip(entered.calls, other.calls, strict=True)):
            if not _equal((call.args, call.kwargs), (changed.args, changed.kwargs)):
                raise _NotAChain(f"arguments of block {i} depend on the outputs of earlier blocks")
    return tuples, adds, entered


def _second_try(
    model: nn.Module, blocks: Sequence[nn.Module], batch: Mapping[str, Tensor], run: Run, first: Exception
) -> tuple[bool, bool, ChainInput]:
    """`_first_pass` for a model that failed with `first`: one that expects tuples, or adds to its blocks' outputs."""
    tuples = False
    if not isinstance(first, _Between):
        try:
            return True, False, _one_pass(model, blocks, batch, run, tuples=True)
        except _Between:
            tuples = True
    return tuples, True, _one_pass(model, blocks, batch, run, tuples, adds=True)


def _one_pass(
    model: nn.Module,
    blocks: Sequence[nn.Module],
    batch: Mapping[str, Tensor],
    run: Run,
    tuples: bool,
    change: Callable[[Tensor], Tensor] = lambda hidden: hidden,
    adds: bool = False,
    expected: Sequence[Tensor | None] | None = None,
) -> ChainInput:
    """One forward pass with stubs: block 0 returns `change(input)`, every other block returns its input.

    adds: every block returns zeros instead, so that the next block's input is what the model added to them. expected:
    this was added; every block returns other values, and `_NotAChain` is raised when their sum is not the next input.
    """
    recorder = _Recorder(len(blocks), tuples, change, adds, expected)
    with replaced_forwards([(block, recorder.stub(i)) for i, block in enumerate(blocks)]):
        run_until_stopped(run, model, batch)
    return recorder.result()


class _Recorder:
    """Records the calls of `count` blocks during one pass, and checks that each block reads the previous one's output.

    tuples: whether a stub returns its output in a tuple. change, adds, expected: see `_one_pass`.
    """

    def __init__(
        self,
        count: int,
        tuples: bool,
        change: Callable[[Tensor], Tensor],
        adds: bool,
        expected: Sequence[Tensor | None] | None,
    ) -> None:
        self._count, self._tuples, self._change = count, tuples, change
        self._adds, self._expected = adds, expected
        self._calls: list[BlockCall] = []
        self._versions: list[tuple[Tensor, int]] = []  # argument tensors and their in-place version counters
        self._first_input: Tensor | None = None
        self._output: Tensor | None = None  # of the last stub

    def stub(self, index: int) -> Callable[..., Any]:
        """The forward function that replaces that of block `index`."""

        def forward(*args: Any, **kwargs: Any) -> Any:
            return self._record(index, args, kwargs)

        return forward

    def _record(self, index: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        hidden, call = _split(args, kwargs)
        if index != len(self._calls):
            raise _NotAChain(f"the model runs block {index} where block {len(self._calls)} is expected")
        if index:
            call = replace(call, added=self._added(index, hidden))
        else:
            self._first_input = hidden
        self._calls.append(call)
        tensors = list(_tensors((call.args, call.kwargs)))
        if index == 0 or self._adds or self._expected:
            self._output = self._stub_output(index, hidden)
            tensors.append(self._output)
        self._versions += [(tensor, tensor._version) for tensor in tensors]
        if index + 1 == self._count:
            raise ForwardStopped
        return (self._output,) if self._tuples else self._output

    def _stub_output(self, index: int, hidden: Tensor) -> Tensor:
        if self._adds:
            return torch.zeros_like(hidden)
        if self._expected:
            return torch.sin(torch.arange(hidden.numel(), device=hidden.device) + index).to(hidden).view(hidden.shape)
        return self._change(hidden)

    def _added(self, index: int, hidden: Tensor) -> Tensor | None:
        """What the model added to the last output; None for nothing."""
        last = self._output
        if hidden is last:
            return None
        assert last is not None
        if self._adds and hidden.shape == last.shape and hidden.dtype == last.dtype:
            return hidden
        added = self._expected[index] if self._expected else None
        if added is None:
            raise _Between(f"the input of block {index} is not the output of block {index - 1}")
        if not torch.equal(last + added, hidden):
            raise _NotAChain(f"the model computes the input of block {index} from the output of block {index - 1}")
        return added

    def result(self) -> ChainInput:
        """The recorded input; `_NotAChain` when the pass ended early or modified a recorded tensor in place."""
        if len(self._calls) < self._count or self._first_input is None:
            raise _NotAChain(f"the model's forward pass ran {len(self._calls)} of its {self._count} blocks")
        if any(tensor._version != version for tensor, version in self._versions):
            raise _NotAChain("the model modifies block arguments in place between its blocks")
        return ChainInput(self._first_input, tuple(self._calls))


def _split(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Tensor, BlockCall]:
    """The hidden states and the other arguments of a block's call; `_NotAChain` for mutable arguments."""
    if args:
        hidden, call = args[0], BlockCall(args[1:], kwargs, named=False)
    else:
        others = {name: value for name, value in kwargs.items() if name != "hidden_states"}
        hidden, call = kwargs.get("hidden_states"), BlockCall((), others, named=True)
    if not isinstance(hidden, Tensor):
        raise _NotAChain("a block is called without hidden states")
    for value in _leaves((call.args, call.kwargs)):
        if not isinstance(value, (Tensor, *PLAIN)):
            raise _NotAChain(f"a block receives a {type(value).__name__}, which the block may modify")
    return hidden, call


def _leaves(value: Any) -> Iterator[Any]:
    """All values inside nested tuples, lists and dicts."""
    if isinstance(value, tuple | list):
        yield from chain.from_iterable(map(_leaves, value))
    elif isinstance(value, dict):
        yield from chain.from_iterable(map(_leaves, value.values()))
    else:
        yield value


def _mapped(value: Any, change: Callable[[Any], Any]) -> Any:
    """Nested tuples, lists and dicts with every value inside replaced by `change` of it."""
    if isinstance(value, tuple | list):
        parts = [_mapped(part, change) for part in value]
        return type(value)(*parts) if hasattr(value, "_fields") else type(value)(parts)
    if isinstance(value, dict):
        return {key: _mapped(part, change) for key, part in value.items()}
    return change(value)


def _tensors(value: Any) -> Iterator[Tensor]:
    return (leaf for leaf in _leaves(value) if isinstance(leaf, Tensor))


def _equal(a: Any, b: Any) -> bool:
    """Whether two nested argument structures are equal; NaN equals NaN."""
    if isinstance(a, Tensor):
        return isinstance(b, Tensor) and torch.equal(a.nan_to_num(), b.nan_to_num())
    if isinstance(a, tuple | list):
        return type(a) is type(b) and len(a) == len(b) and all(map(_equal, a, b))
    if isinstance(a, dict):
        return isinstance(b, dict) and a.keys() == b.keys() and all(_equal(a[key], b[key]) for key in a)
    return bool(a == b)
