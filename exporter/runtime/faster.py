"""Flags that serve an artifact faster on NVIDIA GPUs than vLLM's own choice, as measured: docs/serving.md, Speed."""

from collections.abc import Collection, Sequence

from exporter.quantized import Scheme

HUMMING = ("--linear-backend", "humming")
FLASHINFER = ("--attention-backend", "FLASHINFER", "--max-num-batched-tokens", "16384")
HEADS = (64, 128, 256)  # numbers of a head that FlashInfer's XQA kernel takes


def faster(
    schemes: Collection[Scheme], format_name: str, kv_cache: str | None, head: int | None, given: Sequence[str]
) -> list[str]:
    """What an operator may want to know of such flags. head: numbers of an attention head; given: flags so far."""
    named = {flag.split("=")[0].replace("_", "-") for flag in given}
    # Humming computes with 16-bit inputs whatever the scheme says.
    plain = all(scheme.symmetric and scheme.activations is None for scheme in schemes)
    four = plain and any(scheme.bits == 4 for scheme in schemes)
    notes = []
    if four and format_name == "compressed_tensors" and HUMMING[0] not in named:
        notes.append(f"`-- {' '.join(HUMMING)}` answers one client sooner, with humming-kernels installed beside vllm")
    if kv_cache == "fp8" and head in HEADS and FLASHINFER[0] not in named:
        notes.append(f"`-- {' '.join(FLASHINFER)}` serves many clients faster on Hopper GPUs, with nvcc there")
    return notes
