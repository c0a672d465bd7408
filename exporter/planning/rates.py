"""Measured rates at which each kind of device does each kind of work; `mmq plan` predicts durations from them.

CUDA: one H100 and one H200, whose quantization phases take the same time (docs/measurements/quantization-time.md has
the terms for LLaVA-1.5-7B with GPTQ and AWQ). CPU: one core of an EPYC with AVX-512, float32. Other devices differ.
"""

from dataclasses import dataclass, replace

from exporter.device import Device, cpu_threads


@dataclass(frozen=True)
class Rates:
    """Work per second.

    passes: floating-point operations of forward passes. squares: floating-point operations of Hessians. solves:
    multiply-adds of factorizations and column loops. weights: weights rounded to nearest. search: weights for which AWQ
    searches scales. tune: weights that learned rounding rounds and changes, besides its passes. load: bytes of weights
    read from files to the device. write: bytes of an artifact packed, hashed and written. verify: bytes of an artifact
    verified. token: language-model blocks run for one generated token.
    """

    passes: float
    squares: float
    solves: float
    weights: float
    search: float
    tune: float
    load: float
    write: float
    verify: float
    token: float


CUDA = Rates(2.5e14, 3.9e14, 2e13, 3e9, 3.5e8, 2e10, 2e9, 7e8, 6e8, 1e3)
CORE = Rates(6e10, 6e10, 2e10, 2e7, 2e6, 2e7, 1e9, 1e8, 3e7, 1e3)
IMPORTS = 6.0  # seconds to import torch and transformers and load a processor, with a warm page cache
BLOCK = 0.06  # seconds per block besides its arithmetic: reading, launching, storing
PICTURE = 0.01  # seconds of the processor per picture


def rates(device: Device) -> Rates:
    """The rates of a device; on a CPU those of one core times the number of torch's threads."""
    if device.is_cuda:
        return CUDA
    threads = cpu_threads()
    return replace(
        CORE,
        passes=CORE.passes * threads,
        squares=CORE.squares * threads,
        solves=CORE.solves * threads,
        weights=CORE.weights * threads,
        search=CORE.search * threads,
        tune=CORE.tune * threads,
    )
