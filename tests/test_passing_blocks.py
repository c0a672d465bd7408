"""A model with streamed blocks answers like the whole model, and holds at most one block."""

from pathlib import Path
from typing import Any

import pytest
import torch

from exporter.data import samples
from exporter.errors import CheckpointError
from exporter.model.checkpoint import Checkpoint
from exporter.model.embedded import MODELS
from exporter.model.inference.block_streaming import load_streamed
from exporter.model.inference.predict import prompt_inputs
from exporter.model.processors.processor import load_processor
from exporter.model.source import open_source
from exporter.model.stream import load_whole

CPU = torch.device("cpu")


def inputs_of(folder: Path, family: Any) -> dict[str, torch.Tensor]:
    """One picture with a text."""
    return prompt_inputs(load_processor(folder), family, samples("demo", None, "vqa", "test", 1, 0)[0])


@pytest.mark.parametrize("name", MODELS)
def test_passes_equal_those_of_the_whole_model(name: str) -> None:
    checkpoint, family = open_source(name)
    arguments = (family, checkpoint.config, list(checkpoint.tensors), checkpoint.read, CPU, torch.float32)
    inputs = inputs_of(checkpoint.folder, family)
    passing, whole = load_streamed(*arguments), load_whole(*arguments)
    with torch.inference_mode():
        assert torch.equal(family.outputs(passing, inputs), family.outputs(whole, inputs))
        if family.max_new_tokens:
            answers = [model.generate(**inputs, max_new_tokens=5, do_sample=False) for model in (passing, whole)]
            assert torch.equal(*answers)


def test_at_most_one_block_is_loaded_and_none_stays() -> None:
    checkpoint, family = open_source("demo-llava")
    most = 0

    def read(name: str) -> torch.Tensor:
        nonlocal most
        most = max(most, len(loaded_blocks()))
        return checkpoint.read(name)

    def loaded_blocks() -> set[str]:
        names = [n for n, p in model.named_parameters() if ".layers." in n and not p.is_meta] if model else []
        return {name.rpartition(".layers.")[0] + name.rpartition(".layers.")[2].partition(".")[0] for name in names}

    model: Any = None
    model = load_streamed(family, checkpoint.config, list(checkpoint.tensors), read, CPU, torch.float32)
    with torch.inference_mode():
        model(**inputs_of(checkpoint.folder, family))
    assert most == 1
    assert not loaded_blocks()


@pytest.mark.parametrize("lost", ["language_model.lm_head.weight", "language_model.model.layers.1.mlp.up_proj.weight"])
def test_a_lost_tensor_is_an_error_at_once(lost: str) -> None:
    checkpoint, family = open_source("demo-llava")
    cut = {name: info for name, info in checkpoint.tensors.items() if name != lost}
    assert len(cut) + 1 == len(checkpoint.tensors)
    partial = Checkpoint(checkpoint.folder, checkpoint.config, cut, checkpoint.origin)
    with pytest.raises(CheckpointError, match="1 parameters missing"):
        load_streamed(family, partial.config, list(cut), partial.read, CPU, torch.float32)
