"""Verify an artifact: compare its files, packed linears and blocks on disk with its manifest.

Three comparisons need the memory of a few blocks: the hash of every file, the digest of every packed linear, and the
outputs of every block against compressed-tensors. The fourth, on request, loads the whole model by `from_pretrained`;
it takes 8 bytes of host memory per parameter.
"""

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

from exporter.artifact.artifact import Artifact
from exporter.artifact.artifact_tensors import digest
from exporter.artifact.manifest_coverage import missing_from_manifest
from exporter.artifact.verify_blocks import compare_blocks
from exporter.artifact.verify_source import unlike_source
from exporter.artifact.verify_whole import logit_difference, refuse_too_large
from exporter.data.tasks.sample import Sample
from exporter.device import Device
from exporter.distribution import install_extra
from exporter.errors import ArtifactError, CheckpointError
from exporter.events import Event, Listener
from exporter.files.file_hashes import AT_ONCE, sha256
from exporter.model.checkpoint import Checkpoint
from exporter.model.inference.predict import prompt_inputs
from exporter.model.processors.processor import load_processor
from exporter.out_of_memory import is_shortage

THREADS = 4  # sha256 releases the GIL; each thread holds one linear in host memory
Load = Literal["nothing", "blocks", "whole"]


@dataclass(frozen=True)
class Verification:
    """Result of a verification. files, linears: numbers of checked files and packed linears.

    source: whether the linears were also compared with the source's. blocks: number of blocks that ran in transformers.
    block_difference: largest difference of their outputs relative to the largest output. Both are None when the
    comparison was skipped; `skipped` is the reason. logit_difference: of the whole model; None unless requested.
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
) -> Verification:
    """Check an artifact; ArtifactError lists every problem.

    source: full-precision model; each quantized linear is compared with it on `rows` rows (None: all rows).

    load: `blocks` also runs every block in transformers and compares it with compressed-tensors (if installed);
    `whole` also loads the complete model by `from_pretrained` and compares logits (ArtifactError when host memory is
    too small). When a library fails, the artifact still passes and `skipped` is the reason.
    """
    artifact = Artifact.open(folder, device.torch_device)
    problems = [*missing_from_manifest(artifact), *_wrong_contents(artifact, on_event)]
    if source and not problems:
        problems = unlike_source(artifact, source, rows)
    if problems:
        lines = "\n".join(f"  {problem}" for problem in dict.fromkeys(problems))
        raise ArtifactError(f"{folder} does not match its manifest:\n{lines}", "export it again")
    verified = Verification(len(artifact.manifest.files), len(artifact.manifest.linears), source is not None)
    reason = _why_not_load(artifact) if load != "nothing" else "not requested"
    if reason:
        return replace(verified, skipped=reason)
    return _run(artifact, verified, device, on_event, whole=load == "whole")


def _run(artifact: Artifact, verified: Verification, device: Device, on_event: Listener, whole: bool) -> Verification:
    """Run the comparisons that need transformers and compressed-tensors."""
    folder = artifact.checkpoint.folder
    try:
        inputs = _probe(artifact)
    except CheckpointError as error:
        if is_shortage(error):
            raise
        return replace(verified, skipped=error.message)
    try:
        comparison = compare_blocks(artifact, inputs, device, on_event)
        verified = replace(verified, blocks=comparison.blocks, block_difference=comparison.difference)
        if whole:
            refuse_too_large(artifact)
            verified = replace(verified, logit_difference=logit_difference(folder, inputs))
    except ArtifactError as error:
        raise ArtifactError(f"{folder}: {error.message}", error.hint) from None
    except Exception as error:  # a failure inside a library is no evidence against the artifact
        if is_shortage(error):
            raise
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:300]
        return replace(verified, skipped=f"transformers fails on the artifact ({reason})")
    return verified


def _wrong_contents(artifact: Artifact, on_event: Listener) -> list[str]:
    """One line per file that changed, else one per linear that differs; both are checked at the same time."""
    folder, files = artifact.checkpoint.folder, artifact.manifest.files
    with ThreadPoolExecutor(AT_ONCE) as pool:
        named = sorted(files.items())
        hashed = pool.map(lambda item: _wrong_file(folder, *item), named)
        linears = _wrong_linears(artifact, on_event)
        problems = []
        for i, problem in enumerate(hashed):
            problems += [problem] if problem else []
            on_event(Event("verify", i + 1, len(files), named[i][0]))
    extra = {path.name for path in folder.glob("*.safetensors")} - files.keys()
    problems += [f"{name}: not in the manifest" for name in sorted(extra)]
    return problems or linears  # a changed file explains every difference inside it


def _wrong_file(folder: Path, name: str, expected: str) -> str:
    if not (folder / name).is_file():
        return f"{name}: missing"
    return "" if sha256(folder / name) == expected else f"{name}: its content changed after the export"


def _wrong_linears(artifact: Artifact, on_event: Listener) -> list[str]:
    """One line per packed linear that matches no pattern of the config or whose integers differ from the digest."""
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
            return f"{module}: its codes, scales or zero points differ from the computed ones"
    except Exception as error:  # the stored tensors may have any shape and dtype
        if is_shortage(error):
            raise
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
    """Inputs for one picture of noise and one question, made by the artifact's own processor."""
    import numpy as np
    from PIL import Image

    processor = load_processor(artifact.checkpoint.folder)
    pixels = np.random.default_rng(0).integers(0, 256, (240, 320, 3), dtype=np.uint8)
    sample = Sample("noise", lambda: Image.fromarray(pixels), "What is in the picture?", (), "")
    return dict(prompt_inputs(processor, artifact.family, sample))
