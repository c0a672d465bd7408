"""Which vLLM kernel runs a scheme, by format and hardware (vLLM 0.26-0.33).

Read from vLLM's `_get_scheme_from_parts` (compressed-tensors) and kernel lists, and tried where `docs/` says so:
Marlin takes 4 and 8 bits from compute capability 8.0, Machete 9.0; 4 bits with float8 activations run on 9.0 alone, in
bfloat16; other widths need the `humming-kernels`
package; the CPU has 4-bit weight-only and int8 W8A8.
"""

from dataclasses import dataclass

from exporter.quantized import Scheme


@dataclass(frozen=True)
class Serving:
    """What runs a scheme. cuda, cpu: the kernel, or None when there is none; note: what an operator should know."""

    cuda: str | None
    cpu: str | None
    note: str = ""

    def label(self) -> str:
        """One line for tables."""
        cpu = self.cpu or "not on CPU"
        return f"{self.cuda or 'not on CUDA'}; {cpu}" + (f" ({self.note})" if self.note else "")


def serving(scheme: Scheme, format_name: str) -> Serving:
    """The kernels for one scheme in one format."""
    if scheme.number == "fp8":
        weight_only = scheme.activations is None
        cuda = "FP8 Marlin" if weight_only else "FP8 Cutlass (8.9+), FP8 Marlin below"
        return Serving(cuda, None if weight_only else "torch fallback")
    if scheme.mixed:
        return Serving("Cutlass W4A8 (9.0 alone)", None, "needs a Hopper GPU, compute capability 9.0")
    if scheme.activations == "int8":
        return Serving("Cutlass int8 (7.5 to 9.0)", "oneDNN int8")
    if format_name in ("gptq", "awq"):
        return _auto_formats(scheme, format_name)
    if scheme.bits == 4:
        return Serving("Machete (9.0) or Marlin (8.0+)", "CPU WNA16")
    if scheme.bits == 8 and scheme.symmetric:
        return Serving(
            "Machete (9.0) or Marlin (8.0+)", None, "8-bit weight-only has no CPU kernel: add activations: int8"
        )
    return Serving("Humming (7.5+)", None, "needs the humming-kernels package")


def _auto_formats(scheme: Scheme, format_name: str) -> Serving:
    if scheme.bits == 4:
        symmetric = scheme.symmetric or format_name == "awq"
        return Serving("Marlin (8.0+)" if symmetric else None, "CPU WNA16" if symmetric else None)
    if format_name == "gptq" and scheme.bits == 8 and scheme.symmetric:
        return Serving("Marlin (8.0+)", None)
    takes = "4 bits" if format_name == "awq" else "symmetric 4 and 8 bits"
    return Serving(None, None, f"vLLM's {format_name} loader takes {takes} only")
