"""Groups of linear layers that share one scheme, as in a quantization config."""

from dataclasses import dataclass

from exporter.numerics.quantized import Scheme


@dataclass(frozen=True)
class Group:
    """One group. targets: `re:` patterns or full names of linear layers, in the naming of the engine."""

    scheme: Scheme
    targets: tuple[str, ...]
