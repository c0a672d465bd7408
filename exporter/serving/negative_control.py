"""Negative control of `mmq check`: a copy of an artifact with doubled scales, which the comparison must detect."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import TYPE_CHECKING

from exporter.errors import ServeError

if TYPE_CHECKING:
    from torch import Tensor

    from exporter.artifact.artifact import Artifact

SCALES = ("weight_scale", "weight_global_scale", "scales")  # last names of stored tensors


def modules_of(artifact: Artifact, component: str) -> list[str]:
    """Packed linears of a component."""
    part = artifact.family.component(component)
    return [module for module in artifact.manifest.linears if part.holds(module)]


def disturbed_component(artifact: Artifact, requested: str | None = None) -> str | None:
    """Component of the control: `requested` (ServeError when it has no packed linears), else the first packed one."""
    packed = [component.name for component in artifact.family.components if modules_of(artifact, component.name)]
    if requested and requested not in packed:
        raise ServeError(
            f"component '{requested}' has no packed linears in this artifact",
            f"components with packed linears: {', '.join(packed) or 'none'}",
        )
    return requested or next(iter(packed), None)


def doubled_scale(scale: Tensor) -> Tensor:
    """The stored tensor of scales that are twice as large: of numbers, exponents (uint8), or divisors (f32 `[1]`)."""
    import torch

    if scale.dtype == torch.float8_e4m3fn:
        return scale  # its divisor changes
    if scale.dtype == torch.uint8:
        return scale + 1
    return scale / 2 if scale.dtype == torch.float32 and scale.shape == (1,) else scale * 2


def double_scales(artifact: Artifact, folder: Path, component: str, out: Path) -> Path:
    """Copy the artifact to `out` with every scale of a component doubled; other shards are symbolic links."""
    from safetensors.torch import load_file, save_file

    modules = modules_of(artifact, component)
    names = {f"{module}.{scale}" for module in modules for scale in SCALES}
    shards = {info.file for name, info in artifact.checkpoint.tensors.items() if name in names}
    out.mkdir()
    for path in folder.iterdir():
        if path.name in shards:
            tensors = load_file(path)
            doubled = {name: doubled_scale(tensor) if name in names else tensor for name, tensor in tensors.items()}
            save_file(doubled, out / path.name, {"format": "pt"})
        elif path.suffix == ".safetensors":
            (out / path.name).symlink_to(path.resolve())
        elif path.is_file():
            shutil.copyfile(path, out / path.name)
    return out
