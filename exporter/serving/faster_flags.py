"""vLLM flags that serve an artifact faster on a Hopper GPU than the defaults (docs/measurements/serving-speed.md)."""

import shlex
from collections.abc import Collection, Sequence
from dataclasses import dataclass

from exporter.numerics.quantized import Scheme


@dataclass(frozen=True)
class FlagAdvice:
    """Flags of vLLM, and a text about their effect and requirements."""

    flags: tuple[str, ...]
    what: str


HUMMING = FlagAdvice(
    ("--linear-backend", "humming"),
    "faster decoding for one client; needs the package humming-kernels in vLLM's environment",
)
FLASHINFER = FlagAdvice(
    (
        *("--attention-backend", "FLASHINFER", "--max-num-batched-tokens", "16384"),
        *("--max-cudagraph-capture-size", "704"),  # a prompt of 640 tokens and 64 decoding clients
    ),
    "more tokens per second for many clients; needs nvcc, and the first start takes minutes",
)
HOPPER = (9, 0)  # compute capability of the GPU of the measurements
HEAD_SIZES = (64, 128, 256)  # sizes of an attention head that vLLM's FlashInfer back end and its XQA kernel support


def faster_flags(
    language: Collection[Scheme], others: Collection[Scheme], kv_cache: str | None, head: int | None
) -> list[FlagAdvice]:
    """Flags that measured faster for such an artifact. language, others: its schemes in compressed-tensors format.

    head: size of an attention head; None if the config leaves it to the model class (128 for LLaVA-1.5).
    """
    flags = []
    four = bool(language) and all(scheme == Scheme(4, 128) for scheme in language)
    # With this flag vLLM 0.26 uses Humming for every linear, with 16-bit inputs for all schemes.
    if four and all(scheme.symmetric and scheme.activations is None for scheme in others):
        flags.append(HUMMING)
    if kv_cache == "fp8" and head in (None, *HEAD_SIZES) and not any(scheme.mixed for scheme in language):
        flags.append(FLASHINFER)
    return flags


def advice(available: Sequence[FlagAdvice], user_flags: Sequence[str]) -> str:
    """Text for an operator about the available flags, without those whose options the user has set."""
    user_text = " ".join(user_flags).replace("_", "-")
    options = {HUMMING: ("linear-backend",), FLASHINFER: ("attention-backend", "attention-config", "kv-cache-dtype")}
    useful = [item for item in available if not any(option in user_text for option in options[item])]
    flags = shlex.join(flag for item in useful for flag in item.flags)
    lines = [f"  {item.flags[0]}: {item.what}" for item in useful]
    return "\n".join([f"faster on a Hopper GPU: `-- {flags}`", *lines]) if useful else ""
