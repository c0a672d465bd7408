"""Triton kernels against the same in torch: on a GPU, or by Triton's interpreter (tests/conftest.py switches it on).

Skipped where Triton is not installed: it comes with torch for CUDA; `pip install triton` (1 GB) brings it to a CPU.
"""

import importlib
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

from exporter import columns, ranges
from exporter.device import choose
from exporter.methods import awq
from exporter.quantized import Scheme

pytest.importorskip("triton", reason="Triton is not installed: the kernels' own sums are tested on a GPU only")

DEVICE = choose("auto").torch_device
NEAR_TIES = 0.02  # share of groups where two ranges are so nearly as good that the order of a sum decides


def _nearest(value: Any) -> Any:
    """Round half to even, as libdevice's rint does, which the interpreter lacks: below 2^22 the sum has no fraction."""
    return (value + 12582912.0) - 12582912.0


@pytest.fixture
def kernels(monkeypatch: pytest.MonkeyPatch) -> dict[str, ModuleType]:
    """The modules of the kernels."""
    modules = {name: importlib.import_module(f"exporter.{name}") for name in ("ranges_kernel", "columns_kernel")}
    if DEVICE.type == "cpu":
        for module in modules.values():
            monkeypatch.setattr(module, "libdevice", SimpleNamespace(rint=_nearest))
    return modules


def _drawn(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE)


@pytest.fixture
def weight() -> torch.Tensor:
    """40 rows of 300 columns: the last group of 128, and of 32, is short."""
    return _drawn(0, 40, 300)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("weighted", [True, False])
@pytest.mark.parametrize(("group", "columns"), [(128, 300), ("row", 300), ("row", 5000)])
def test_the_search_of_ranges_equals_torch(
    kernels: dict[str, ModuleType], symmetric: bool, weighted: bool, group: int | str, columns: int
) -> None:
    weight, counts = _drawn(1, 40, columns), _drawn(2, columns).abs() if weighted else None
    scheme = Scheme(4, group, symmetric)  # type: ignore[arg-type]
    low, high = ranges._extremes(weight, scheme)
    scale, zero = ranges._search(weight, low, high, scheme, torch.float16, counts)
    fast = ranges._search_fast(weight, scheme, torch.float16, counts)
    grouped, share = (
        ranges._grouped(weight, scheme),
        counts if counts is None else ranges._grouped(counts[None], scheme),
    )
    errors = [ranges._errors(grouped, *found, scheme, share) for found in ((scale, zero), fast)]
    torch.testing.assert_close(*errors, rtol=1e-5, atol=0)
    assert (scale != fast[0]).float().mean() < NEAR_TIES


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("group", [32, 128])
def test_clipping_equals_torch(
    kernels: dict[str, ModuleType], weight: torch.Tensor, symmetric: bool, group: int
) -> None:
    scheme = Scheme(3, group, symmetric)
    rows = torch.randn(200, 300, generator=torch.Generator().manual_seed(2)) * torch.linspace(0.1, 3, 300)
    hessian = (rows.T @ rows / 200).to(DEVICE)
    start = ranges.fit_scale(weight, scheme, torch.float16)
    scale, zero = awq._clip_plain(weight, hessian, scheme, 10, *start)
    fast = ranges._launch(weight, scheme, torch.float16, 0.05, 11, hessian=hessian)
    assert not torch.equal(scale, start[0]), "nothing was clipped: the test says nothing"
    blocks = awq._diagonal_blocks(hessian, scheme)
    errors = [awq._group_output_error(weight, blocks, *found, scheme) for found in ((scale, zero), fast)]
    torch.testing.assert_close(*errors, rtol=1e-4, atol=0)
    assert (scale != fast[0]).float().mean() < NEAR_TIES


@pytest.mark.parametrize("descends", [True, False])
def test_the_column_loop_equals_torch(kernels: dict[str, ModuleType], weight: torch.Tensor, descends: bool) -> None:
    draw = torch.Generator().manual_seed(3)
    mixed = torch.rand(64, 64, generator=draw)
    upper = torch.linalg.cholesky(torch.eye(64) + mixed @ mixed.T / 64).T.contiguous()
    scale = torch.rand(40, 64, generator=draw) * 0.2 + 0.1
    zero = torch.randint(0, 15, (40, 64), dtype=torch.uint8, generator=draw)
    origin = torch.randn(40, 64, generator=draw).to(DEVICE) if descends else None
    inputs = (weight[:, :64], upper.to(DEVICE), scale.to(DEVICE), zero.to(DEVICE))
    codes, errors = columns.quantize_columns_plain(*inputs, Scheme(4, 128, False), origin)
    fast = kernels["columns_kernel"].launch(*inputs, 15, origin)
    assert torch.equal(codes, fast[0])
    torch.testing.assert_close(errors, fast[1])
