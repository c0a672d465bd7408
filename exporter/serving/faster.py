"""Flags that serve an artifact faster on a Hopper GPU than vLLM's own choice (docs/measurements/serving-speed.md)."""

import shlex
from collections.abc import Collection, Sequence
from dataclasses import dataclass

from exporter.numerics.quantized import Scheme


@dataclass(frozen=True)
class Faster:
    """Flags of vLLM, and what they do."""

    flags: tuple[str, ...]
    what: str


HUMMING = Faster(
    ("--linear-backend", "humming"),
    "decodes faster for one client; needs the package humming-kernels beside vllm",
)
FLASHINFER = Faster(
    (
        *("--attention-backend", "FLASHINFER", "--max-num-batched-tokens", "16384"),
        *("--max-cudagraph-capture-size", "704"),  # a prompt of 640 tokens beside 64 clients that decode
    ),
    "more tokens a second for many clients; needs nvcc, and minutes at the first start",
)
CARD = (9, 0)  # the compute capability they were measured on
HEADS = (64, 128, 256)  # numbers of a head that vLLM's FlashInfer back end and its XQA kernel both take


def faster(
    language: Collection[Scheme], others: Collection[Scheme], kv_cache: str | None, head: int | None
) -> list[Faster]:
    """What was seen to serve such an artifact faster. language, others: its schemes, all in compressed-tensors' format.

    head: numbers of an attention head, None if the config leaves them to the model class (LLaVA-1.5's 128).
    """
    found = []
    four = bool(language) and all(scheme == Scheme(4, 128) for scheme in language)
    # With that flag vLLM 0.26 gives Humming every linear, and 16-bit inputs whatever the scheme says.
    if four and all(scheme.symmetric and scheme.activations is None for scheme in others):
        found.append(HUMMING)
    if kv_cache == "fp8" and head in (None, *HEADS) and not any(scheme.mixed for scheme in language):
        found.append(FLASHINFER)
    return found


def advice(found: Sequence[Faster], given: Sequence[str]) -> str:
    """What an operator is told of the flags; nothing of those whose choice was made already. given: vLLM's flags."""
    named = " ".join(given).replace("_", "-")
    decided = {HUMMING: ("linear-backend",), FLASHINFER: ("attention-backend", "attention-config", "kv-cache-dtype")}
    kept = [each for each in found if not any(word in named for word in decided[each])]
    flags = shlex.join(flag for each in kept for flag in each.flags)
    lines = [f"  {each.flags[0]}: {each.what}" for each in kept]
    return "\n".join([f"faster on a Hopper GPU: `-- {flags}` (docs/how-to/serve-on-gpu.md)", *lines]) if kept else ""
