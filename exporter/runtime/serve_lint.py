"""What vLLM asks of a quantized model, as rules on plain data: no vLLM and no GPU is needed.

Read from vLLM 0.32 and compared with its own functions in `tests/vllm/`. Every problem starts with its rule's name.
"""

from exporter.quantized import Scheme


def engine_class(scheme: Scheme) -> tuple[str, ...]:
    """Classes of vLLM's compressed-tensors loader that a scheme may be given."""
    if scheme.number == "fp8":
        weight_only = "CompressedTensorsW8A16Fp8"  # also what 8.0 cards make of float8 activations
        return ("CompressedTensorsW8A8Fp8", weight_only) if scheme.activations else (weight_only,)
    if scheme.activations == "int8":
        return ("CompressedTensorsW8A8Int8",)
    return ("CompressedTensorsWNA16",)
