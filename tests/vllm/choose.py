"""Run by vLLM's interpreter: which kernel it chooses for each question on stdin, as JSON on stdout.

A question is `{"config": quantization_config, "shape": [outputs, inputs], "degree": n, "row_parallel": bool,
"capability": [major, minor] or null for this CPU, "dtype": name, "humming": bool}`, where `humming` says whether
humming-kernels counts as installed; the answer is the name of the kernel's class, or "error: ...". A build for CPUs has
vLLM's rules for GPUs too; what it asks its compiled half is answered here: whether Cutlass multiplies float8.
"""

import json
import sys
import types

import torch
import vllm._custom_ops as compiled
import vllm.model_executor.kernels.linear.mixed_precision.humming as humming
import vllm.model_executor.parameter as parameter
from vllm.config import VllmConfig, set_current_vllm_config
from vllm.model_executor.layers.quantization.compressed_tensors.compressed_tensors import CompressedTensorsConfig
from vllm.platforms.interface import DeviceCapability

parameter.get_tensor_model_parallel_rank = lambda: 0
parameter.get_tensor_model_parallel_world_size = lambda: 1
compiled.cutlass_scaled_mm_supports_fp8 = lambda capability: capability >= 89


def pretend():
    """Every module of vLLM believes in a GPU from here on; the class says which."""
    sys.modules["vllm._C_stable_libtorch"] = types.ModuleType("a CUDA build has it")
    from vllm.platforms.cuda import CudaPlatformBase

    class Card(CudaPlatformBase):
        capability = (9, 0)

        @classmethod
        def get_device_capability(cls, device_id=0):
            return DeviceCapability(*cls.capability)

    for name, module in list(sys.modules.items()):
        if name.startswith("vllm.") and "current_platform" in vars(module):
            module.current_platform = Card()
    return Card


def answer(question):
    """The kernel's class by vLLM's own scheme."""
    humming.has_humming = lambda: question["humming"]
    if card:
        card.capability = tuple(question["capability"])
    rows, columns = question["shape"]
    degree, row_parallel = question["degree"], question["row_parallel"]
    dtype = getattr(torch, question["dtype"])
    settings.model_config = types.SimpleNamespace(dtype=dtype)
    config = CompressedTensorsConfig.from_config(question["config"])
    (scheme,) = config.target_scheme_map.values()
    layer = torch.nn.Module()
    try:
        parts = (scheme["weights"], scheme["input_activations"], None, scheme.get("format"))
        result = config._get_scheme_from_parts(*parts)
        config._check_scheme_supported(result.get_min_capability())
        part = columns // degree if row_parallel else columns
        out = rows if row_parallel else rows // degree
        sizes = {"output_size": rows, "input_size": columns, "output_partition_sizes": [out]}
        sizes |= {"input_size_per_partition": part, "params_dtype": dtype, "weight_loader": print}
        with torch.device("meta"):
            result.create_weights(layer=layer, **sizes)
        kernel = getattr(result, "kernel", None) or getattr(result, "fp8_linear", None) or result.linear_kernel
        return type(kernel).__name__
    except (ValueError, AssertionError, NotImplementedError, RuntimeError) as error:
        return f"error: {type(error).__name__}: {error}"


settings = VllmConfig()
if __name__ == "__main__":
    questions = json.load(sys.stdin)
    with set_current_vllm_config(settings):
        card = pretend() if any(question["capability"] for question in questions) else None
        print(json.dumps([answer(question) for question in questions]))
