"""Linears that share one scheme, as a quantization config lists them."""

from dataclasses import dataclass

from exporter.numerics.quantized import Scheme


@dataclass(frozen=True)
class Group:
    """scheme, and targets: `re:` patterns or whole names, in the naming of the runtime that reads them."""

    scheme: Scheme
    targets: tuple[str, ...]
