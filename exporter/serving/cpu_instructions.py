"""Instruction sets of this machine's processor that vLLM's CPU build needs for a scheme or a KV cache."""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from exporter.numerics.quantized import Scheme

CPUINFO = Path("/proc/cpuinfo")


@dataclass(frozen=True)
class Instructions:
    """Instruction sets of an x86 processor that a part of vLLM's CPU build needs, and what happens without them.

    flags: of `/proc/cpuinfo`; any one of them is enough.
    """

    name: str
    flags: tuple[str, ...]
    without: str

    def missing(self) -> bool:
        """Whether this machine's processor lists its instruction sets, and none of these."""
        listed = processor_flags()
        return listed is not None and listed.isdisjoint(self.flags)


WNA16 = Instructions("AVX-512", ("avx512f",), "has no kernel of 4-bit linears (`cpu_gemm_wna16`)")
# Measured: int8 products are wrong without VNNI. Likely cause: sums of two saturate at 16 bits (oneDNN's page
# "Nuances of int8 computations").
INT8 = Instructions("VNNI", ("avx512_vnni", "avx_vnni"), "multiplies int8 inputs wrongly")
FLOAT8_CACHE = Instructions("AVX-512", ("avx512f",), "has no float8 KV cache")


def needed_instructions(scheme: Scheme) -> Instructions | None:
    """What vLLM's CPU kernel of this scheme needs beyond AVX2."""
    return INT8 if scheme.activations == "int8" else WNA16 if scheme.bits == 4 else None


def missing_instructions(schemes: Iterable[Scheme | None], kv_cache: str | None = None) -> list[Instructions]:
    """What this machine's processor lacks for vLLM's kernels of these schemes and this cache."""
    needs = [needed_instructions(scheme) for scheme in schemes if scheme] + [FLOAT8_CACHE if kv_cache else None]
    return [need for need in dict.fromkeys(needs) if need and need.missing()]


def processor_flags() -> frozenset[str] | None:
    """Instruction sets of this machine's processor; None when the system does not list them (no x86 Linux)."""
    try:
        lines = CPUINFO.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return None
    listed = next((line for line in lines if line.startswith("flags")), None)
    return None if listed is None else frozenset(listed.partition(":")[2].split())
