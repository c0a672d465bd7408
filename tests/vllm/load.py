"""Run by vLLM's interpreter: whether vLLM keeps the values of packed linears when it loads them, as JSON on stdout.

A question on stdin is `{"config": quantization_config, "bits": n, "rows": [outputs of each fused linear], "columns": n,
"capability": [major, minor]}`. vLLM's own parameters of a GPU with Marlin load random words; an answer is "ok", "zeros"
(the zero points differ from those of the linears), "words" (Marlin's padded weight has another number of words than its
inputs need, and its compiled half refuses it), or "error: ...". With `"degree": n` a linear is divided along its inputs
among n devices; "shards": a device does not get the codes of its own inputs.
"""

import json
import sys
import types

import torch
from choose import pretend, settings
from vllm.config import set_current_vllm_config
from vllm.model_executor.layers.quantization.compressed_tensors.compressed_tensors import CompressedTensorsConfig
from vllm.model_executor.layers.quantization.utils.marlin_utils import marlin_pad_qweight, marlin_padded_nk


def codes(words, bits, count):
    """The first `count` codes of a dense little-endian stream of int32 words along the first dimension."""
    unsigned = words.long() & 0xFFFFFFFF
    stream = torch.stack([(unsigned >> i) & 1 for i in range(32)], 1).flatten(0, 1)[: count * bits]
    return (stream.unflatten(0, (count, bits)) << torch.arange(bits).view(1, -1, 1)).sum(1)


def sharded(question):
    """Whether every one of `degree` devices loads the codes of its inputs."""
    bits, (rows,), columns, degree = (question[key] for key in ("bits", "rows", "columns", "degree"))
    config = CompressedTensorsConfig.from_config(question["config"])
    (scheme,) = config.target_scheme_map.values()
    stored = torch.randint(-(2**31), 2**31, (rows, -(-columns * bits // 32)), dtype=torch.int32)
    own = columns // degree
    for rank in range(degree):
        result = config._get_scheme_from_parts(scheme["weights"], scheme["input_activations"], None, scheme["format"])
        layer = torch.nn.Module()
        sizes = {"output_size": rows, "input_size": columns, "output_partition_sizes": [rows]}
        sizes |= {"input_size_per_partition": own, "params_dtype": torch.bfloat16, "weight_loader": print}
        try:
            result.create_weights(layer=layer, **sizes)
            layer.weight_packed.tp_rank, layer.weight_packed.tp_size = rank, degree
            layer.weight_packed.load_row_parallel_weight(stored)
            loaded = codes(layer.weight_packed.data.T.contiguous(), bits, own)
        except (ValueError, AssertionError, NotImplementedError, RuntimeError, IndexError):
            return "shards"
        if not torch.equal(loaded, codes(stored.T.contiguous(), bits, columns)[rank * own : (rank + 1) * own]):
            return "shards"
    return "ok"


def answer(question):
    """What is left of a linear's values."""
    card.capability = tuple(question["capability"])
    if "degree" in question:
        return sharded(question)
    bits, rows, columns = question["bits"], question["rows"], question["columns"]
    config = CompressedTensorsConfig.from_config(question["config"])
    (scheme,) = config.target_scheme_map.values()
    result = config._get_scheme_from_parts(scheme["weights"], scheme["input_activations"], None, scheme.get("format"))
    layer = torch.nn.Module()
    sizes = {"output_size": sum(rows), "input_size": columns, "output_partition_sizes": rows}
    sizes |= {"input_size_per_partition": columns, "params_dtype": torch.bfloat16, "weight_loader": print}
    try:
        result.create_weights(layer=layer, **sizes)
        members = []
        for i, count in enumerate(rows):
            place = {"shard_offset": sum(rows[:i]), "shard_size": count}
            stored = torch.randint(-(2**31), 2**31, (count, -(-columns * bits // 32)), dtype=torch.int32)
            layer.weight_packed.load_merged_column_weight(stored, **place)
            if hasattr(layer, "weight_zero_point"):
                zeros = torch.randint(-(2**31), 2**31, (-(-count * bits // 32), 1), dtype=torch.int32)
                layer.weight_zero_point.load_merged_column_weight(zeros, **place)
                members.append(codes(zeros, bits, count))
        if members and not torch.equal(codes(layer.weight_zero_point.data, bits, sum(rows)), torch.cat(members)):
            return "zeros"
        padded_rows, padded_columns = marlin_padded_nk(sum(rows), columns, -1)
        weight = layer.weight_packed.data.t().contiguous()
        padded = marlin_pad_qweight(weight, sum(rows), columns, padded_rows, padded_columns)
        return "ok" if padded.shape == (padded_columns * bits // 32, padded_rows) else "words"
    except (ValueError, AssertionError, NotImplementedError, RuntimeError) as error:
        return f"error: {type(error).__name__}: {error}"


if __name__ == "__main__":
    with set_current_vllm_config(settings):
        settings.model_config = types.SimpleNamespace(dtype=torch.bfloat16)
        card = pretend()
        print(json.dumps([answer(question) for question in json.load(sys.stdin)]))
