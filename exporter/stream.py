"""A transformers model that is never whole in memory: parameters come and go by checkpoint name.

The skeleton has its parameters on the meta device and its buffers real. `Stream` puts tensors into it, takes
them out again, and catches what the first block of a component receives.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from exporter.errors import CheckpointError
from exporter.families import Family
from exporter.families.family import Config, run_whole

Read = Callable[[str], Tensor]  # checkpoint name -> tensor on any device, quantized parts dequantized


class _Reached(Exception):
    """Raised by a hook to stop a forward pass once what it came for has been seen."""


class Stream:
    """A model skeleton on `device` whose floating parameters are held in `dtype` while they are loaded."""

    def __init__(self, family: Family, config: Config, device: torch.device, dtype: torch.dtype) -> None:
        self.family = family
        self.device = device
        self.dtype = dtype
        self.model: nn.Module = build_skeleton(family, config, device)

    def load(self, names: Iterable[str], read: Read) -> None:
        """Put tensors into the skeleton, by checkpoint name."""
        for name in names:
            self.put(name, read(name))

    def load_all(self, names: Iterable[str], read: Read) -> Any:
        """The complete model, every parameter read (CheckpointError when some are missing)."""
        self.load(names, read)
        model: Any = self.model
        model.tie_weights()
        empty = [name for name, parameter in model.named_parameters() if parameter.is_meta]
        if empty:
            raise CheckpointError(f"the checkpoint lacks {empty[0]} ({len(empty)} parameters missing)")
        return model

    def put(self, name: str, tensor: Tensor) -> None:
        """Put one tensor into the skeleton (CheckpointError when its shape is not what the config asks for)."""
        module, attribute = self._place(name)
        expected = getattr(module, attribute).shape
        if tensor.shape != expected:
            shapes = f"{list(tensor.shape)}, its config.json asks for {list(expected)}"
            raise CheckpointError(f"{name} has the shape {shapes}")
        wide = name.startswith(self.family.float32)
        self._set(module, attribute, tensor.to(self.device, torch.float32 if wide else self.dtype))

    def unload(self, names: Iterable[str]) -> None:
        """Free the memory of tensors, by checkpoint name."""
        for name in names:
            module, attribute = self._place(name)
            self._set(module, attribute, getattr(module, attribute).to("meta"))

    def module(self, name: str) -> nn.Module:
        """The live module of a checkpoint name without `.weight`."""
        return self.model.get_submodule(self.family.live_name(name))

    def parameter(self, name: str) -> Tensor:
        """A loaded tensor, by checkpoint name."""
        module, attribute = self._place(name)
        tensor: Tensor = getattr(module, attribute)
        return tensor.detach()

    def _place(self, name: str) -> tuple[nn.Module, str]:
        path, _, attribute = self.family.live_name(name).rpartition(".")
        try:
            module = self.model.get_submodule(path)
            getattr(module, attribute)
        except AttributeError:
            raise CheckpointError(f"{name} has no place in {type(self.model).__name__}") from None
        return module, attribute

    @staticmethod
    def _set(module: nn.Module, attribute: str, tensor: Tensor) -> None:
        if isinstance(getattr(module, attribute), nn.Parameter):
            setattr(module, attribute, nn.Parameter(tensor, requires_grad=False))
        else:
            setattr(module, attribute, tensor)

    @torch.no_grad()
    def capture(
        self,
        block: nn.Module,
        batches: Iterable[Mapping[str, Tensor]],
        run: Callable[[Any, Mapping[str, Tensor]], Any] = run_whole,
    ) -> Iterator[tuple[tuple[Any, ...], dict[str, Any]]]:
        """Run the model on each batch up to `block`; yields the (args, kwargs) that the block receives.

        run: calls the model on one batch.
        """
        seen: list[tuple[tuple[Any, ...], dict[str, Any]]] = []

        def catch(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            seen.append((args, kwargs))
            raise _Reached

        with _hooked((block, catch)):
            for batch in batches:
                inputs = {name: self._input(tensor) for name, tensor in batch.items()}
                run_until_reached(run, self.model, inputs)
                yield seen.pop()

    def _input(self, tensor: Tensor) -> Tensor:
        return tensor.to(self.device, self.dtype if tensor.is_floating_point() else None)


def build_skeleton(family: Family, config: Config, device: torch.device) -> nn.Module:
    """The model with meta parameters and real buffers (rotary frequencies, position ids), in evaluation mode.

    Non-persistent buffers are in no checkpoint, so the initializer of the model that owns them makes them.
    """
    with torch.device("meta"):
        model: nn.Module = family.skeleton(config)
    _fill_buffers(model, model, device)
    return model.eval()


@torch.no_grad()
def _fill_buffers(module: nn.Module, owner: Any, device: torch.device) -> None:
    """owner: the nearest enclosing transformers model; only its own `_init_weights` knows the module."""
    if hasattr(module, "_init_weights"):
        owner = module
    names = [name for name, _ in module.named_buffers(recurse=False)]
    for name in names:
        setattr(module, name, torch.empty_like(getattr(module, name), device=device))
    if names:
        owner._init_weights(module)  # writes the buffers; does nothing to meta parameters
    for child in module.children():
        _fill_buffers(child, owner, device)


@torch.no_grad()
def run_until_reached(module: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Call `module`; None when a hook stopped it on the way."""
    try:
        return module(*args, **kwargs)
    except _Reached:
        return None


@contextmanager
def _hooked(*pairs: tuple[nn.Module, Callable[..., None]]) -> Iterator[None]:
    handles = [module.register_forward_pre_hook(hook, with_kwargs=True) for module, hook in pairs]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def watch_inputs(linears: Mapping[str, nn.Module], see: Callable[[str, Tensor], None], stop: bool) -> Iterator[None]:
    """Call `see(name, x)` with the input of each linear; with `stop`, the pass ends after the last of them."""
    waiting: set[str] = set()

    def hook(name: str) -> Callable[..., None]:
        def watch(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            see(name, args[0] if args else kwargs["input"])
            waiting.discard(name)
            if stop and not waiting:
                waiting.update(linears)
                raise _Reached

        return watch

    waiting.update(linears)
    with _hooked(*((module, hook(name)) for name, module in linears.items())):
        yield


def load_whole(
    family: Family, config: Config, names: Iterable[str], read: Read, device: torch.device, dtype: torch.dtype
) -> Any:
    """A complete model on `device`, every parameter read through `read` (quantized ones dequantized)."""
    return Stream(family, config, device, dtype).load_all(names, read)
