"""Which vLLM kernel runs a scheme, by format and hardware: bits x kernel x architecture (vLLM 0.26-0.33).

Read from vLLM's `_get_scheme_from_parts` (compressed-tensors) and its kernel lists, compared with the choices of 0.32
in `tests/vllm/`, and run in the cases of docs/measurements/serving-versions.md. Group sizes that neither Machete nor
Marlin supports run with Humming, which supports all; vLLM may use Exllama or Triton instead for float16 or 4 bits.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from exporter.errors import PlanError

if TYPE_CHECKING:
    from exporter.numerics.quantized import Scheme

Capability = tuple[int, int]  # compute capability of an NVIDIA GPU: major, minor
Hardware = Capability | Literal["cpu"] | None  # the serving hardware; None is an unknown GPU
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
    """A compute capability as text, like `9.0`."""
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
    """A GPU kernel of vLLM.

    lowest, highest: the range of compute capabilities that support it (None: no known upper end). package: a package
    that it needs besides vLLM.
    """

    name: str
    lowest: Capability
    highest: Capability | None = None
    package: str = ""

    def runs_on(self, capability: Capability) -> bool:
        """Whether a GPU of this compute capability supports the kernel."""
        return self.lowest <= capability <= (self.highest or capability)

    def label(self) -> str:
        """The kernel's name and its compute capabilities."""
        lowest = capability_label(self.lowest)
        if self.highest is None:
            return f"{self.name} ({lowest}+)"
        return f"{self.name} ({lowest}{f' to {capability_label(self.highest)}' * (self.highest > self.lowest)})"


MACHETE = Kernel("Machete", (9, 0), (9, 0))
MARLIN = Kernel("Marlin", (7, 5))
HUMMING = Kernel("Humming", (7, 5), package="humming-kernels")
FP8_CUTLASS = Kernel("Cutlass FP8", (8, 9))
FP8_MARLIN = Kernel("FP8 Marlin", (7, 5))
INT8_CUTLASS = Kernel("Cutlass int8", (7, 5), (9, 0))  # vLLM's dispatcher fails on newer GPUs at the first request
W4A8_CUTLASS = Kernel("Cutlass W4A8", (9, 0), (9, 0))
FP8_BLOCK = Kernel("FP8 block", (8, 9))
NVFP4_MARLIN = Kernel("NVFP4 Marlin", (7, 5))
# On Blackwell GPUs vLLM prefers kernels that also round the inputs to 4 or 8 bits, which mmq does not reproduce.
MXFP4_MARLIN = Kernel("MXFP4 Marlin", (8, 0), (9, 0))
MXFP8_MARLIN = Kernel("MXFP8 Marlin", (8, 0), (9, 0))
ROUNDED_INPUTS = "newer GPUs also round the inputs to {bits} bits: use number: {instead}"
# A scheme with one scale per tensor is stored with equal scales per row.
MACHETE_GROUPS, MARLIN_GROUPS = ("row", "tensor", 64, 128), ("row", "tensor", 32, 64, 128)


@dataclass(frozen=True)
class SchemeKernels:
    """The kernels of vLLM that run a scheme.

    cuda: kernels for GPUs in order of preference. cpu: the CPU kernel, None when there is none. note: why some are
    missing.
    """

    cuda: tuple[Kernel, ...]
    cpu: str | None
    note: str = ""

    def on_gpu(self, capability: Capability) -> Kernel | None:
        """The first kernel that a GPU of this compute capability supports."""
        return next((kernel for kernel in self.cuda if kernel.runs_on(capability)), None)

    def requirement(self) -> str:
        """What an operator must provide; empty when vLLM's own kernels support all GPUs from some capability on."""
        plain = [kernel for kernel in self.cuda if not kernel.package]
        packages = [kernel.package for kernel in self.cuda if kernel.package]
        if any(kernel.highest is None for kernel in plain):
            return ""
        if packages:
            exception = f" except on {capability_label(plain[0].lowest)}" if plain else ""
            return f"needs the {packages[0]} package{exception}"
        return self.note if self.cuda else ""

    def gpu_label(self) -> str:
        """Names of the GPU kernels; a kernel from another package is listed only if it is required."""
        shown = [kernel for kernel in self.cuda if self.requirement() or not kernel.package]
        return " or ".join(kernel.label() for kernel in shown) or "not on CUDA"

    def label(self) -> str:
        """All kernels in one line, for tables."""
        remark = self.requirement() or self.note
        return f"{self.gpu_label()}; {self.cpu or 'not on CPU'}" + (f" ({remark})" if remark else "")


def serving_kernels(scheme: "Scheme", format_name: str) -> SchemeKernels:
    """The vLLM kernels for one scheme in one format."""
    if scheme.grid:
        return _floats(scheme)
    if scheme.mixed:
        return SchemeKernels((W4A8_CUTLASS,), None, "needs a Hopper GPU, compute capability 9.0")
    if scheme.as_int8:
        return SchemeKernels((INT8_CUTLASS,), "oneDNN int8")
    if scheme.activations == "int8":
        return _packed_with_int8_inputs(scheme)
    if format_name in ("gptq", "awq"):
        return _auto_formats(scheme, format_name)
    if scheme.bits == 4:
        return SchemeKernels(_weight_only(scheme), "CPU WNA16")
    note = "8-bit weight-only has no CPU kernel: add activations: int8" if scheme.bits == 8 else ""
    return SchemeKernels(_weight_only(scheme), None, note)


def _floats(scheme: "Scheme") -> SchemeKernels:
    """Kernels for the float grids."""
    if scheme.number == "nvfp4":
        return SchemeKernels((NVFP4_MARLIN,), None)
    if scheme.number == "mxfp4":
        return SchemeKernels((MXFP4_MARLIN,), None, ROUNDED_INPUTS.format(bits=4, instead="nvfp4"))
    if scheme.number == "mxfp8":
        return SchemeKernels((MXFP8_MARLIN,), None, ROUNDED_INPUTS.format(bits=8, instead="fp8"))
    if scheme.group_size == "block" and scheme.activations is None:
        note = "vLLM cannot load float8 blocks with 16-bit inputs: add activations: fp8, or use group_size: row"
        return SchemeKernels((), None, note)  # 0.26 and 0.32 assert that an input scheme exists
    if scheme.group_size == "block":
        return SchemeKernels((FP8_BLOCK, FP8_MARLIN), None)
    if scheme.activations is None:
        return SchemeKernels((FP8_MARLIN,), None)
    return SchemeKernels((FP8_CUTLASS, FP8_MARLIN), "torch fallback")


def _packed_with_int8_inputs(scheme: "Scheme") -> SchemeKernels:
    """Kernels that unpack integers and multiply them by int8 inputs."""
    others = [kernel.name for kernel in _weight_only(scheme) if not kernel.package]
    if others:
        note = f"vLLM runs it with {' or '.join(others)}, whose inputs stay 16 bits: remove activations: int8"
        return SchemeKernels((), None, note)
    return SchemeKernels((HUMMING,), None)


def _weight_only(scheme: "Scheme") -> tuple[Kernel, ...]:
    """GPU kernels for integer weights with 16-bit inputs, in vLLM's order; 0.32 prefers Humming to Marlin on 9.0."""
    kernels = []
    if scheme.bits in (4, 8) and scheme.group_size in MACHETE_GROUPS:
        kernels.append(MACHETE)
    if (scheme.bits == 4 or (scheme.bits == 8 and scheme.symmetric)) and scheme.group_size in MARLIN_GROUPS:
        kernels.append(MARLIN)
    return (*kernels, HUMMING)


def _auto_formats(scheme: "Scheme", format_name: str) -> SchemeKernels:
    kernels = tuple(kernel for kernel in _weight_only(scheme) if not kernel.package)
    if format_name == "gptq" and scheme.group_size not in MARLIN_GROUPS:
        return SchemeKernels((), None, "vLLM's gptq loader supports only groups of 32, 64, 128 or row")
    if scheme.bits == 4 and (scheme.symmetric or format_name == "awq"):
        return SchemeKernels(kernels, "CPU WNA16")
    if format_name == "gptq" and scheme.bits == 8 and scheme.symmetric:
        return SchemeKernels(kernels, None)
    supported = "4 bits" if format_name == "awq" else "symmetric 4 and 8 bits"
    return SchemeKernels((), None, f"vLLM's {format_name} loader supports only {supported}")
