"""Run by vLLM's interpreter: what its own matching gives to each question on stdin, as JSON on stdout.

A question is `{"engine": name, "targets": [...], "ignore": [...], "fused": {fused: members}}`; the answer is the target
that names the linear, null when none does, or "error: ...".
"""

import json
import sys

import torch
from vllm.model_executor.layers.quantization.compressed_tensors.utils import find_matched_target, should_ignore_layer


def answer(question):
    """The first target by vLLM, after its `ignore`."""
    name, fused = question["engine"], question["fused"]
    try:
        if should_ignore_layer(name, question["ignore"], fused):
            return None
        return find_matched_target(name, torch.nn.Linear(1, 1), question["targets"], fused)
    except ValueError as error:
        return f"error: {error}"


print(json.dumps([answer(question) for question in json.load(sys.stdin)]))
