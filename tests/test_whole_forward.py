"""Statistics gathered block by block equal those of transformers' forward pass of the whole model."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from exporter.device import choose
from exporter.errors import CalibrationError
from exporter.files.shard_writer import ShardWriter
from exporter.methods import gptq
from exporter.model.checkpoint import Checkpoint
from exporter.model.inference.forward_hooks import ForwardStopped, first_output, run_until_stopped
from exporter.planning.plan import Plan
from exporter.planning.recipe import Rule
from exporter.quantization import calibrate
from exporter.quantization.block_calls import _tensors, capture_calls
from exporter.quantization.block_inputs import BlockInputs
from exporter.quantization.workdir import Workdir
from tests.llava_variants import ANY_LLAVA, VARIANTS, inputs_for, llava_config
from tests.slow import some_of
from tests.test_calibrate import plan_for
from tests.test_families import random_weights
from tests.tiny_models import QUICK

RULES = (
    Rule(component="vision", method="gptq", bits=4, group_size=16, options=QUICK["gptq"]),
    Rule(component="projector", method="gptq", bits=8, group_size="row", options=QUICK["gptq"]),
    Rule(component="language", method="gptq", bits=4, group_size=32, options=QUICK["gptq"]),
)
# A mask for every block and for all, grouped heads, a tower with a head, features of several blocks and without blocks
# after them, and a token under another name.
KINDS = (
    "grouped-query",
    "qwen3-sliding",
    "gemma3",
    "siglip-head",
    "layers-out-of-order",
    "first-layer",
    "image-token-id",
)
Batches = list[dict[str, Tensor]]


def whole_model(config: dict[str, Any]) -> nn.Module:
    model = random_weights(ANY_LLAVA.skeleton(config).eval())
    model.tie_weights()
    return model


def checkpoint_of(folder: Path, config: dict[str, Any]) -> Checkpoint:
    """The model of a configuration as a folder, in float32, so that nothing is rounded on the way."""
    folder.mkdir()
    writer = ShardWriter(folder, 10**9)
    for name, parameter in whole_model(config).named_parameters():
        writer.add(ANY_LLAVA.canonical_name(name), parameter.detach().clone())
    writer.finish()
    (folder / "config.json").write_text(json.dumps(config))
    return Checkpoint.open(folder, ANY_LLAVA.canonical_name)


@contextmanager
def gathered(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Tensor]]:
    """The Hessian of every call of GPTQ, in order."""
    hessians: list[Tensor] = []
    quantize_linear = gptq.quantize_linear

    def spy(weight: Tensor, statistics: Any, *rest: Any) -> Any:
        hessians.append(statistics.hessian.clone())
        return quantize_linear(weight, statistics, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(gptq, "quantize_linear", spy)
        yield hessians


def hessian_of_whole(model: nn.Module, module: str, batches: Batches) -> Tensor:
    """Mean of x x^T over all tokens that no mask hides, f32 `[in, in]`, by forward passes of the whole model."""
    rows, linear = [], model.get_submodule(ANY_LLAVA.live_name(module))
    for batch in batches:
        captured: list[Tensor] = []

        def stop(_: nn.Module, args: tuple[Tensor, ...], captured: list[Tensor] = captured) -> None:
            captured.append(args[0])
            raise ForwardStopped

        handle = linear.register_forward_pre_hook(stop)
        with torch.no_grad():
            run_until_stopped(model, **batch, use_cache=False)
        handle.remove()
        x = captured[0]
        real = batch["attention_mask"].bool()
        rows.append(x[real] if module.startswith("language_model") else x.reshape(-1, x.shape[-1]))
    all_rows = torch.cat(rows).double()
    return (all_rows.T @ all_rows / len(all_rows)).float()


def stacks(plan: Plan) -> Iterator[list[str]]:
    """Modules that GPTQ quantizes in one call, in order."""
    for unit in plan.units:
        for phase in ANY_LLAVA.component(unit.component).phases:
            yield [row.module for row in unit.rows if row.linear in phase]


@pytest.mark.parametrize("config", some_of({name: (config,) for name, config in VARIANTS.items()}, KINDS))
def test_statistics_equal_those_of_the_whole_forward_pass(
    config: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint = checkpoint_of(tmp_path / "model", config)
    plan, batches = plan_for(checkpoint, RULES, ANY_LLAVA), [inputs_for(config, 2, 9), inputs_for(config, 3, 14)]
    workdir = Workdir.open(tmp_path / "work", {})
    with gathered(monkeypatch) as hessians:
        calibrate.run(plan, checkpoint, workdir, batches, choose("cpu"), lambda event: None)
    model = whole_model(config)
    results = {name: linear for unit in plan.units for name, linear in workdir.read(unit).linears.items()}
    assert len(hessians) == len(list(stacks(plan)))
    for modules, hessian in zip(stacks(plan), hessians, strict=True):
        whole = hessian_of_whole(model, modules[0], batches)
        assert float((hessian - whole).norm() / whole.norm()) < 1e-5, modules[0]
        for module in modules:
            model.get_submodule(ANY_LLAVA.live_name(module)).weight.data = results[module].as_served()


def text_blocks(model: nn.Module) -> list[nn.Module]:
    return list(model.get_submodule("model.language_model.layers"))


def chained(model: nn.Module, batch: dict[str, Tensor], own: bool) -> Tensor:
    """The output of the last text block, run one by one with their own arguments, or all with those of the first."""
    blocks = text_blocks(model)
    (entered,) = capture_calls(model, blocks, [batch], lambda m, b: m(**b, use_cache=False), "language")
    hidden = entered.hidden
    for call, block in zip(entered.calls, blocks, strict=True):
        with torch.no_grad():
            hidden = first_output((call if own else entered.calls[0])(block, hidden))
    return hidden


@pytest.mark.parametrize("name", ["qwen2-sliding", "qwen3-sliding", "gemma3"])
def test_some_models_give_their_blocks_different_arguments(name: str) -> None:
    """So the test above can fail: with the first block's arguments the result is another."""
    config = VARIANTS[name]
    model, batch = whole_model(config), inputs_for(config, 2, 14)
    outputs: list[Tensor] = []
    handle = text_blocks(model)[-1].register_forward_hook(lambda m, a, output: outputs.append(first_output(output)))
    with torch.no_grad():
        model(**batch, use_cache=False)
    handle.remove()
    assert torch.equal(chained(model, batch, own=True), outputs[0])
    assert float((chained(model, batch, own=False) - outputs[0]).norm() / outputs[0].norm()) > 0.01


class Chain(nn.Module):
    """A model of linear blocks with something between them."""

    def __init__(self, between: str = "", tuples: bool = False) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Step(tuples) for _ in range(3))
        self.between = between

    def forward(self, x: Tensor) -> Tensor:
        bias, mask = torch.zeros(x.shape[-1]), torch.ones(x.shape[-1])
        for i, block in enumerate(self.blocks):
            if self.between == "skips" and i == 1:
                continue
            if self.between == "cache":
                bias = Cache()  # type: ignore[assignment]
            output = block(x, mask=mask, bias=bias)
            x = output[0] if isinstance(output, tuple) else output
            if self.between == "adds":
                x = x + torch.linspace(0, 1, x.shape[-1])
            if self.between == "scales":
                x = x * 2
            if self.between == "mixes":
                x = x + 0.5 * x.mean(-1, keepdim=True)
            if self.between == "writes":
                x += 1
            if self.between == "depends":
                bias = x.mean(dim=(0, 1))
            if self.between == "masks":
                mask *= 0.5
        return x


class Cache:
    """Something that remembers."""


class Step(nn.Module):
    """A block that adds a bias."""

    def __init__(self, tuples: bool) -> None:
        super().__init__()
        self.linear, self.tuples = nn.Linear(4, 4), tuples

    def forward(self, hidden_states: Tensor, mask: Tensor, bias: Tensor) -> Tensor | tuple[Tensor, None]:
        output = self.linear(hidden_states) * mask + bias
        return (output, None) if self.tuples else output


@pytest.mark.parametrize("name", ["llama", "qwen2-sliding", "gemma3"])
def test_arguments_are_stored_once_for_all_blocks(name: str) -> None:
    """A mask and rotary embeddings for each kind of block, and positions."""
    model, batch = whole_model(VARIANTS[name]), inputs_for(VARIANTS[name], 2, 14)
    (entered,) = capture_calls(model, text_blocks(model), [batch], lambda m, b: m(**b, use_cache=False), "language")
    tensors = [tensor for call in entered.calls for tensor in _tensors((call.args, call.kwargs))]
    kinds = 1 if name == "llama" else 2
    assert len({tensor.untyped_storage().data_ptr() for tensor in tensors}) <= 3 * kinds + 1


@pytest.mark.parametrize("tuples", [False, True])
def test_blocks_may_return_tuples(tuples: bool) -> None:
    model, x = Chain(tuples=tuples), torch.randn(2, 3, 4)
    (entered,) = capture_calls(model, list(model.blocks), [{"x": x}], lambda m, b: m(**b), "text")
    hidden = entered.hidden
    for call, block in zip(entered.calls, model.blocks, strict=True):
        hidden = first_output(call(block, hidden))
    assert torch.equal(hidden, model(x))


@pytest.mark.parametrize("tuples", [False, True])
def test_a_model_may_add_to_the_outputs_of_its_blocks(tuples: bool) -> None:
    """As DeepStack does; the sum is that of the model, bit for bit."""
    model, batches = Chain("adds", tuples), [{"x": torch.randn(2, 3, 4)}, {"x": torch.randn(1, 5, 4)}]
    entries = capture_calls(model, list(model.blocks), batches, lambda m, b: m(**b), "text")
    for entered, batch in zip(entries, batches, strict=True):
        inputs = BlockInputs.enter(entered, None, torch.device("cpu"), torch.device("cpu"))
        for block in list(model.blocks)[:-1]:
            inputs.advance(block, torch.device("cpu"))
        last = inputs.output(model.blocks[-1], torch.device("cpu"))
        with torch.no_grad():
            assert torch.equal(last + torch.linspace(0, 1, 4), model(**batch))


@pytest.mark.parametrize(
    ("between", "reason"),
    [
        ("scales", "the model computes the input of block 1 from the output of block 0|the input of block 1 is not"),
        ("mixes", "the model computes the input of block 1 from the output of block 0|the input of block 1 is not"),
        ("writes", "modifies block arguments in place"),
        ("masks", "modifies block arguments in place"),
        ("depends", "arguments of block 1 depend on the output"),
        ("skips", "runs block 2 where block 1 is expected"),
        ("cache", "receives a Cache"),
    ],
)
def test_models_that_are_no_chain_of_blocks_are_refused(between: str, reason: str) -> None:
    model = Chain(between)
    with pytest.raises(CalibrationError, match=f"component 'text' cannot be calibrated block by block: .*{reason}"):
        list(capture_calls(model, list(model.blocks), [{"x": torch.randn(2, 3, 4)}], lambda m, b: m(**b), "text"))


def test_a_batch_that_the_model_cannot_run_is_an_error_without_a_traceback(tmp_path: Path) -> None:
    config = llava_config()
    checkpoint = checkpoint_of(tmp_path / "model", config)
    batch = inputs_for(config, 2, 9)
    batch["input_ids"][0, 3] = 5  # one picture token less than the tower makes features
    plan = plan_for(checkpoint, RULES[2:], ANY_LLAVA)
    reason = "before component 'language': ValueError: Image features and image tokens do not match"
    with pytest.raises(CalibrationError, match=f"forward pass fails on calibration data, {reason}"):
        calibrate.run(plan, checkpoint, Workdir.open(tmp_path / "work", {}), [batch], choose("cpu"), print)


def test_running_out_of_memory_is_not_reported_as_another_error() -> None:
    def run(model: nn.Module, batch: Any) -> None:
        raise torch.OutOfMemoryError("no memory")

    with pytest.raises(torch.OutOfMemoryError):
        list(capture_calls(nn.Linear(1, 1), [nn.Linear(1, 1)], [{}], run, "language"))


def test_hidden_states_of_all_layers_are_not_kept(tmp_path: Path) -> None:
    """LLaVA asks its tower for the output of every layer: stand-ins return what they get, so it is one tensor."""
    model, batch = whole_model(llava_config()), inputs_for(llava_config(), 2, 9)
    blocks = list(model.get_submodule("model.vision_tower.encoder.layers"))
    storages: set[int] = set()
    handles = [block.register_forward_hook(lambda m, a, out: storages.add(out.data_ptr())) for block in blocks]
    next(capture_calls(model, blocks, [batch], lambda m, b: m(**b, use_cache=False), "vision"))
    for handle in handles:
        handle.remove()
    assert len(storages) <= 2  # the input, and one other value that shows whether arguments depend on it


@pytest.mark.parametrize("front", ["vision", "language"])
def test_blocks_after_the_last_quantized_one_are_not_read(front: str, tmp_path: Path) -> None:
    """Of six text blocks the front third is quantized; of the tower, the first of five."""
    deep = llava_config({"num_hidden_layers": 6}, {**VARIANTS["llama"]["vision_config"], "num_hidden_layers": 6})
    checkpoint = checkpoint_of(tmp_path / "model", deep)
    blocks = {"vision": "0:1", "language": "front"}[front]
    plan = plan_for(
        checkpoint, (Rule(component=front, method="gptq", bits=4, group_size=16, blocks=blocks),), ANY_LLAVA
    )
    read: list[str] = []
    whole = checkpoint.read
    checkpoint.read = lambda name: (read.append(name), whole(name))[1]  # type: ignore[assignment, func-returns-value]
    calibrate.run(plan, checkpoint, Workdir.open(tmp_path / "work", {}), [inputs_for(deep, 2, 9)], choose("cpu"), print)
    prefixes = {"vision": "vision_tower.vision_model.encoder.layers.", "language": "language_model.model.layers."}
    numbers = {part: {int(n[len(p) :].split(".")[0]) for n in read if n.startswith(p)} for part, p in prefixes.items()}
    assert (
        numbers == {"vision": {0}, "language": set()}
        if front == "vision"
        else {
            "vision": {0, 1, 2, 3, 4},  # 5 is behind the features that the projector gets
            "language": {0, 1},
        }
    )
    assert not any(name.startswith("language_model.lm_head") for name in read)
    assert any(name.startswith("multi_modal_projector") for name in read) == (front == "language")
    assert max(map(read.count, read)) == 1
