"""Runs forward passes that are observed, stopped early, or run with replaced modules."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn


class ForwardStopped(Exception):
    """Raised inside a forward pass to end it early; `run_until_stopped` catches it."""


@torch.no_grad()
def run_until_stopped(module: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Call `module`; None when a hook ended the pass early."""
    try:
        return module(*args, **kwargs)
    except ForwardStopped:
        return None


@contextmanager
def watch_inputs(linears: Mapping[str, nn.Module], see: Callable[[str, Tensor], None], stop: bool) -> Iterator[None]:
    """Call `see(name, x)` with the input of each linear; with `stop`, the pass ends once all of them have run."""
    pending: set[str] = set()  # linears that have not run in this pass

    def hook(name: str) -> Callable[..., None]:
        def watch(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            see(name, args[0] if args else kwargs["input"])
            pending.discard(name)
            if stop and not pending:
                pending.update(linears)
                raise ForwardStopped

        return watch

    pending.update(linears)
    handles = [module.register_forward_pre_hook(hook(name), with_kwargs=True) for name, module in linears.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def replaced_forwards(replacements: Sequence[tuple[nn.Module, Callable[..., Any]]]) -> Iterator[None]:
    """Replace the `forward` functions of modules inside the context; hooks of the modules still run."""
    for module, function in replacements:
        module.forward = function
    try:
        yield
    finally:
        for module, _ in replacements:
            del module.forward  # deletes the instance attribute, so that the class's method applies again


def first_output(output: Any) -> Any:
    """The hidden states in a block's output; some blocks return a tuple."""
    return output[0] if isinstance(output, tuple) else output
