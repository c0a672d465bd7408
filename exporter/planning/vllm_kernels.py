"""Which vLLM kernel runs a scheme, by format and hardware: bits x kernel x architecture (vLLM 0.26-0.33).

Read from vLLM's `_get_scheme_from_parts` (compressed-tensors) and kernel lists, compared with what 0.32 chooses in
`tests/vllm/`, and tried where `docs/measurements/serving-versions.md` says so. Groups that neither Machete nor Marlin
takes run with Humming, which takes all of them; vLLM may give float16 or 4 bits to Exllama or Triton instead.
"""

from dataclasses import dataclass
from typing import Literal

from exporter.errors import PlanError
from exporter.numerics.quantized import Scheme

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


def capability_label(capability: Capability) -> str:
    """`9.0`."""
    return ".".join(map(str, capability))


def read_hardware(where: str) -> Hardware:
    """What `9.0` or `cpu` means (PlanError for anything else)."""
    known = (*map(capability_label, ARCHITECTURES), "cpu")
    if where not in known:
        raise PlanError(f"unknown hardware '{where}'", f"use one of {', '.join(known)}")
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
        lowest = capability_label(self.lowest)
        if self.highest is None:
            return f"{self.name} ({lowest}+)"
        return f"{self.name} ({lowest}{f' to {capability_label(self.highest)}' * (self.highest > self.lowest)})"


MACHETE = Kernel("Machete", (9, 0), (9, 0))
MARLIN = Kernel("Marlin", (7, 5))
HUMMING = Kernel("Humming", (7, 5), package="humming-kernels")
FP8_CUTLASS = Kernel("Cutlass FP8", (8, 9))
FP8_MARLIN = Kernel("FP8 Marlin", (7, 5))
INT8_CUTLASS = Kernel("Cutlass int8", (7, 5), (9, 0))  # its dispatcher refuses newer cards at the first request
W4A8_CUTLASS = Kernel("Cutlass W4A8", (9, 0), (9, 0))
# One scale a tensor is stored as equal scales a row.
MACHETE_GROUPS, MARLIN_GROUPS = ("row", "tensor", 64, 128), ("row", "tensor", 32, 64, 128)


@dataclass(frozen=True)
class Serving:
    """What runs a scheme.

    cuda: kernels for GPUs, the preferred first. cpu: the kernel, None when there is none. note: why some are missing.
    """

    cuda: tuple[Kernel, ...]
    cpu: str | None
    note: str = ""

    def on(self, capability: Capability) -> Kernel | None:
        """The first kernel that such a card has."""
        return next((kernel for kernel in self.cuda if kernel.runs_on(capability)), None)

    def needs(self) -> str:
        """What an operator must see to, empty when vLLM's own kernels leave no card out."""
        plain = [kernel for kernel in self.cuda if not kernel.package]
        packages = [kernel.package for kernel in self.cuda if kernel.package]
        if any(kernel.highest is None for kernel in plain):
            return ""
        if packages:
            but = f" except on {capability_label(plain[0].lowest)}" if plain else ""
            return f"needs the {packages[0]} package{but}"
        return self.note if self.cuda else ""

    def cards(self) -> str:
        """The kernels for GPUs in words, the one of a package only where it is needed."""
        shown = [kernel for kernel in self.cuda if self.needs() or not kernel.package]
        return " or ".join(kernel.label() for kernel in shown) or "not on CUDA"

    def label(self) -> str:
        """One line for tables."""
        remark = self.needs() or self.note
        return f"{self.cards()}; {self.cpu or 'not on CPU'}" + (f" ({remark})" if remark else "")


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
    if scheme.bits == 4:
        return Serving(_weight_only(scheme), "CPU WNA16")
    note = "8-bit weight-only has no CPU kernel: add activations: int8" if scheme.bits == 8 else ""
    return Serving(_weight_only(scheme), None, note)


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
    if format_name == "gptq" and scheme.group_size not in MARLIN_GROUPS:
        return Serving((), None, "vLLM's gptq loader takes groups of 32, 64, 128 or row only")
    if scheme.bits == 4 and (scheme.symmetric or format_name == "awq"):
        return Serving(kernels, "CPU WNA16")
    if format_name == "gptq" and scheme.bits == 8 and scheme.symmetric:
        return Serving(kernels, None)
    takes = "4 bits" if format_name == "awq" else "symmetric 4 and 8 bits"
    return Serving((), None, f"vLLM's {format_name} loader takes {takes} only")
