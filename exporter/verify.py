"""Does an artifact hold what its manifest and plan say? Reopened from disk, hashed, unpacked, and loaded elsewhere."""

from collections.abc import Callable
from contextlib import redirect_stderr
from dataclasses import dataclass
from importlib.util import find_spec
from io import StringIO
from pathlib import Path
from typing import Any

import torch

from exporter.artifact import Artifact, digest
from exporter.checkpoint import sha256
from exporter.device import Device
from exporter.errors import ArtifactError
from exporter.events import Event
from exporter.families import Family
from exporter.manifest import Manifest
from exporter.stream import load_whole

LOGIT_TOLERANCE = 1e-3  # float32 sums in another order; the weights themselves are compared exactly


@dataclass(frozen=True)
class Verified:
    """What was checked. logit_difference: against transformers' own loading, None when that was skipped (and why)."""

    files: int
    linears: int
    logit_difference: float | None
    skipped: str = ""


def verify(folder: Path, device: Device, on_event: Callable[[Event], None], load: bool = True) -> Verified:
    """Raise ArtifactError naming everything that is wrong with the artifact.

    load: also open it in transformers through compressed-tensors (when that is installed) and compare logits.
    """
    artifact = Artifact.open(folder, device.torch_device)
    problems = _wrong_files(folder, artifact.manifest, on_event)
    if not problems:
        problems = _wrong_linears(artifact, on_event)
    if problems:
        lines = "\n".join(f"  {problem}" for problem in problems)
        raise ArtifactError(f"{folder} does not hold what its manifest says:\n{lines}", "export it again")
    skipped = _why_not_load(artifact, device) if load else "not asked for"
    difference = None if skipped else logit_difference(Artifact.open(folder), folder)
    if difference is not None and not difference <= LOGIT_TOLERANCE:
        raise ArtifactError(f"{folder}: transformers computes other logits from it (difference {difference:.2e})")
    return Verified(len(artifact.manifest.files), len(artifact.manifest.linears), difference, skipped)


def _wrong_files(folder: Path, manifest: Manifest, on_event: Callable[[Event], None]) -> list[str]:
    problems = []
    files = manifest.files
    for i, (name, expected) in enumerate(sorted(files.items())):
        path = folder / name
        if not path.is_file():
            problems.append(f"{name}: missing")
        elif sha256(path) != expected:
            problems.append(f"{name}: its content has changed since it was written")
        on_event(Event("verify", i + 1, len(files), name))
    extra = {path.name for path in folder.glob("*.safetensors")} - files.keys()
    return problems + [f"{name}: not in the manifest" for name in sorted(extra)]


def _wrong_linears(artifact: Artifact, on_event: Callable[[Event], None]) -> list[str]:
    """Every packed linear must be found through the config's patterns and hold the integers that were computed."""
    problems = []
    linears = artifact.manifest.linears
    for i, (module, expected) in enumerate(linears.items()):
        try:
            if digest(artifact.linear(module)) != expected:
                problems.append(f"{module}: its codes, scales or zero points are not those that were computed")
        except (ArtifactError, KeyError) as error:
            problems.append(f"{module}: {error}")
        on_event(Event("verify", i + 1, len(linears), module))
    return problems


def _why_not_load(artifact: Artifact, device: Device) -> str:
    """The reason to skip the comparison with transformers, or an empty string."""
    if artifact.manifest.format != "compressed_tensors":
        return f"transformers needs another package for format {artifact.manifest.format}"
    if find_spec("compressed_tensors") is None:
        return "compressed-tensors is not installed: pip install 'mmq[verify]'"
    need = 2 * 4 * sum(info.size for info in artifact.checkpoint.tensors.values())
    if need > device.free_bytes / 2:
        return f"two copies of the model take {need / 2**30:.0f} GiB"
    return ""


@torch.no_grad()
def logit_difference(artifact: Artifact, folder: Path) -> float:
    """Largest difference of logits (float32 sums, CPU) between transformers' loading and our dequantized weights.

    compressed-tensors dequantizes into the dtype in which transformers loaded the scales (that of config.json, or
    float32 where the model insists on it), so the reference is rounded to it too.
    """
    import transformers

    family, config = artifact.family, artifact.source_config()
    inputs, outputs = _probe(config, family), family.outputs
    with redirect_stderr(StringIO()):  # the libraries draw progress bars of their own
        try:
            theirs = getattr(transformers, config["architectures"][0]).from_pretrained(folder)
        except Exception as error:  # whatever a library finds wrong with the artifact
            told = " ".join(f"{type(error).__name__}: {error}".split())[:300]
            raise ArtifactError(f"{folder}: transformers cannot load it ({told})") from error
    loaded = {name: tensor.dtype for name, tensor in [*theirs.named_parameters(), *theirs.named_buffers()]}

    def rounded(name: str) -> torch.Tensor:
        module = name.removesuffix(".weight")
        if module in artifact.manifest.linears:
            return artifact.linear(module).dequantize(loaded[f"{family.live_name(module)}.weight_scale"])
        return artifact.read(name).to(loaded[family.live_name(name)])

    ours = load_whole(family, config, artifact.names(), rounded, torch.device("cpu"), torch.float32)
    with redirect_stderr(StringIO()):
        _without_activations(theirs)
        outputs(theirs, inputs)  # the first pass decompresses the weights
    torch.nn.Module.float(theirs)  # transformers forbids its own `.float()` on quantized models
    return float((outputs(ours, inputs) - outputs(theirs, inputs)).abs().max())


def _without_activations(model: Any) -> None:
    """Weights alone are compared: the library divides activations by 127.5 steps, engines by 127 (`activations`)."""
    for module in model.modules():
        scheme = getattr(module, "quantization_scheme", None)
        if scheme is not None:
            scheme.input_activations = None


def _probe(config: dict[str, Any], family: Family) -> dict[str, torch.Tensor]:
    """One random image and a few random tokens behind it."""
    side = config["vision_config"]["image_size"]
    generator = torch.Generator().manual_seed(0)
    words = torch.randint(3, 64, (1, 8), generator=generator)
    marker = int(config.get("image_token_index") or 0)
    words[words == marker] += 1
    image = torch.full((1, family.image_tokens(config)), marker)
    tokens = torch.cat([image, words], dim=1)
    pixels = torch.randn(1, 3, side, side, generator=generator)
    return {"input_ids": tokens, "attention_mask": torch.ones_like(tokens), "pixel_values": pixels}
