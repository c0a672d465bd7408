"""Which vLLM kernel runs a scheme, by format and hardware: bits x kernel x architecture (vLLM 0.26-0.33).

Read from vLLM's `_get_scheme_from_parts` (compressed-tensors) and kernel lists, compared with what 0.32 chooses in
`tests/vllm/`, and tried where `docs/serving.md` says so. Groups that neither Machete nor Marlin takes are left to
Humming, which runs them all; float16 or 4 bits vLLM may give to Exllama or Triton instead.
"""

from dataclasses import dataclass
from typing import Literal

from exporter.quantized import Scheme

Capability = tuple[int, int]  # of an NVIDIA GPU: major, minor
Hardware = Capability | Literal["cpu"] | None  # what serves; None is some GPU, unknown which
ARCHITECTURES: dict[Capability, str] = {
    (7, 5): "Turing",
    (8, 0): "Ampere",
    (8, 6): "Ampere",
    (8, 9): "Ada",
    (9, 0): "Hopper",
    (10, 0): "Blackwell",
    (12, 0): "Blackwell",
}


def said(capability: Capability) -> str:
    """`9.0`."""
    return ".".join(map(str, capability))


def named(where: str) -> Hardware:
    """What `9.0` or `cpu` means."""
    if where == "cpu":
        return "cpu"
    major, minor = where.split(".")
    return int(major), int(minor)


@dataclass(frozen=True)
class Kernel:
    """A kernel of vLLM for GPUs.

    lowest, highest: the compute capabilities that have it (None: no end is known). package: what it wants beside vLLM.
    """

    name: str
    lowest: Capability
    highest: Capability | None = None
    package: str = ""

    def runs_on(self, capability: Capability) -> bool:
        """Whether such a card has it."""
        return self.lowest <= capability <= (self.highest or capability)

    def label(self) -> str:
        """Its name and where it runs."""
        if self.highest == self.lowest:
            return f"{self.name} ({said(self.lowest)})"
        return f"{self.name} ({said(self.lowest)}{f' to {said(self.highest)}' if self.highest else '+'})"


MACHETE = Kernel("Machete", (9, 0), (9, 0))
MARLIN = Kernel("Marlin", (7, 5))
HUMMING = Kernel("Humming", (7, 5), package="humming-kernels")
FP8_CUTLASS = Kernel("Cutlass FP8", (8, 9))
FP8_MARLIN = Kernel("FP8 Marlin", (7, 5))
INT8_CUTLASS = Kernel("Cutlass int8", (7, 5), (9, 0))  # its dispatcher refuses newer cards at the first request
W4A8_CUTLASS = Kernel("Cutlass W4A8", (9, 0), (9, 0))
MACHETE_GROUPS, MARLIN_GROUPS = ("row", 64, 128), ("row", 32, 64, 128)


@dataclass(frozen=True)
class Serving:
    """What runs a scheme.

    cuda: kernels for GPUs, the preferred first. cpu: the kernel, or None when there is none. note: for an operator.
    """

    cuda: tuple[Kernel, ...]
    cpu: str | None
    note: str = ""

    def on(self, capability: Capability) -> Kernel | None:
        """The first kernel that such a card has."""
        return next((kernel for kernel in self.cuda if kernel.runs_on(capability)), None)

    def cards(self) -> str:
        """The kernels for GPUs in words; the one of an extra package only where the others leave cards out."""
        plain = [kernel for kernel in self.cuda if not kernel.package]
        named = plain if any(kernel.highest is None for kernel in plain) else self.cuda
        return " or ".join(kernel.label() for kernel in named) or "not on CUDA"

    def label(self) -> str:
        """One line for tables."""
        return f"{self.cards()}; {self.cpu or 'not on CPU'}" + (f" ({self.note})" if self.note else "")


def serving(scheme: Scheme, format_name: str) -> Serving:
    """The kernels for one scheme in one format."""
    if scheme.number == "fp8":
        weight_only = scheme.activations is None
        return Serving((FP8_MARLIN,), None) if weight_only else Serving((FP8_CUTLASS, FP8_MARLIN), "torch fallback")
    if scheme.mixed:
        return Serving((W4A8_CUTLASS,), None, "needs a Hopper GPU, compute capability 9.0")
    if scheme.activations == "int8":
        return Serving((INT8_CUTLASS,), "oneDNN int8")
    if format_name in ("gptq", "awq"):
        return _auto_formats(scheme, format_name)
    kernels = _weight_only(scheme)
    cpu, note = "CPU WNA16" if scheme.bits == 4 else None, ""
    if MARLIN not in kernels:
        note = f"needs the humming-kernels package{' but on 9.0' if MACHETE in kernels else ''}"
    elif scheme.bits == 8:
        note = "8-bit weight-only has no CPU kernel: add activations: int8"
    return Serving(kernels, cpu, note)


def _weight_only(scheme: Scheme) -> tuple[Kernel, ...]:
    """Kernels for integers beside 16-bit inputs, in vLLM's order; 0.32 puts Humming before Marlin on 9.0."""
    found = []
    if scheme.bits in (4, 8) and scheme.group_size in MACHETE_GROUPS:
        found.append(MACHETE)
    if (scheme.bits == 4 or (scheme.bits == 8 and scheme.symmetric)) and scheme.group_size in MARLIN_GROUPS:
        found.append(MARLIN)
    return (*found, HUMMING)


def _auto_formats(scheme: Scheme, format_name: str) -> Serving:
    kernels = tuple(kernel for kernel in _weight_only(scheme) if not kernel.package)
    if scheme.bits == 4 and (scheme.symmetric or format_name == "awq"):
        return Serving(kernels, "CPU WNA16")
    if format_name == "gptq" and scheme.bits == 8 and scheme.symmetric:
        return Serving(kernels, None)
    takes = "4 bits" if format_name == "awq" else "symmetric 4 and 8 bits"
    return Serving((), None, f"vLLM's {format_name} loader takes {takes} only")
