"""A transformers model that is never whole in memory: parameters come and go by checkpoint name.

The skeleton has its parameters on the meta device and its buffers real. `Stream` puts tensors into it and takes
them out again.
"""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from exporter.errors import CheckpointError
from exporter.model.families import Family
from exporter.model.families.family import Config

Read = Callable[[str], Tensor]  # checkpoint name -> tensor on any device, quantized parts dequantized


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

    def inputs(self, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """A batch on the model's device, its floating tensors in the model's dtype."""
        return {name: self._input(tensor) for name, tensor in batch.items()}

    def _input(self, tensor: Tensor) -> Tensor:
        return tensor.to(self.device, self.dtype if tensor.is_floating_point() else None)


def build_skeleton(family: Family, config: Config, device: torch.device) -> nn.Module:
    """The model with meta parameters and real buffers (rotary frequencies, position ids), in evaluation mode.

    Non-persistent buffers are in no checkpoint, so the initializer of the model that owns them makes them.
    """
    try:
        with torch.device("meta"):
            model: nn.Module = family.skeleton(config)
    except Exception as error:  # whatever transformers finds wrong with a config.json
        reason = " ".join(str(error).split())[:300]
        raise CheckpointError(f"transformers cannot build the model of this config.json: {reason}") from error
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


def load_whole(
    family: Family, config: Config, names: Iterable[str], read: Read, device: torch.device, dtype: torch.dtype
) -> Any:
    """A complete model on `device`, every parameter read through `read` (quantized ones dequantized)."""
    return Stream(family, config, device, dtype).load_all(names, read)
