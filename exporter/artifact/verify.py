"""Does an artifact hold what its manifest and plan say? It is reopened from disk, hashed, unpacked and run.

Three comparisons, each within the memory of a few blocks: the hash of every file, the digest of every packed linear,
and the outputs of every block beside compressed-tensors' reading of it. Loading the whole model by `from_pretrained` is
a fourth, on request, because it takes 8 bytes of host memory a parameter.
"""

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

from exporter.artifact.artifact import Artifact
from exporter.artifact.artifact_tensors import digest
from exporter.artifact.coverage import missing_from_manifest
from exporter.artifact.manifest import Manifest
from exporter.artifact.verify_blocks import compare_blocks
from exporter.artifact.verify_source import unlike_source
from exporter.artifact.verify_whole import logit_difference, refuse_too_large
from exporter.device import Device
from exporter.distribution import install_extra
from exporter.errors import ArtifactError, CheckpointError
from exporter.events import Event, Listener
from exporter.files.file_hashes import sha256
from exporter.inference.predict import prompt_inputs
from exporter.model.checkpoint import Checkpoint
from exporter.model.processor import load_processor
from exporter.out_of_memory import is_shortage
from exporter.tasks.sample import Sample

THREADS = 4  # sha256 releases the interpreter; each thread holds a linear on the host
Load = Literal["nothing", "blocks", "whole"]


@dataclass(frozen=True)
class Verified:
    """What was checked. source: whether the linears were also compared with the source's.

    blocks, block_difference: how many blocks ran in transformers, and the largest difference of their outputs as a part
    of the largest output; None when `skipped` says why not. logit_difference: of the whole model, None unless asked.
    """

    files: int
    linears: int
    source: bool = False
    blocks: int | None = None
    block_difference: float | None = None
    logit_difference: float | None = None
    skipped: str = ""


def verify(
    folder: Path,
    device: Device,
    on_event: Listener,
    load: Load = "blocks",
    source: Checkpoint | None = None,
    rows: int | None = None,
) -> Verified:
    """Raise ArtifactError naming everything that is wrong with the artifact.

    source: the full-precision model; each quantized linear is compared with it, on `rows` rows (None: all).

    load: `blocks` also runs every block in transformers beside compressed-tensors' reading of it (when that library is
    installed); `whole` also loads the complete model by `from_pretrained` and compares logits (ArtifactError when the
    host lacks the memory). A library that fails on a right artifact does not make it wrong: `skipped` has the reason.
    """
    artifact = Artifact.open(folder, device.torch_device)
    problems = [*missing_from_manifest(artifact), *_wrong_files(folder, artifact.manifest, on_event)]
    if not problems:
        problems = _wrong_linears(artifact, on_event)
    if source and not problems:
        problems = unlike_source(artifact, source, rows)
    if problems:
        lines = "\n".join(f"  {problem}" for problem in dict.fromkeys(problems))
        raise ArtifactError(f"{folder} does not hold what its manifest says:\n{lines}", "export it again")
    verified = Verified(len(artifact.manifest.files), len(artifact.manifest.linears), source is not None)
    reason = _why_not_load(artifact) if load != "nothing" else "not requested"
    if reason:
        return replace(verified, skipped=reason)
    return _run(artifact, verified, device, on_event, whole=load == "whole")


def _run(artifact: Artifact, verified: Verified, device: Device, on_event: Listener, whole: bool) -> Verified:
    """The comparisons that need transformers and compressed-tensors."""
    folder = artifact.checkpoint.folder
    try:
        inputs = _probe(artifact)
    except CheckpointError as error:
        return replace(verified, skipped=error.message)
    try:
        found = compare_blocks(artifact, inputs, device, on_event)
        verified = replace(verified, blocks=found.blocks, block_difference=found.difference)
        if whole:
            refuse_too_large(artifact)
            verified = replace(verified, logit_difference=logit_difference(folder, inputs))
    except ArtifactError as error:
        raise ArtifactError(f"{folder}: {error.message}", error.hint) from None
    except Exception as error:  # a library's own failure says nothing about the artifact
        if is_shortage(error):
            raise
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:300]
        return replace(verified, skipped=f"transformers fails on it ({reason})")
    return verified


def _wrong_files(folder: Path, manifest: Manifest, on_event: Listener) -> list[str]:
    files = manifest.files
    problems = []
    with ThreadPoolExecutor(THREADS) as pool:
        named = sorted(files.items())
        for i, problem in enumerate(pool.map(lambda item: _wrong_file(folder, *item), named)):
            problems += [problem] if problem else []
            on_event(Event("verify", i + 1, len(files), named[i][0]))
    extra = {path.name for path in folder.glob("*.safetensors")} - files.keys()
    return problems + [f"{name}: not in the manifest" for name in sorted(extra)]


def _wrong_file(folder: Path, name: str, expected: str) -> str:
    if not (folder / name).is_file():
        return f"{name}: missing"
    return "" if sha256(folder / name) == expected else f"{name}: its content has changed since it was written"


def _wrong_linears(artifact: Artifact, on_event: Listener) -> list[str]:
    """Every packed linear must match the config's patterns and hold the integers that were computed."""
    linears = artifact.manifest.linears
    problems = []
    with ThreadPoolExecutor(THREADS) as pool:
        named = list(linears.items())
        for i, problem in enumerate(pool.map(lambda item: _wrong_linear(artifact, *item), named)):
            problems += [problem] if problem else []
            on_event(Event("verify", i + 1, len(linears), named[i][0]))
    return problems


def _wrong_linear(artifact: Artifact, module: str, expected: str) -> str:
    try:
        if digest(artifact.linear(module)) != expected:
            return f"{module}: its codes, scales or zero points are not those that were computed"
    except (ArtifactError, KeyError) as error:
        return f"{module}: {error}"
    return ""


def _why_not_load(artifact: Artifact) -> str:
    """The reason to skip the comparison with transformers, or an empty string."""
    if not artifact.checkpoint.config.get("quantization_config"):
        return ""  # a plain model
    if artifact.manifest.format != "compressed_tensors":
        return f"transformers needs another package for format {artifact.manifest.format}"
    if find_spec("compressed_tensors") is None:
        return f"compressed-tensors is not installed: {install_extra('verify')}"
    return ""


def _probe(artifact: Artifact) -> dict[str, Any]:
    """One picture of noise and a question, as the artifact's own processor makes them."""
    import numpy as np
    from PIL import Image

    processor = load_processor(artifact.checkpoint.folder)
    pixels = np.random.default_rng(0).integers(0, 256, (240, 320, 3), dtype=np.uint8)
    sample = Sample("noise", lambda: Image.fromarray(pixels), "What is in the picture?", (), "")
    return dict(prompt_inputs(processor, artifact.family, sample))
