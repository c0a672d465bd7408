"""A copy of an artifact with an error put into it, to prove that a comparison would notice."""

import shutil
from pathlib import Path

from exporter.artifact.artifact import Artifact
from exporter.errors import ServeError


def modules_of(artifact: Artifact, component: str) -> list[str]:
    """Packed linears of a component."""
    part = artifact.family.component(component)
    return [module for module in artifact.manifest.linears if part.holds(module)]


def disturbed(artifact: Artifact, wanted: str | None = None) -> str | None:
    """The component that the control disturbs: `wanted` (ServeError when nothing of it is packed), else the first."""
    packed = [component.name for component in artifact.family.components if modules_of(artifact, component.name)]
    if wanted and wanted not in packed:
        raise ServeError(
            f"nothing of '{wanted}' is packed in this artifact", f"packed: {', '.join(packed) or 'nothing'}"
        )
    return wanted or next(iter(packed), None)


def double_scales(artifact: Artifact, folder: Path, component: str, out: Path) -> Path:
    """A copy of the artifact in which every scale of a component is twice as large; other shards are links."""
    from safetensors.torch import load_file, save_file

    modules = modules_of(artifact, component)
    names = {f"{module}.{scale}" for module in modules for scale in ("weight_scale", "scales")}
    shards = {info.file for name, info in artifact.checkpoint.tensors.items() if name in names}
    out.mkdir()
    for path in folder.iterdir():
        if path.name in shards:
            tensors = load_file(path)
            doubled = {name: tensor * 2 if name in names else tensor for name, tensor in tensors.items()}
            save_file(doubled, out / path.name, {"format": "pt"})
        elif path.suffix == ".safetensors":
            (out / path.name).symlink_to(path.resolve())
        elif path.is_file():
            shutil.copyfile(path, out / path.name)
    return out
