"""Compare the logits of an artifact that `from_pretrained` loads with those of its dequantized weights.

Both models are on the CPU in float32, which takes 8 bytes per parameter.
"""

from collections.abc import Mapping
from contextlib import redirect_stderr
from io import StringIO
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from exporter.artifact.artifact import Artifact
from exporter.device import free_host_bytes
from exporter.errors import ArtifactError
from exporter.model.stream import load_whole

TOLERANCE = 1e-3  # the order of float32 summation may differ
BYTES_PER_PARAMETER = 8  # two models in float32


def refuse_too_large(artifact: Artifact) -> None:
    """ArtifactError when two copies of the model do not fit into the free host memory."""
    need, free = BYTES_PER_PARAMETER * artifact.parameters(), free_host_bytes()
    if need > free:
        raise ArtifactError(
            f"two copies of the model need {need / 2**30:.1f} GiB of host memory; {free / 2**30:.1f} GiB are free",
            "leave out --whole: mmq then compares the blocks one at a time",
        )


@torch.no_grad()
def logit_difference(folder: Path, inputs: Mapping[str, Tensor]) -> float:
    """Largest absolute difference of logits between `from_pretrained(folder)` and mmq's dequantized weights.

    compressed-tensors dequantizes to the dtype in which transformers loads the scales (the dtype of config.json, or
    float32 where the model requires it), so the reference is rounded to it too. ArtifactError above `TOLERANCE`.
    """
    import transformers

    artifact = Artifact.open(folder)
    family, config = artifact.family, artifact.source_config()
    with redirect_stderr(StringIO()):  # the libraries draw progress bars
        kind = getattr(transformers, config["architectures"][0])
        opened = kind.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    loaded = {name: tensor.dtype for name, tensor in [*opened.named_parameters(), *opened.named_buffers()]}

    def rounded(name: str) -> Tensor:
        module = name.removesuffix(".weight")
        if module in artifact.manifest.linears:
            return artifact.linear(module).dequantize(loaded[f"{family.live_name(module)}.weight_scale"])
        return artifact.read(name).to(loaded[family.live_name(name)])

    reference = load_whole(family, config, artifact.names(), rounded, torch.device("cpu"), torch.float32)
    with redirect_stderr(StringIO()):
        _without_activations(opened)
        family.outputs(opened, inputs)  # the first pass decompresses the weights
    torch.nn.Module.float(opened)  # transformers forbids its own `.float()` on quantized models
    difference = float((family.outputs(reference, inputs) - family.outputs(opened, inputs)).abs().max())
    if not difference <= TOLERANCE:
        raise ArtifactError(f"transformers computes other logits (difference {difference:.2e}, at most {TOLERANCE:g})")
    return difference


def _without_activations(model: Any) -> None:
    """Turn off activation rounding: compressed-tensors uses 127.5 steps and vLLM 127, and only weights are compared."""
    for module in model.modules():
        scheme = getattr(module, "quantization_scheme", None)
        if scheme is not None:
            scheme.input_activations = None
