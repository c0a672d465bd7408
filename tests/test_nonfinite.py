"""Non-finite activations: excluded from statistics with a note, up to a share of the tokens."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from exporter.device import choose
from exporter.errors import CalibrationError
from exporter.planning.recipe import Rule
from exporter.quantization import calibrate
from exporter.quantization.block import Block
from exporter.quantization.block_calls import BlockCall, ChainInput
from exporter.quantization.block_inputs import BlockInputs, check_excluded, excluded_token_notes, mark_noted
from exporter.quantization.workdir import Workdir
from tests.test_calibrate import LLAVA, RULES, plan_for, streamed, tiny_checkpoint
from tests.test_families import live_model, tiny_inputs
from tests.test_whole_forward import gathered

CPU = torch.device("cpu")


def broken_patch(pictures: int = 1) -> dict[str, Tensor]:
    """Five pictures; one pixel of the first `pictures` of them is infinite."""
    batch = tiny_inputs(LLAVA, 5, 6)
    batch["pixel_values"][:pictures, 0, 0, 0] = float("inf")
    return batch


def test_an_infinite_pixel_excludes_only_its_token_and_adds_a_note(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint = tiny_checkpoint(tmp_path / "model")
    plan, batch = plan_for(checkpoint), broken_patch()
    with gathered(monkeypatch) as hessians:
        workdir = streamed(plan, checkpoint, tmp_path / "work", [batch])
    notes = [note for unit in plan.units for note in workdir.read(unit).notes]
    upstream = "tokens that are not finite upstream of it: 1; they are set to zero"
    assert notes == [
        "vision_tower.vision_model.encoder.layers.0: the inputs of 1 of 85 calibration tokens are not finite; they are "
        "left out from here on",
        f"multi_modal_projector: {upstream}",
        f"language_model.model.layers.0: {upstream}",
    ]
    assert all(torch.isfinite(hessian).all() for hessian in hessians)

    rows: list[Tensor] = []
    model = live_model(LLAVA)
    linear = model.get_submodule(LLAVA.live_name(plan.units[0].rows[0].module))
    linear.register_forward_pre_hook(lambda _, args: rows.append(args[0]))
    with torch.no_grad():
        model(**batch)
    x = rows[0].flatten(0, 1)
    finite = torch.isfinite(x).all(1)
    assert int((~finite).sum()) == 1
    expected = x[finite].T @ x[finite] / int(finite.sum())
    torch.testing.assert_close(hessians[0], expected, rtol=1e-4, atol=1e-4)


def test_a_resumed_run_excludes_the_same_tokens_with_the_same_notes(tmp_path: Path) -> None:
    checkpoint = tiny_checkpoint(tmp_path / "model")
    plan, batch = plan_for(checkpoint), broken_patch()
    first = streamed(plan, checkpoint, tmp_path / "work", [batch])
    whole = [first.read(unit) for unit in plan.units]
    for unit in plan.units[1:]:
        (tmp_path / "work" / unit.file).unlink()
    resumed = streamed(plan, checkpoint, tmp_path / "work", [batch])
    for before, unit in zip(whole, plan.units, strict=True):
        after = resumed.read(unit)
        assert after.notes == before.notes
        for name, linear in before.linears.items():
            assert torch.equal(linear.codes, after.linears[name].codes)


def test_more_than_a_tenth_stops_the_job_with_block_share_and_remedy(tmp_path: Path) -> None:
    checkpoint = tiny_checkpoint(tmp_path / "model")
    batch = tiny_inputs(LLAVA, 5, 6)
    batch["pixel_values"][:, 0, :8, :16] = float("nan")  # two patches of each picture
    with pytest.raises(CalibrationError) as caught:
        streamed(plan_for(checkpoint, RULES[:1]), checkpoint, tmp_path / "work", [batch])
    first = "vision_tower.vision_model.encoder.layers.0"
    assert f"{first}: the activations of 10 of 85 calibration tokens (12%) are not finite" in caught.value.message
    assert caught.value.hint is not None
    assert "--device cpu" in caught.value.hint


class Overflowing(nn.Module):
    """A block whose second linear gets an infinity from inputs above 100."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False)
        self.up.weight.data = torch.eye(4)

    def forward(self, hidden: Tensor) -> Tensor:
        x = self.up(hidden)
        result: Tensor = hidden + self.down(torch.where(x > 100, torch.inf, x))
        return result


def block_of(module: nn.Module, inputs: list[BlockInputs]) -> Block:
    """A live block of a model that is nothing else."""
    modules = {"block": module, "block.up": module.get_submodule("up"), "block.down": module.get_submodule("down")}
    stream = SimpleNamespace(module=modules.__getitem__)
    job: Any = SimpleNamespace(stream=stream, device=choose("cpu"))
    unit: Any = SimpleNamespace(block="block", rows=())
    component: Any = SimpleNamespace(unpadded=frozenset())
    return Block(job, component, unit, inputs)


def inputs_of(hidden: Tensor, weights: Tensor | None = None) -> BlockInputs:
    return BlockInputs.enter(ChainInput(hidden, (BlockCall((), {}, named=False),) * 3), weights, CPU, CPU)


def row_of(linear: str) -> Any:
    rule = Rule(component="language", method="gptq", bits=4)
    return SimpleNamespace(linear=linear, module=f"block.{linear}", rule=rule, tensor=SimpleNamespace(shape=(4, 4)))


def test_rows_that_overflow_inside_a_block_are_excluded_only_for_that_linear() -> None:
    hidden = torch.randn(2, 20, 4)
    hidden[0, 3, 1] = 200.0
    entry = inputs_of(hidden)
    statistics = block_of(Overflowing(), [entry]).gather([row_of("up"), row_of("down")])
    all_rows, finite = hidden.flatten(0, 1), torch.ones(40, dtype=torch.bool)
    finite[3] = False
    torch.testing.assert_close(statistics["up"].hessian, all_rows.T @ all_rows / 40)
    torch.testing.assert_close(statistics["down"].hessian, all_rows[finite].T @ all_rows[finite] / 39)


def test_too_many_rows_that_overflow_inside_a_block_stop_the_job() -> None:
    hidden = torch.randn(2, 20, 4)
    hidden[0, :5, 1] = 200.0
    with pytest.raises(CalibrationError, match="block: the activations of 5 of 40 calibration tokens"):
        block_of(Overflowing(), [inputs_of(hidden)]).gather([row_of("down")])


def test_inputs_whose_squares_overflow_are_an_error() -> None:
    with pytest.raises(CalibrationError, match=r"block\.up: the squares of its inputs overflow float32"):
        block_of(Overflowing(), [inputs_of(torch.full((1, 20, 4), 1e30))]).gather([row_of("up")])


def test_tokens_that_become_nonfinite_have_weight_zero_in_later_blocks() -> None:
    hidden = torch.randn(2, 20, 4)
    hidden[1, 7, 0] = 200.0
    weights = torch.ones(2, 20)
    weights[1, 0] = 0.0  # padding
    entry = inputs_of(hidden, weights)
    entry.advance(Overflowing(), CPU)
    assert torch.equal(entry.hidden[1, 7], torch.zeros(4))
    assert entry.weights is not None
    assert entry.weights[1].tolist() == [float(i not in (0, 7)) for i in range(20)]
    assert (entry.tokens, entry.excluded) == (39, 1)
    assert excluded_token_notes([entry]) == [
        "the inputs of 1 of 39 calibration tokens are not finite; they are left out from here on"
    ]
    mark_noted([entry])
    entry.advance(nn.Identity(), CPU)
    assert entry.excluded == 1
    assert excluded_token_notes([entry]) == []
    check_excluded("block", [entry])


def test_padding_that_is_not_finite_is_cleaned_and_not_counted() -> None:
    hidden = torch.randn(1, 4, 4)
    hidden[0, 0] = float("nan")
    entry = inputs_of(hidden, torch.tensor([[0.0, 1, 1, 1]]))
    assert (entry.tokens, entry.excluded) == (3, 0)
    assert torch.isfinite(entry.hidden).all()


def test_packed_pictures_have_no_batch_axis() -> None:
    hidden = torch.randn(40, 4)
    hidden[3] = float("inf")
    entry = inputs_of(hidden)
    statistics = block_of(Overflowing(), [entry]).gather([row_of("up")])
    rows = hidden[[i for i in range(40) if i != 3]]
    torch.testing.assert_close(statistics["up"].hessian, rows.T @ rows / 39)


def test_compared_outputs_have_no_infinity() -> None:
    hidden = torch.randn(1, 20, 4)
    hidden[0, 3, 1] = 200.0
    (output,) = block_of(Overflowing(), [inputs_of(hidden)]).outputs()
    assert torch.isfinite(output).all()


def test_later_components_get_cleaned_outputs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The tower is not quantized here; one of its tokens would spread over the whole picture."""
    checkpoint = tiny_checkpoint(tmp_path / "model")
    plan = plan_for(checkpoint, (Rule(component="language", method="gptq", bits=4, group_size=32),))
    with gathered(monkeypatch) as hessians:
        workdir = Workdir.open(tmp_path / "w", {})
        calibrate.run(plan, checkpoint, workdir, [broken_patch(2)], choose("cpu"), print)
    assert len(hessians) == 8
    assert all(torch.isfinite(hessian).all() for hessian in hessians)
    notes = [note for unit in plan.units for note in workdir.read(unit).notes]
    assert notes == [f"{plan.units[0].block}: tokens that are not finite upstream of it: 2; they are set to zero"]


def test_too_many_cleaned_tokens_upstream_stop_the_job(tmp_path: Path) -> None:
    checkpoint = tiny_checkpoint(tmp_path / "model")
    plan = plan_for(checkpoint, (Rule(component="language", method="gptq", bits=4, group_size=32),))
    batch = tiny_inputs(LLAVA, 5, 6)
    batch["pixel_values"][:, 0, :8, :16] = float("nan")
    text = r"upstream of language_model\.model\.layers\.0: the activations of 10 of 85 calibration tokens \(12%\)"
    with pytest.raises(CalibrationError, match=text):
        streamed(plan, checkpoint, tmp_path / "work", [batch])


def test_tokens_excluded_between_two_units_are_noted_by_the_second(tmp_path: Path) -> None:
    """The first block of the tower is not quantized, and nothing there could tell."""
    checkpoint = tiny_checkpoint(tmp_path / "model")
    plan = plan_for(checkpoint, (Rule(component="vision", method="gptq", bits=4, group_size=16, blocks="1:2"),))
    workdir = streamed(plan, checkpoint, tmp_path / "work", [broken_patch()])
    (note,) = workdir.read(plan.units[0]).notes
    assert note.startswith("vision_tower.vision_model.encoder.layers.1: the inputs of 1 of 85 calibration tokens")
