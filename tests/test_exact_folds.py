"""Scales are folded only where the live block computes the same function afterwards; Gemma's norms are refused."""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch

from exporter.device import choose
from exporter.dtypes import DTYPES, Dtype
from exporter.model.checkpoint import Checkpoint
from exporter.model.families import Smoothing
from exporter.planning.plan import Plan
from exporter.planning.recipe import Rule
from exporter.quantization import calibrate
from exporter.quantization import smoothing as smooth
from exporter.quantization.block import Block
from exporter.quantization.block_io import BlockIO
from exporter.quantization.workdir import UnitResult, Workdir
from tests.llava_variants import ANY_LLAVA, VARIANTS, inputs_for
from tests.slow import some, some_of
from tests.test_calibrate import plan_for
from tests.test_whole_forward import checkpoint_of

AWQ = Rule(component="language", method="awq", bits=3, group_size=32)
NORMS = {"input_layernorm", "post_attention_layernorm"}
INEXACT = {
    "llama": set(),
    "mistral": set(),
    "qwen2": set(),
    "qwen3": set(),
    "gemma": NORMS,  # they multiply by 1 + weight
    "gemma2": NORMS,
    "gemma3": NORMS,  # and the second is behind the attention, not before the feed-forward
}


NARROW = {
    f"{name} {dtype}": (name, getattr(torch, dtype))
    for name in ("llama", "gemma")
    for dtype in ("float32", "bfloat16", "float16")
}


def verdicts(config: dict[str, Any], folder: Path) -> tuple[dict[str, bool], Plan, list[UnitResult]]:
    """What the proof says of each smoothing in every block, by source, and the units that come out."""
    checkpoint: Checkpoint = checkpoint_of(folder / "model", config)
    plan, exact = plan_for(checkpoint, (AWQ,), ANY_LLAVA), dict[str, bool]()
    prove = smooth.folds_exactly

    def spy(block: Block, smoothing: Smoothing) -> bool:
        before = {name: block.parameter(name) for name in block.tensors}
        exact[smoothing.source] = exact.get(smoothing.source, True) and prove(block, smoothing)
        assert all(torch.equal(block.parameter(name), tensor) for name, tensor in before.items())
        return exact[smoothing.source]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(smooth, "folds_exactly", spy)
        workdir = Workdir.open(folder / "work", {})
        batches = [inputs_for(config, 2, 9), inputs_for(config, 3, 14)]
        calibrate.run(plan, checkpoint, workdir, batches, choose("cpu"), lambda event: None)
    return exact, plan, [workdir.read(unit) for unit in plan.units]


@pytest.mark.parametrize("name", some(INEXACT, ["llama", "gemma3"]))
def test_norms_that_do_not_multiply_by_their_weight_are_not_folded(name: str, tmp_path: Path) -> None:
    folded_exactly, plan, results = verdicts(VARIANTS[name], tmp_path)
    assert {source for source, exact in folded_exactly.items() if not exact} == INEXACT[name]
    assert {source for source, exact in folded_exactly.items() if exact} >= {"mlp.up_proj"}
    for unit, result in zip(plan.units, results, strict=True):
        refused = [note for note in result.notes if "no scales are moved out of it" in note]
        assert len(refused) == bool(INEXACT[name])
        for note in refused:
            assert note.startswith(f"{unit.block}: input_layernorm, post_attention_layernorm: ")
        if INEXACT[name]:
            assert not any("norm" in tensor for tensor in result.altered)


@pytest.mark.parametrize(("name", "dtype"), some_of(NARROW, ["llama bfloat16", "gemma float16"]))
def test_the_exactness_check_works_in_16_bits_and_with_a_large_residual(
    name: str, dtype: torch.dtype, tmp_path: Path
) -> None:
    """The hidden states are 1000 times as large as what the block adds to them, as massive activations are."""
    checkpoint = checkpoint_of(tmp_path / "model", VARIANTS[name])
    plan = plan_for(checkpoint, (AWQ,), ANY_LLAVA)
    device = choose("cpu")

    class Narrow(type(device)):  # type: ignore[misc]
        def compute_dtype(self, stored: Dtype) -> Dtype:
            return next(known for known in DTYPES.values() if known.torch == dtype)

    narrow = Narrow(device.place, device.name, device.free_bytes)
    workdir = Workdir.open(tmp_path / "work", {})
    with ThreadPoolExecutor(1) as pool:
        job = BlockIO(plan, checkpoint, workdir, narrow, lambda event: None, pool)
        component = ANY_LLAVA.component("language")
        (block, *_) = calibrate.walk(job, component, plan.units[:1], [inputs_for(VARIANTS[name], 2, 9)])
        for entry in block.inputs:
            entry.hidden = entry.hidden * 1000 if dtype != torch.float16 else entry.hidden * 100
        job.stream.load(block.tensors, job.read)
        exact = {s.source: smooth.folds_exactly(block, s) for s in component.smoothings}
    assert exact["mlp.up_proj"]
    assert exact["self_attn.v_proj"]
    assert all(exact[norm] == (name == "llama") for norm in NORMS)
