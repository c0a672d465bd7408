"""Learned rounding: the start, each step against automatic differentiation, the blocks, and resuming."""

from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from torch import Tensor

from exporter.device import choose
from exporter.methods import METHODS, autoround, gptq
from exporter.numerics import learned_rounding
from exporter.numerics.hessian import Statistics
from exporter.numerics.learned_rounding import LearnedLinear
from exporter.numerics.quantized import QuantizedLinear, Scheme, expand_groups, quantize
from exporter.numerics.ranges import fit_scale
from exporter.planning import memory
from exporter.planning.rule import Rule
from exporter.quantization import calibrate
from exporter.quantization.block_rounding import Learner
from exporter.quantization.source_stream import split_batches
from exporter.quantization.workdir import Workdir
from tests.test_calibrate import LLAVA, plan_for, streamed, tiny_checkpoint
from tests.test_families import live_model, tiny_inputs
from tests.test_whole_model import LiveMemory

SCHEMES = [Scheme(bits, group, symmetric) for bits in (2, 3, 4) for group in (16, "row") for symmetric in (True, False)]
schemes = pytest.mark.parametrize("scheme", SCHEMES, ids=Scheme.label)
LEARNED = (
    Rule(component="vision", method="autoround", bits=3, group_size=16, options={"steps": 3}),
    Rule(component="projector", method="autoround", bits=3, group_size="row", options={"steps": 3}),
    Rule(component="language", method="gptq", bits=3, group_size=16, symmetric=False, options={"steps": 3}),
)


def start_of(weight: Tensor, scheme: Scheme, method: str = "autoround") -> QuantizedLinear:
    """A quantized linear to start from, with inputs of unequal sizes."""
    statistics = Statistics(weight.shape[1], torch.device("cpu"))
    inputs = torch.randn(200, weight.shape[1], generator=torch.Generator().manual_seed(1))
    statistics.update(inputs * torch.linspace(0.2, 3, weight.shape[1]))
    options = METHODS[method].Options(**({"range": "signed"} if method == "gptq" and scheme.symmetric else {}))
    return METHODS[method].quantize_linear(weight, statistics, scheme, options, torch.bfloat16)[0]


def random_weight(rows: int = 24, columns: int = 40) -> Tensor:
    """f32 `[rows, columns]`; its last group of 16 is short."""
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(0)) * 0.1


@schemes
@pytest.mark.parametrize("method", ["autoround", "gptq"])
def test_the_start_is_reproduced(scheme: Scheme, method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(learned_rounding, "PIECE", 5 * 40)  # several pieces of rows
    weight = random_weight()
    start = start_of(weight, scheme, method)
    quantized = LearnedLinear(weight, start).quantized()
    assert torch.equal(quantized.codes, start.codes)
    assert torch.equal(quantized.scale, start.scale)
    assert torch.equal(quantized.zero, start.zero)


def rounded(x: Tensor) -> Tensor:
    """round(x) with the gradient of x."""
    return x + (x.round() - x).detach()


def by_autograd(
    weight: Tensor, start: QuantizedLinear, offset: Tensor, low: Tensor, high: Tensor, gradient: Tensor
) -> list[Tensor]:
    """Gradients with respect to offsets and ends of ranges, from the formula of the published method in float64."""
    scheme, columns = start.scheme, weight.shape[1]
    variables = [tensor.double().requires_grad_() for tensor in (offset, low, high)]
    offset, low, high = variables
    scale, zero = start.scale.double(), start.zero.double()
    if scheme.symmetric:
        steps, zeros = scale * low, zero
    else:
        least, most = -zero * scale, (scheme.levels - zero) * scale
        steps = (most * high - least * low) / scheme.levels
        steps = steps + (steps.detach().to(torch.bfloat16).double() - steps.detach())  # as stored
        zeros = rounded(-least * low / steps).clamp(0, scheme.levels)
    s, z = (expand_groups(t, columns, scheme) for t in (steps, zeros))
    codes = (rounded(weight.double() / s + offset) + z).clamp(0, scheme.levels)
    ((codes - z) * s).backward(gradient.double())
    return [torch.zeros_like(v) if v.grad is None else v.grad for v in variables]


@schemes
def test_a_step_follows_the_sign_of_the_gradient(scheme: Scheme) -> None:
    weight, rate = random_weight(), 0.03
    start = start_of(weight, scheme)
    learned = LearnedLinear(weight, start)
    offset, low, high = learned._offset.clone(), learned._low.clone(), learned._high.clone()
    gradient = torch.randn(weight.shape, generator=torch.Generator().manual_seed(2))
    learned.step(gradient, rate, rate / 2)
    expected = by_autograd(weight, start, offset, low, high, gradient)
    assert torch.allclose(learned._offset, offset - rate * expected[0].sign().float(), atol=1e-6)
    assert (expected[0] == 0).any() == bool((learned._offset == offset).any())  # clipped codes stay
    certain = [part.abs() > 1e-4 * part.abs().amax() for part in expected[1:]]
    moved = [low - rate / 2 * expected[1].sign().float(), high - rate / 2 * expected[2].sign().float()]
    assert torch.allclose(learned._low[certain[0]], moved[0][certain[0]])
    assert certain[0].float().mean() > 0.95
    if not scheme.symmetric:
        assert torch.allclose(learned._high[certain[1]], moved[1][certain[1]])


def test_a_gradient_that_is_not_finite_moves_nothing() -> None:
    weight = random_weight()
    learned = LearnedLinear(weight, start_of(weight, Scheme(3, 16)))
    before = learned.quantized()
    learned.step(torch.full(weight.shape, torch.nan), 0.5, 0.5)
    assert torch.equal(learned.quantized().codes, before.codes)


def test_signed_ranges_move_the_additional_code() -> None:
    """Codes -2, -1, 0, 1: a group whose largest weight is positive needs a negative scale."""
    weight, scheme = torch.tensor([[2.0, 1.0, 0.0, -1.0], [-2.0, -1.0, 0.0, 1.0]]), Scheme(2, "row")
    scale, zero = fit_scale(weight, scheme, torch.bfloat16, "signed")
    linear = QuantizedLinear(scheme, quantize(weight, scale, zero, scheme), scale, zero)
    assert scale[0] < 0 < scale[1]
    assert torch.allclose(linear.dequantize(), weight, atol=0.15)
    plain, _ = fit_scale(weight, scheme, torch.bfloat16, "mse")
    assert (plain > 0).all()


@pytest.mark.parametrize("importance", [None, torch.linspace(0.1, 2, 40)], ids=["plain", "weighted"])
def test_signed_ranges_are_never_worse(importance: Tensor | None) -> None:
    weight = random_weight()
    for scheme in (Scheme(2, 16), Scheme(3, "row"), Scheme(2, "tensor"), Scheme(3, 16, symmetric=False)):
        errors = []
        for range_ in ("mse", "signed"):
            scale, zero = fit_scale(weight, scheme, torch.float32, range_, importance)
            wrong = QuantizedLinear(scheme, quantize(weight, scale, zero, scheme), scale, zero).dequantize() - weight
            power = wrong.square() if importance is None else wrong.abs() ** 2.5 * importance
            errors.append(float(power.sum()))
        assert errors[1] <= errors[0] * (1 + 1e-6)
        assert errors[1] < errors[0] or not scheme.symmetric


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        ({"method": "autoround", "bits": 8, "number": "fp8"}, "learned rounding needs"),
        ({"method": "autoround", "bits": 4, "group_size": "tensor"}, "learned rounding needs"),
        ({"method": "gptq", "bits": 8, "activations": "int8", "options": {"steps": 5}}, "learned rounding needs"),
        ({"method": "rtn", "bits": 8, "activations": "int8", "options": {"range": "signed"}}, "range: signed needs"),
        ({"method": "autoround", "bits": 3, "options": {"steps": 0}}, "steps"),
    ],
)
def test_schemes_that_cannot_be_learned_are_refused(rule: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Rule(component="language", **rule)


def learned_batches() -> list[dict[str, Tensor]]:
    """Batches of different lengths, so that padding counts."""
    return [tiny_inputs(LLAVA, 2 + i % 3, 6 + i) for i in range(5)]


def content(file: Path) -> tuple[dict[str, str], dict[str, bytes]]:
    """Metadata and tensors of a unit's file, whose header has no fixed order."""
    with safe_open(file, framework="pt") as opened:
        tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118 (no mapping)
        return opened.metadata(), {name: t.view(torch.uint8).numpy().tobytes() for name, t in tensors.items()}


def check_resumed_runs(folder: Path, rules: tuple[Rule, ...]) -> None:
    """Quantize a tiny model with these rules; runs that stopped after any unit resume with the same bytes."""
    checkpoint = tiny_checkpoint(folder / "model")
    plan = plan_for(checkpoint, rules)
    whole = streamed(plan, checkpoint, folder / "whole", learned_batches())
    for kept in range(1, len(plan.units)):
        work = folder / f"work{kept}"
        resumed = Workdir.open(work, {"test": 1})
        for unit in plan.units[:kept]:
            (work / unit.file).write_bytes((whole.path / unit.file).read_bytes())
        calibrate.run(plan, checkpoint, resumed, learned_batches(), choose("cpu"), lambda event: None)
        for unit in plan.units:
            assert content(work / unit.file) == content(whole.path / unit.file), (kept, unit.block)


def test_a_stopped_run_resumes_with_the_same_bytes(tmp_path: Path) -> None:
    check_resumed_runs(tmp_path, LEARNED)


def test_blocks_aim_at_the_full_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The target of every block is its output in the full-precision model, whatever was quantized before it."""
    checkpoint, targets = tiny_checkpoint(tmp_path / "model"), {}
    plan, batches = plan_for(checkpoint, LEARNED), learned_batches()
    error = Learner.error

    def see(learner: Learner, numbers: list[int]) -> float:
        targets[learner.block.unit.block] = list(learner.targets)
        return error(learner, numbers)

    monkeypatch.setattr(Learner, "error", see)
    streamed(plan, checkpoint, tmp_path / "work", batches)
    model = live_model(LLAVA)
    assert len(targets) == len(plan.units)
    for block, outputs in targets.items():
        for batch, target in zip(batches, outputs, strict=True):
            seen: list[Tensor] = []
            module = model.get_submodule(LLAVA.live_name(block))
            handle = module.register_forward_hook(
                lambda _m, _a, output, seen=seen: seen.append(output[0] if isinstance(output, tuple) else output)
            )
            with torch.no_grad():
                model(**batch)
            handle.remove()
            assert torch.allclose(seen[0], target, atol=1e-4), block


def test_learning_reduces_the_error_of_unseen_outputs(tmp_path: Path) -> None:
    checkpoint = tiny_checkpoint(tmp_path / "model")
    rule = Rule(component="language", method="autoround", bits=2, group_size=16, options={"steps": 60})
    plan = plan_for(checkpoint, (rule,))
    workdir = streamed(plan, checkpoint, tmp_path / "work", learned_batches())
    for unit in plan.units:
        _, notes = workdir.read_notes(unit)
        (note,) = [note for note in notes if "learned rounding" in note]
        before, after = (float(part.split()[0]) for part in note.split("outputs ")[1].replace("then ", "").split(", "))
        assert after < 0.97 * before, note


def test_held_out_batches() -> None:
    assert split_batches(3) == ([0, 1, 2], [])
    assert split_batches(4) == ([0, 1, 2], [3])
    assert split_batches(17)[1] == [7, 15]
    for count in range(40):
        fitted, held_out = split_batches(count)
        assert sorted(fitted + held_out) == list(range(count))


def test_padding_does_not_change_what_is_learned(tmp_path: Path) -> None:
    checkpoint = tiny_checkpoint(tmp_path / "model")
    plan = plan_for(checkpoint, LEARNED[-1:])
    batches, others = learned_batches(), learned_batches()
    for other in others:
        other["input_ids"][~other["attention_mask"].bool()] = 77  # only tokens that the mask hides
    first = streamed(plan, checkpoint, tmp_path / "a", batches)
    second = streamed(plan, checkpoint, tmp_path / "b", others)
    for unit in plan.units:
        for name, linear in first.read(unit).linears.items():
            assert torch.equal(linear.codes, second.read(unit).linears[name].codes), name


def test_options_have_the_published_rate() -> None:
    assert autoround.Options().learning_rate == pytest.approx(1 / 200)
    assert autoround.Options(rate=0.02).learning_rate == 0.02
    assert gptq.Options(steps=50).learning_rate == pytest.approx(1 / 50)
    assert gptq.Options().learned_steps == 0


def owned(*tensors: Tensor) -> torch.nn.Module:
    """A module that has these tensors, for `LiveMemory`."""
    module = torch.nn.Module()
    for i, tensor in enumerate(tensors):
        module.register_buffer(f"tensor{i}", tensor)
    return module


def test_a_linear_needs_the_predicted_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Bytes per weight of tensors that stay, and of the temporaries of a step, for a linear of more than a piece."""
    weight = random_weight(256, 512)
    monkeypatch.setattr(learned_rounding, "PIECE", weight.numel() * 4 // 5)
    start = start_of(weight, Scheme(3, "row"))
    gradient = torch.ones_like(weight)
    with torch.no_grad(), LiveMemory(owned(weight, gradient, start.codes, start.scale, start.zero)) as alive:
        learned = LearnedLinear(weight, start)
        kept = alive.peak = alive._now
        learned.step(gradient, 0.01, 0.01)
    assert kept / weight.numel() == pytest.approx(memory.OFFSET_BYTES, rel=0.02)
    assert memory.LEARNED_BYTES - 1.5 < (alive.peak - kept) / weight.numel() <= memory.LEARNED_BYTES


def test_a_step_needs_the_predicted_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Outputs inside a block that a backward pass holds, beside weights and gradients, over those of a forward one."""
    checkpoint = tiny_checkpoint(tmp_path / "model")
    rule = Rule(component="language", method="autoround", bits=3, group_size=16, options={"steps": 1})
    plan, step, ratios = plan_for(checkpoint, (rule,)), Learner.step, list[float]()

    def measured(learner: Learner, number: int, rounding: float, ranges: float) -> None:
        linears, block = learner.linears.values(), learner.block
        states = [t for x in linears for t in (x._source, x._scale, x._zero, x._low, x._high, x._offset)]
        hidden = block.inputs[number].hidden
        known = [*block.module.parameters(), *block.module.buffers(), *learner.targets, *learner.weights, hidden]
        with LiveMemory(owned(*known, *states)) as alive:
            step(learner, number, rounding, ranges)
        tokens = hidden.shape[0] * hidden.shape[1]
        elements = memory.pass_elements(checkpoint.tensors, block.component, checkpoint.config)
        forward = 4 * elements * tokens / block.component.tokens(checkpoint.config)
        ratios.append((alive.peak - 2 * 4 * sum(x._source.numel() for x in linears)) / forward)

    monkeypatch.setattr(Learner, "step", measured)
    streamed(plan, checkpoint, tmp_path / "work", [tiny_inputs(LLAVA, 4, 300)] * 2)  # far more activations than weights
    assert len(ratios) == len(plan.units)
    assert all(memory.BACKWARD - 0.5 < ratio <= memory.BACKWARD for ratio in ratios), ratios
