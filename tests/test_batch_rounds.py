"""Devices that share the calibration batches: statistics and outputs equal those of one device."""

import threading
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from exporter import device as device_module
from exporter.device import Device, choose
from exporter.errors import PlanError
from exporter.model.families import FAMILIES, Family
from exporter.numerics.hessian import Statistics
from exporter.numerics.quantized import QuantizedLinear
from exporter.planning.plan import PlanRow
from exporter.quantization import calibrate, identity
from exporter.quantization.batch_rounds import PlacedBlock, by_batch, placed_blocks
from exporter.quantization.block import Block
from exporter.quantization.block_calls import BlockCall, ChainInput
from exporter.quantization.block_inputs import BlockInputs
from exporter.quantization.workdir import Workdir
from tests.test_calibrate import RULES_OF, batches_for, plan_for, tiny_checkpoint

CPU = torch.device("cpu")
META = torch.device("meta")
ONE = Device("cpu", "CPU", 2**34)
TWO = replace(ONE, others=("cpu",))
THREE = replace(ONE, others=("cpu", "cpu"))
PHASES = {"llava": 16, "blip2": 33, "blip2-itm": 32}  # of all blocks that GPTQ quantizes


@pytest.mark.parametrize(
    ("family", "device"),
    [
        pytest.param(FAMILIES[name], device, id=f"{name}-{label}", marks=() if fast else pytest.mark.slow)
        for name, label, device, fast in (
            ("llava", "two", TWO, False),
            ("llava", "three", THREE, True),
            ("blip2", "two", TWO, False),
            ("blip2", "three", THREE, False),
            ("blip2-itm", "two", TWO, True),
            ("blip2-itm", "three", THREE, False),
        )
    ],
)
def test_statistics_of_several_devices_equal_those_of_one(
    family: Family, device: Device, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In every phase of every block, also after quantized blocks and on padded batches of different sizes."""
    gather_shared, compared = Block.gather, []

    def gather(block: Block, rows: Sequence[PlanRow]) -> dict[str, Any]:
        several = gather_shared(block, rows)
        with monkeypatch.context() as patch:
            patch.setattr(block.io, "device", ONE)
            one = gather_shared(block, rows)
        for linear, statistics in one.items():
            assert several[linear].rows == statistics.rows > 0
            assert torch.allclose(several[linear].hessian, statistics.hessian, rtol=1e-4, atol=1e-6), linear
            compared.append(linear)
        return several

    monkeypatch.setattr(Block, "gather", gather)
    results = {name: quantized(family, tmp_path, name, device) for name in ("first", "again")}
    assert len(compared) == 2 * PHASES[family.name]
    for module, linear in results["first"].items():
        assert torch.equal(results["again"][module].codes, linear.codes), module


def quantized(family: Family, folder: Path, name: str, device: Device) -> dict[str, QuantizedLinear]:
    """The tiny model quantized on four batches."""
    checkpoint = tiny_checkpoint(folder / f"model-{name}", family)
    plan = plan_for(checkpoint, RULES_OF[family.name], family)
    workdir = Workdir.open(folder / name, {"test": 1})
    calibrate.run(plan, checkpoint, workdir, batches_for(family) * 2, device, lambda event: None)
    return {module: linear for unit in plan.units for module, linear in workdir.read(unit).linears.items()}


def inputs_of(number: int) -> list[BlockInputs]:
    """Inputs of one linear for several batches, every batch with its own values."""
    call = BlockCall((), {}, named=False)
    return [
        BlockInputs.enter(ChainInput(torch.full((1, 2, 4), float(i)), (call, call)), None, CPU, CPU)
        for i in range(number)
    ]


def test_batches_run_in_turn_on_every_device_and_at_the_same_time() -> None:
    together = threading.Barrier(2, timeout=30)
    devices: list[int] = []

    def work(block: PlacedBlock, entry: BlockInputs) -> tuple[int, float]:
        devices.append(block.index)
        together.wait()  # breaks when the other device's batch is not run meanwhile
        return block.index, float(entry.hidden[0, 0, 0])

    done = list(by_batch(placed_blocks(nn.Linear(4, 4), TWO), inputs_of(6), work))
    assert done == [(0, 0.0), (1, 1.0), (0, 2.0), (1, 3.0), (0, 4.0), (1, 5.0)]
    assert sorted(devices) == [0, 0, 0, 1, 1, 1]


def test_a_number_of_batches_that_the_devices_do_not_divide_runs_whole() -> None:
    done = by_batch(placed_blocks(nn.Linear(4, 4), TWO), inputs_of(5), lambda block, entry: float(entry.hidden.max()))
    assert list(done) == [0.0, 1.0, 2.0, 3.0, 4.0]


def test_an_error_on_any_device_ends_the_round() -> None:
    def work(block: PlacedBlock, entry: BlockInputs) -> None:
        if block.index:
            raise ValueError("on the second")

    with pytest.raises(ValueError, match="on the second"):
        list(by_batch(placed_blocks(nn.Linear(4, 4), TWO), inputs_of(4), work))


def test_copies_have_the_present_weights_on_their_device_and_share_no_module() -> None:
    class Configured(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.config, self.inner = {"width": 4}, nn.Linear(4, 4)
            self.register_buffer("table", torch.arange(3.0), persistent=False)

    block = Configured()
    live, copy = placed_blocks(block, replace(ONE, others=("meta",)))
    assert live.module is block
    assert live.module_for(block.inner) is block.inner
    assert copy.module_for(block.inner) is copy.module.inner is not block.inner
    assert {tensor.device for tensor in (*copy.module.parameters(), *copy.module.buffers())} == {META}
    assert {tensor.device for tensor in (*block.parameters(), *block.buffers())} == {CPU}
    assert copy.module.config is block.config
    block.inner.weight = nn.Parameter(torch.ones(4, 4), requires_grad=False)
    assert torch.equal(placed_blocks(block, TWO)[1].module.inner.weight, torch.ones(4, 4))


def test_the_arguments_of_a_batch_move_to_its_device_once() -> None:
    mask, rotary = torch.ones(2), (torch.ones(3), torch.zeros(3))
    call = BlockCall((mask,), {"position_embeddings": rotary, "device": CPU, "cache": None}, named=False)
    entered = ChainInput(torch.ones(1, 2, 4), (call, replace(call, added=torch.ones(1, 2, 4))))
    entry = BlockInputs.enter(entered, None, META, CPU)
    first, second = entry.calls
    assert [tensor.device for tensor in (first.args[0], *first.kwargs["position_embeddings"])] == [META] * 3
    assert first.kwargs["device"] == META
    assert first.kwargs["cache"] is None
    assert second.args[0] is first.args[0]
    assert second.added is not None
    assert second.added.device == entry.hidden.device == CPU


def test_added_statistics_are_those_of_all_rows() -> None:
    rows = torch.randn(90, 5, generator=torch.Generator().manual_seed(0))
    whole, first, second, none = (Statistics(5, CPU) for _ in range(4))
    whole.update(rows)
    first.update(rows[:60])
    second.update(rows[60:])
    first.add(second)
    first.add(none)
    assert first.rows == 90
    assert torch.allclose(first.hessian, whole.hessian, rtol=1e-5, atol=1e-6)
    assert torch.allclose(first.hessian.double(), rows.double().T @ rows.double() / 90, rtol=1e-5, atol=1e-6)


def test_units_of_one_device_are_not_resumed_on_two() -> None:
    one, two = identity.of_machine(ONE, torch.float32), identity.of_machine(TWO, torch.float32)
    assert "devices that share calibration" not in one
    assert two == one | {"devices that share calibration": 2}


@pytest.mark.parametrize("request_", ["cuda:0,cuda:0", "cuda:0,cpu", "cuda,cuda:1", "cuda:0,", "cpu,cpu"])
def test_devices_that_cannot_share_are_refused(request_: str) -> None:
    with pytest.raises(PlanError, match="unknown devices") as error:
        choose(request_)
    assert "cuda:0,cuda:1" in (error.value.hint or "")


def test_two_gpus_are_one_device_with_the_smaller_free_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    monkeypatch.setattr("torch.cuda.get_device_name", lambda number: f"GPU {number}")
    monkeypatch.setattr("torch.cuda.mem_get_info", lambda number: ((2 - number) * 2**30, 2**31))
    device = device_module.choose("cuda:0, cuda:1")
    assert device.all == (torch.device("cuda", 0), torch.device("cuda", 1))
    assert device.name == "GPU 0 + GPU 1"
    assert device.free_bytes == 2**30
    with pytest.raises(PlanError, match="no device 'cuda:2'"):
        device_module.choose("cuda:0,cuda:2")


def test_each_further_device_has_one_thread_for_the_whole_job() -> None:
    """On a GPU, a new thread for every round plans attention anew: quantizing took four times as long."""

    def work(block: PlacedBlock, entry: BlockInputs) -> tuple[int, int]:
        return block.index, threading.get_ident()

    runs = [list(by_batch(placed_blocks(nn.Linear(4, 4), THREE), inputs_of(7), work)) for _ in range(3)]
    threads = {index: {thread for run in runs for i, thread in run if i == index} for index in range(3)}
    assert threads[0] == {threading.get_ident()}
    assert all(len(idents) == 1 for idents in threads.values())
    assert len(set.union(*threads.values())) == 3


def test_a_block_is_called_with_arguments_and_hidden_states_on_one_device() -> None:
    """Also where a step runs on the first device what another one stores: learned rounding calls blocks itself."""
    call = BlockCall((torch.ones(2),), {"mask": torch.ones(2)}, named=False)
    entry = BlockInputs.enter(ChainInput(torch.ones(1, 2, 4), (call,)), None, CPU, CPU)
    output, *received = entry.call(lambda hidden, *args, mask: ([hidden, *args, mask],), META)
    assert {tensor.device for tensor in (output, *received)} == {META}
    assert len(received) == 2
