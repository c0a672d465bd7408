"""GPTQ on weights corrected for earlier errors: the fit in float64, the share, the two streams, resuming."""

import re
from pathlib import Path

import pytest
import torch
from torch import Tensor

from exporter.methods.gptq import inverse_factor
from exporter.numerics import hessian
from exporter.numerics import mismatch as mismatch_
from exporter.numerics.hessian import Statistics
from exporter.numerics.mismatch import Mismatch, fitting_share
from exporter.planning.memory import _correction
from exporter.planning.rule import Rule
from exporter.quantization import calibrate
from exporter.quantization.block_calls import BlockCall, ChainInput
from exporter.quantization.block_inputs import BlockInputs
from exporter.quantization.correction import Correction
from exporter.quantization.source_stream import SourceStream
from exporter.quantization.workdir import Workdir
from tests.test_batch_rounds import CPU, ONE, TWO
from tests.test_calibrate import LLAVA, plan_for, streamed, tiny_checkpoint
from tests.test_families import live_model
from tests.test_learned_rounding import check_resumed_runs, learned_batches
from tests.test_whole_model import LiveMemory

CORRECTED = tuple(
    Rule(component=name, method="gptq", bits=2, group_size=16, options={"correct": True})
    for name in ("vision", "language")
)


def rows_of(count: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Inputs of the full-precision model, related ones of a quantized model, and weights."""
    random = torch.Generator().manual_seed(seed)
    full = torch.randn(count, 12, generator=random) @ torch.randn(12, 12, generator=torch.Generator().manual_seed(9))
    rows = full @ (torch.eye(12) * 0.9) + 0.3 * torch.randn(count, 12, generator=random)
    return full, rows, torch.rand(count, generator=random)


@pytest.mark.parametrize("outputs", [7, 20])
def test_the_shift_is_the_damped_least_squares_fit(outputs: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hessian, "STRIP", 5)
    monkeypatch.setattr(mismatch_, "PIECE", 5)
    full, rows, weights = rows_of(90, 0)
    weight = torch.randn(outputs, 12, generator=torch.Generator().manual_seed(1))
    statistics, mismatch = Statistics(12, torch.device("cpu")), Mismatch(12, torch.device("cpu"))
    for part in (slice(0, 40), slice(40, 40), slice(40, 90)):
        statistics.update(rows[part], weights[part])
        mismatch.update(full[part], rows[part], weights[part])
    upper, _ = inverse_factor(statistics.hessian, 0.01)
    x, y, w = (tensor.double() for tensor in (full, rows, weights.unsqueeze(1)))
    moment = (w * y).T @ y / 90
    damped = moment + 0.01 * moment.diagonal().mean() * torch.eye(12)
    expected = weight.double() @ ((w * (x - y)).T @ y / 90) @ damped.inverse()
    assert upper is not None
    assert torch.allclose(mismatch.shift(weight, upper).double(), expected, atol=1e-4 * float(expected.abs().max()))


def test_the_share_minimizes_the_error_of_the_outputs() -> None:
    full, rows, weights = rows_of(60, 3)
    random = torch.Generator().manual_seed(1)
    weight, shift = torch.randn(7, 12, generator=random), 0.1 * torch.randn(7, 12, generator=random)
    shift = shift + 0.05 * weight

    def error(share: float) -> float:
        wrong = full @ weight.T - rows @ (weight + share * shift).T
        return float((wrong.square() * weights.unsqueeze(1)).sum())

    share = fitting_share(weight, shift, [(full[:25], rows[:25], weights[:25]), (full[25:], rows[25:], weights[25:])])
    assert 0 < share < 1
    assert share == pytest.approx(min((error(s / 1000), s / 1000) for s in range(1001))[1], abs=2e-3)
    assert fitting_share(weight, -shift, [(full, rows, None)]) == 0.0
    assert fitting_share(weight, 0.01 * shift, [(full, rows, None)]) == 1.0
    assert fitting_share(weight, shift, []) == 0.0


@pytest.mark.parametrize(("width", "outputs", "rows"), [(1536, 64, 20), (64, 6000, 400), (128, 5000, 20)])
def test_a_correction_needs_the_predicted_memory(width: int, outputs: int, rows: int) -> None:
    """The tensors that are alive while weights are corrected, beside the weights, the Hessian and the mismatch."""
    block, other = (torch.nn.Linear(width, outputs, bias=False) for _ in range(2))
    call = BlockCall((), {}, named=False)
    own, full = (
        [BlockInputs.enter(ChainInput(torch.randn(1, rows, width), (call,)), None, CPU, CPU) for _ in range(8)]
        for _ in range(2)
    )
    source = SourceStream(full, CPU, weights=dict(other.named_parameters()))
    correcting, statistics = Correction(source, own, block, block, False, 0.01), Statistics(width, CPU)
    for entry in own:
        statistics.update(entry.hidden[0])
    correcting.add_all()
    with torch.no_grad(), LiveMemory(block) as memory:
        correcting.corrected(block.weight.detach(), statistics)
    size = width * outputs
    steps = _correction(width, size, rows, 4, batch=0)
    beside = 4 * (size + 2 * width * width)
    expected = max(steps["factor"], steps["shift"], steps["share"] + 4 * width * width) - beside
    assert 0.6 * expected < memory.peak < 1.1 * expected, (expected, memory.peak)


def test_both_streams_are_those_of_whole_models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The rows that a correction compares, beside forward passes of the source and of the quantized model."""
    checkpoint, received = tiny_checkpoint(tmp_path / "model"), []
    update = Mismatch.update

    def record(self: Mismatch, full: Tensor, rows: Tensor, weights: Tensor | None) -> None:
        received.append((full.clone(), rows.clone()))
        update(self, full, rows, weights)

    monkeypatch.setattr(Mismatch, "update", record)
    plan, batches = plan_for(checkpoint, CORRECTED), learned_batches()
    workdir = streamed(plan, checkpoint, tmp_path / "work", batches)
    module = LLAVA.live_name(f"{plan.units[-1].block}.mlp.down_proj")
    models = [live_model(LLAVA), live_model(LLAVA)]
    for unit in plan.units:
        for name, linear in workdir.read(unit).linears.items():
            models[1].get_submodule(LLAVA.live_name(name)).weight.data = linear.dequantize()
    for (full, rows), batch in zip(received[-4:], batches, strict=False):  # the last linear, on the batches of the fit
        for model, part in zip(models, (full, rows), strict=True):
            inputs: list[Tensor] = []
            handle = model.get_submodule(module).register_forward_pre_hook(
                lambda _, a, inputs=inputs: inputs.append(a[0])
            )
            with torch.no_grad():
                model(**batch)
            handle.remove()
            assert torch.allclose(inputs[0][batch["attention_mask"].bool()], part, atol=1e-4)
    assert float((received[-4][0] - received[-4][1]).norm() / received[-4][0].norm()) > 0.01


def test_a_stopped_run_resumes_with_the_same_bytes(tmp_path: Path) -> None:
    check_resumed_runs(tmp_path, CORRECTED)


def test_the_share_is_reported_and_is_0_without_held_out_batches(tmp_path: Path) -> None:
    checkpoint = tiny_checkpoint(tmp_path / "model")
    corrected, plain = (
        plan_for(checkpoint, (rule,)) for rule in (CORRECTED[1], CORRECTED[1].model_copy(update={"options": {}}))
    )
    few, many = learned_batches()[:3], learned_batches()
    _, notes = streamed(corrected, checkpoint, tmp_path / "few", few).read_notes(corrected.units[1])
    assert notes[-1].endswith("self_attn.q_proj 0.00, self_attn.o_proj 0.00, mlp.gate_proj 0.00, mlp.down_proj 0.00")
    unit = corrected.units[1]
    same = streamed(plain, checkpoint, tmp_path / "plain", few).read(unit).linears
    for name, linear in (
        Workdir(tmp_path / "few", Workdir.open(tmp_path / "few", {"test": 1}).fingerprint).read(unit).linears.items()
    ):
        assert torch.equal(linear.codes, same[name].codes)
    _, notes = streamed(corrected, checkpoint, tmp_path / "many", many).read_notes(unit)
    assert "q_proj 0.00" not in notes[-1]


def test_several_devices_correct_as_one_does(tmp_path: Path) -> None:
    """With more devices the full-precision inputs are gathered in passes of their own."""
    checkpoint = tiny_checkpoint(tmp_path / "model")
    plan, batches, shares = plan_for(checkpoint, (CORRECTED[1],)), learned_batches(), []
    for name, device in (("one", ONE), ("two", TWO)):
        workdir = Workdir.open(tmp_path / name, {"test": 1})
        calibrate.run(plan, checkpoint, workdir, batches, device, lambda event: None)
        notes = [workdir.read_notes(unit)[1][-1] for unit in plan.units]
        shares.append([float(share) for note in notes for share in re.findall(r" ([01]\.\d\d)", note)])
    assert max(shares[0]) > 0
    assert shares[1] == pytest.approx(shares[0], abs=0.02)
