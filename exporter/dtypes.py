"""Element types of stored tensors, known without torch: plans read headers, and the import of torch takes a second."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

from exporter.lazy_torch import torch

if TYPE_CHECKING:
    from torch import dtype as TorchDtype


@dataclass(frozen=True)
class Dtype:
    """An element type. name: torch's name for it. itemsize: bytes per element."""

    name: str
    itemsize: int
    is_floating_point: bool = False

    @property
    def torch(self) -> "TorchDtype":
        """torch's own object for it."""
        dtype: TorchDtype = getattr(torch, self.name)
        return dtype

    def __str__(self) -> str:
        return self.name


FLOAT32 = Dtype("float32", 4, True)
FLOAT16 = Dtype("float16", 2, True)
BFLOAT16 = Dtype("bfloat16", 2, True)
DTYPES = {  # safetensors' name -> the type
    "F64": Dtype("float64", 8, True),
    "F32": FLOAT32,
    "F16": FLOAT16,
    "BF16": BFLOAT16,
    "F8_E4M3": Dtype("float8_e4m3fn", 1, True),
    "I64": Dtype("int64", 8),
    "I32": Dtype("int32", 4),
    "I16": Dtype("int16", 2),
    "I8": Dtype("int8", 1),
    "U8": Dtype("uint8", 1),
    "BOOL": Dtype("bool", 1),
}
