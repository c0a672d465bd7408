"""How fast each kind of device does each kind of work, as measured; what `mmq plan` makes of it is "about".

CUDA: one H100 and one H200, whose quantization phases take the same (docs/measurements/quantization-time.md has the
terms of LLaVA-1.5-7B by GPTQ and AWQ). CPU: of one core of an EPYC with AVX-512, float32. Other devices differ.
"""

from dataclasses import dataclass, replace

import torch

from exporter.device import Device


@dataclass(frozen=True)
class Rates:
    """Work a second.

    passes: floating-point operations of forward passes. squares: of Hessians. solves: multiply-adds of factorizations
    and column loops. weights: weights that are rounded to nearest. search: weights that AWQ finds scales for.
    load: bytes of weights from files to the device. write: bytes of an artifact, packed, hashed and on disk.
    verify: bytes of an artifact. token: blocks of the language model that one generated token passes.
    """

    passes: float
    squares: float
    solves: float
    weights: float
    search: float
    load: float
    write: float
    verify: float
    token: float


CUDA = Rates(2.5e14, 3.9e14, 2e13, 3e9, 3.5e8, 2e9, 7e8, 6e8, 1e3)
CORE = Rates(6e10, 6e10, 2e10, 2e7, 2e6, 1e9, 1e8, 3e7, 1e3)
IMPORTS = 6.0  # seconds until torch, transformers and a processor are there, once they ran on the machine before
BLOCK = 0.06  # seconds a block takes beside its arithmetic: reading, launching, storing
PICTURE = 0.01  # seconds that a processor takes for one picture


def rates(device: Device) -> Rates:
    """The rates of a device: on a CPU those of one core times the threads that torch uses."""
    if device.is_cuda:
        return CUDA
    threads = torch.get_num_threads()
    return replace(
        CORE,
        passes=CORE.passes * threads,
        squares=CORE.squares * threads,
        solves=CORE.solves * threads,
        weights=CORE.weights * threads,
        search=CORE.search * threads,
    )
