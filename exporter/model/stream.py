"""A transformers model that is partly in memory: its parameters are loaded and unloaded by checkpoint name.

The skeleton has its parameters on the meta device and real buffers; `Stream` loads tensors into it and unloads them.
"""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from exporter.errors import CheckpointError
from exporter.model.families import Family
from exporter.model.families.component import Config

Read = Callable[[str], Tensor]  # checkpoint name -> tensor on any device; quantized tensors are dequantized


class Stream:
    """A model skeleton on `device` into which tensors are loaded by checkpoint name.

    dtype: of loaded floating-point parameters, except those that the family always computes in float32.
    """

    def __init__(self, family: Family, config: Config, device: torch.device, dtype: torch.dtype) -> None:
        self.family = family
        self.device = device
        self.dtype = dtype
        self.model: nn.Module = build_skeleton(family, config, device)

    def load(self, names: Iterable[str], read: Read) -> None:
        """Load tensors into the skeleton, by checkpoint name."""
        for name in names:
            self.put(name, read(name))

    def load_all(self, names: Iterable[str], read: Read) -> Any:
        """The complete model with every parameter loaded (CheckpointError when some are missing)."""
        self.load(names, read)
        model: Any = self.model
        model.tie_weights()
        empty = [name for name, parameter in model.named_parameters() if parameter.is_meta]
        if empty:
            raise CheckpointError(f"the checkpoint lacks {empty[0]} ({len(empty)} parameters missing)")
        return model

    def put(self, name: str, tensor: Tensor) -> None:
        """Load one tensor into the skeleton (CheckpointError when its shape differs from the config's)."""
        module, attribute = self._place(name)
        expected = getattr(module, attribute).shape
        if tensor.shape != expected:
            shapes = f"{list(tensor.shape)}, but config.json requires {list(expected)}"
            raise CheckpointError(f"{name} has the shape {shapes}")
        wide = name.startswith(self.family.float32)
        self._set(module, attribute, tensor.to(self.device, torch.float32 if wide else self.dtype))

    def unload(self, names: Iterable[str]) -> None:
        """Free the memory of tensors, by checkpoint name."""
        for name in names:
            module, attribute = self._place(name)
            self._set(module, attribute, getattr(module, attribute).to("meta"))

    def module(self, name: str) -> nn.Module:
        """The live module with this checkpoint name (without `.weight`)."""
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
            raise CheckpointError(f"{type(self.model).__name__} has no tensor {name}") from None
        return module, attribute

    @staticmethod
    def _set(module: nn.Module, attribute: str, tensor: Tensor) -> None:
        if isinstance(getattr(module, attribute), nn.Parameter):
            setattr(module, attribute, nn.Parameter(tensor, requires_grad=False))
        else:
            setattr(module, attribute, tensor)

    def inputs(self, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """A batch on the model's device, with floating-point tensors in the model's dtype."""
        return {name: self._input(tensor) for name, tensor in batch.items()}

    def _input(self, tensor: Tensor) -> Tensor:
        return tensor.to(self.device, self.dtype if tensor.is_floating_point() else None)


def build_skeleton(family: Family, config: Config, device: torch.device) -> nn.Module:
    """The model in evaluation mode: parameters on the meta device, real buffers (rotary frequencies, position ids).

    Checkpoints lack the non-persistent buffers, so the initializer of the model that owns them computes them.
    CheckpointError when transformers rejects the config.
    """
    try:
        with torch.device("meta"):
            model: nn.Module = family.skeleton(config)
    except Exception as error:  # transformers raises many types for an invalid config.json
        reason = " ".join(str(error).split())[:300]
        raise CheckpointError(f"transformers cannot build a model from this config.json: {reason}") from error
    _fill_buffers(model, model, device)
    return model.eval()


@torch.no_grad()
def _fill_buffers(module: nn.Module, owner: Any, device: torch.device) -> None:
    """Compute the buffers of a module and its children on `device`.

    owner: the nearest enclosing transformers model, whose `_init_weights` initializes the module.
    """
    if hasattr(module, "_init_weights"):
        owner = module
    names = [name for name, _ in module.named_buffers(recurse=False)]
    for name in names:
        setattr(module, name, torch.empty_like(getattr(module, name), device=device))
    if names:
        owner._init_weights(module)  # writes the buffers; has no effect on meta parameters
    for child in module.children():
        _fill_buffers(child, owner, device)


def load_whole(
    family: Family, config: Config, names: Iterable[str], read: Read, device: torch.device, dtype: torch.dtype
) -> Any:
    """A complete model on `device`, with every parameter read through `read` (quantized ones dequantized)."""
    return Stream(family, config, device, dtype).load_all(names, read)
