"""`ConfigGroup`: linears that share one scheme, as a quantization config lists them."""

from dataclasses import dataclass

from exporter.numerics.quantized import Scheme


@dataclass(frozen=True)
class ConfigGroup:
    """A scheme, and its targets: `re:` patterns or exact names, in the reading runtime's naming."""

    scheme: Scheme
    targets: tuple[str, ...]
