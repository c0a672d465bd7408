"""Golden tensors of the artifact formats, packed by the libraries that the formats come from.

    python -m tests.golden.make_formats LIBRARY [FOLDER]

LIBRARY is one of `LIBRARIES`; each wants an environment of its own, with torch, safetensors and transformers 5.19:

- compressed-tensors: `pip install compressed-tensors==0.20.0`
- autoawq: `pip install autoawq==0.2.9`
- gptqmodel: `pip install gptqmodel==7.6.0`
- auto-gptq: no install, its 0.7.1 does not import any more; unpack the wheel and give its folder as FOLDER, one
  file of it is loaded alone.

Writes `LIBRARY.safetensors` beside this file: for every case the codes, scales and zero points that went in and the
tensors that came out. The script stops when our `pack` gives other tensors, or when the library's own reader does not
dequantize to exactly our `dequantize`; so a file that exists is the record that both held.
"""

import importlib.util
import sys
from collections.abc import Callable, Iterator, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from exporter.formats import FORMATS
from exporter.numerics.quantized import QuantizedLinear, Scheme

HERE = Path(__file__).parent
GPTQ = [Scheme(bits, 32) for bits in (2, 3, 4, 8)] + [Scheme(4, "row"), Scheme(3, "row")]
AWQ = [Scheme(4, 32, False), Scheme(4, "row", False), Scheme(4, 32), Scheme(4, 16, False)]
PACKED = [Scheme(bits, 32, symmetric) for bits in range(2, 9) for symmetric in (True, False)]
ROWS = [Scheme(bits, "row", symmetric) for bits in (3, 4, 5) for symmetric in (True, False)]


def linear(scheme: Scheme, rows: int, columns: int) -> QuantizedLinear:
    """Random codes, zero points and float16 scales; every code and zero point may occur."""
    torch.manual_seed(scheme.bits)
    groups = scheme.groups(columns)
    codes = torch.randint(0, scheme.levels + 1, (rows, columns), dtype=torch.uint8)
    zero = torch.randint(0, scheme.levels + 1, (rows, groups), dtype=torch.uint8)
    zero = torch.full_like(zero, scheme.middle) if scheme.symmetric else zero
    return QuantizedLinear(scheme, codes, (torch.rand(rows, groups) + 0.5).half(), zero)


def as_module(q: QuantizedLinear) -> nn.Linear:
    """A float linear that holds what the codes stand for; every packer finds the same codes in it."""
    module = nn.Linear(q.codes.shape[1], q.codes.shape[0], bias=False)
    module.weight.data = q.dequantize()
    return module


def compressed_tensors(q: QuantizedLinear, folder: str) -> tuple[dict[str, Tensor], Tensor]:
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme

    grouped = isinstance(q.scheme.group_size, int)
    args = QuantizationArgs(
        num_bits=q.scheme.bits,
        symmetric=q.scheme.symmetric,
        strategy="group" if grouped else "channel",
        group_size=q.scheme.group_size if grouped else None,
    )
    scheme = QuantizationScheme(targets=["Linear"], weights=args)
    compressor = BaseCompressor.get_value_from_registry("pack-quantized")
    zero = (q.zero.int() - q.scheme.middle).to(torch.int8)
    state = {"weight": q.dequantize(), "weight_scale": q.scale.float(), "weight_zero_point": zero}
    packed = compressor.compress(state, scheme)
    weight = compressor.decompress(packed, scheme)["weight"]
    return {**packed, "weight_scale": q.scale}, weight


def autoawq(q: QuantizedLinear, folder: str) -> tuple[dict[str, Tensor], Tensor]:
    from awq.modules.linear.gemm import WQLinear_GEMM
    from awq.utils.packing_utils import dequantize_gemm

    group = q.scheme.columns_per_group(q.codes.shape[1])
    scales, zeros = q.scale.T.contiguous().float(), q.zero.T.contiguous().float()
    packed = WQLinear_GEMM.from_linear(as_module(q), 4, group, scales=scales, zeros=zeros)
    weight = dequantize_gemm(packed.qweight, packed.qzeros, packed.scales.float(), 4, group).T
    return {"qweight": packed.qweight, "qzeros": packed.qzeros, "scales": packed.scales}, weight


def gptqmodel(q: QuantizedLinear, folder: str) -> tuple[dict[str, Tensor], Tensor]:
    from gptqmodel.nn_modules.qlinear.torch import TorchLinear
    from gptqmodel.quantization import FORMAT, QuantizeConfig
    from gptqmodel.utils.model import convert_gptq_v1_to_v2_format_module, convert_gptq_v2_to_v1_format_module

    rows, columns = q.codes.shape
    group = q.scheme.columns_per_group(columns)
    packed_linear = TorchLinear(q.scheme.bits, group, True, False, columns, rows, format=FORMAT.GPTQ)
    index = torch.arange(columns, dtype=torch.int32) // group
    packed_linear.pack_original(as_module(q), q.scale.float(), q.zero.float(), index)
    config = QuantizeConfig(bits=q.scheme.bits, group_size=group)
    convert_gptq_v2_to_v1_format_module(packed_linear, config)
    tensors = {name: getattr(packed_linear, name).clone() for name in ("qweight", "qzeros", "scales", "g_idx")}
    convert_gptq_v1_to_v2_format_module(packed_linear, q.scheme.bits, torch.int32)
    packed_linear.post_init()
    return tensors, packed_linear.eval().dequantize_weight().T


def auto_gptq(q: QuantizedLinear, folder: str) -> tuple[dict[str, Tensor], Tensor]:
    path = Path(folder) / "auto_gptq/nn_modules/qlinear/qlinear_cuda_old.py"
    spec = importlib.util.spec_from_file_location("qlinear_cuda_old", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    rows, columns = q.codes.shape
    group = q.scheme.columns_per_group(columns)
    packed_linear = module.QuantLinear(q.scheme.bits, group, columns, rows, bias=False, weight_dtype=torch.float32)
    packed_linear.pack(as_module(q), q.scale.float(), q.zero.float(), None)
    tensors = {name: getattr(packed_linear, name) for name in ("qweight", "qzeros", "g_idx")}
    return {**tensors, "scales": packed_linear.scales.half()}, packed_linear(torch.eye(columns)).T


Packer = Callable[[QuantizedLinear, str], tuple[dict[str, Tensor], Tensor]]
# name -> our format, their packer and reader, version, cases
LIBRARIES: dict[str, tuple[str, Packer, str, list[tuple[Scheme, int, int]]]] = {
    "compressed-tensors": (
        "compressed_tensors",
        compressed_tensors,
        "",
        [(scheme, 20, 64) for scheme in PACKED] + [(scheme, 5, 37) for scheme in ROWS],
    ),
    "autoawq": ("awq", autoawq, "", [(scheme, 32, 64) for scheme in AWQ]),
    "gptqmodel": ("gptq", gptqmodel, "", [(scheme, 32, 64) for scheme in GPTQ]),
    "auto-gptq": ("gptq", auto_gptq, "0.7.1", [(scheme, 32, 64) for scheme in GPTQ]),
}


def cases(library: str, folder: str) -> Iterator[tuple[str, QuantizedLinear, Mapping[str, Tensor]]]:
    """Label, what went in and what came out of every case, checked against our packer and dequantize."""
    format_name, packer, _, schemes = LIBRARIES[library]
    module: Any = FORMATS[format_name]
    for scheme, rows, columns in schemes:
        q = linear(scheme, rows, columns)
        tensors, weight = packer(q, folder)
        assert torch.equal(weight.float(), q.dequantize().to(weight.dtype).float()), (library, scheme)
        packed = module.pack("x", q)
        assert packed.keys() == {f"x.{name}" for name in tensors}, (library, scheme, tensors.keys())
        for name, tensor in tensors.items():
            same = packed[f"x.{name}"].dtype == tensor.dtype and torch.equal(packed[f"x.{name}"], tensor)
            assert same, (library, scheme, name)
        label = f"{scheme.bits}-{scheme.group_size}-{'sym' if scheme.symmetric else 'asym'}-{rows}x{columns}"
        yield label, q, tensors


def main(library: str, folder: str = "") -> None:
    written = LIBRARIES[library][2] or version(library)
    all_tensors: dict[str, Tensor] = {}
    for label, q, tensors in cases(library, folder):
        inputs = {"in.codes": q.codes, "in.scale": q.scale, "in.zero": q.zero}
        all_tensors |= {f"{label}/{name}": tensor.contiguous().clone() for name, tensor in (inputs | tensors).items()}
    # One key only: safetensors writes several in any order, and the file could not be made again byte for byte.
    note = {"made_by": f"{library} {written}; its reader dequantized to our values"}
    save_file(all_tensors, HERE / f"{library}.safetensors", metadata=note)


if __name__ == "__main__":
    main(*sys.argv[1:])
