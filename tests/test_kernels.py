"""Triton kernels against the same in torch: on a GPU, or by Triton's interpreter (tests/conftest.py switches it on).

Triton comes with torch for CUDA, and on a CPU with the extra `dev`; without it these tests are skipped. The interpreter
takes milliseconds for what a GPU does in microseconds, so shapes are as small as each case allows.
"""

import importlib
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

from exporter.device import choose
from exporter.methods import awq, gptq
from exporter.numerics import gptq_columns as columns_
from exporter.numerics import ranges
from exporter.numerics.learned_rounding import LearnedLinear
from exporter.numerics.quantized import ColumnGrid, QuantizedLinear, Scheme, dequantize, quantize
from tests.slow import some, some_of

pytest.importorskip("triton", reason="Triton is not installed: the kernels' own sums are tested on a GPU only")

DEVICE = choose("auto").torch_device
ON_GPU = DEVICE.type == "cuda"
NEAR_TIES = 0.02 if ON_GPU else 0  # share of groups where the last bit of a sum decides
ROWS, COLUMNS = (40, 300) if ON_GPU else (17, 150)  # a program has 16 rows; the last group of 128, and of 32, is short
FIRST = COLUMNS // 3  # of a block of columns


def _nearest(value: Any) -> Any:
    """Round half to even, as libdevice's rint does, which the interpreter lacks: below 2^22 the sum has no fraction."""
    return (value + 12582912.0) - 12582912.0


@pytest.fixture
def kernels(monkeypatch: pytest.MonkeyPatch) -> dict[str, ModuleType]:
    """The modules of the kernels.

    On a CPU, every kernel must start inside `current` of its tensors' device: with `--device cuda:1` another GPU is the
    current one, and Triton fails there.
    """
    inside: list[torch.device] = []

    @contextmanager
    def current(device: torch.device) -> Iterator[None]:
        inside.append(device)
        yield
        inside.pop()

    def nearest(value: Any) -> Any:
        assert inside == [DEVICE]
        return _nearest(value)

    modules = {
        name: importlib.import_module(f"exporter.numerics.{name}")
        for name in ("ranges_kernel", "gptq_columns_kernel", "learned_rounding_kernel")
    }
    if not ON_GPU:
        for module in modules.values():
            monkeypatch.setattr(module, "libdevice", SimpleNamespace(rint=nearest))
            monkeypatch.setattr(module, "current", current)
    return modules


def _drawn(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE)


@pytest.fixture
def weight() -> torch.Tensor:
    return _drawn(0, ROWS, COLUMNS)


# Every value of each of them; the other combinations are slow.
RANGES = {(128, COLUMNS, True, True), ("row", COLUMNS, True, False), ("row", 2500, False, True)}


@pytest.mark.parametrize(
    ("group", "columns", "symmetric", "weighted"),
    [
        pytest.param(
            group,
            columns,
            symmetric,
            weighted,
            marks=() if (group, columns, symmetric, weighted) in RANGES else pytest.mark.slow,
        )
        for group, columns in ((128, COLUMNS), ("row", COLUMNS), ("row", 2500))
        for symmetric in (True, False)
        for weighted in (True, False)
    ],
)
def test_the_search_of_ranges_equals_torch(
    kernels: dict[str, ModuleType], group: int | str, columns: int, symmetric: bool, weighted: bool
) -> None:
    weight, counts = _drawn(1, ROWS if columns < 1000 else 2, columns), _drawn(2, columns).abs() if weighted else None
    scheme = Scheme(4, group, symmetric)  # type: ignore[arg-type]
    low, high = ranges.full_range(weight, scheme)
    scale, zero = ranges._search(weight, low, high, scheme, torch.float16, counts)
    fast = ranges._search_fast(weight, scheme, torch.float16, counts)
    grouped = ranges._grouped(weight, scheme)
    share = None if counts is None else ranges._grouped(counts[None], scheme)
    errors = [ranges._errors(grouped, *pair, scheme, share) for pair in ((scale, zero), fast)]
    torch.testing.assert_close(*errors, rtol=0.01, atol=0)
    assert ((scale != fast[0]) | (zero != fast[1])).float().mean() <= NEAR_TIES


@pytest.mark.parametrize("size", some([1e-3, 1e-5, 1e-7], [1e-5]))
def test_scales_of_small_weights_equal_torch(kernels: dict[str, ModuleType], size: float) -> None:
    """Subnormal numbers of float16, multiples of 2^-24."""
    weight, scheme = _drawn(1, ROWS, COLUMNS) * size, Scheme(8, "row")
    low, high = ranges.full_range(weight, scheme)
    scale, zero = ranges._search(weight, low, high, scheme, torch.float16, None)
    fast = ranges._search_fast(weight, scheme, torch.float16, None)
    assert float(scale.max()) < 6.1e-5
    assert ((scale != fast[0]) | (zero != fast[1])).float().mean() <= NEAR_TIES


@pytest.mark.parametrize(
    ("group", "symmetric"),
    some_of({f"{g} {s}": (g, s) for g in (32, 128) for s in (True, False)}, ["32 False", "128 True"]),
)
def test_clipping_equals_torch(
    kernels: dict[str, ModuleType], weight: torch.Tensor, symmetric: bool, group: int
) -> None:
    scheme = Scheme(3, group, symmetric)
    rows = torch.randn(200, COLUMNS, generator=torch.Generator().manual_seed(2)) * torch.linspace(0.1, 3, COLUMNS)
    hessian = (rows.T @ rows / 200).to(DEVICE)
    start = ranges.fit_scale(weight, scheme, torch.float16)
    scale, zero = awq._clip_plain(weight, hessian, scheme, 10, *start)
    fast = ranges._launch(weight, scheme, torch.float16, 0.05, 11, hessian=hessian)
    assert not torch.equal(scale, start[0]), "nothing was clipped: the test says nothing"
    blocks = awq._diagonal_blocks(hessian, scheme)
    errors = [awq._group_output_error(weight, blocks, *pair, scheme) for pair in ((scale, zero), fast)]
    torch.testing.assert_close(*errors, rtol=0.01, atol=0)
    assert ((scale != fast[0]) | (zero != fast[1])).float().mean() <= NEAR_TIES


def _grid(groups: int, columns: int) -> ColumnGrid:
    """Columns of `groups` groups in no order."""
    draw = torch.Generator().manual_seed(3)
    scale = (torch.rand(ROWS, groups, generator=draw) * 0.2 + 0.1).half()
    zero = torch.randint(0, 15, (ROWS, groups), dtype=torch.uint8, generator=draw)
    group = torch.randint(0, groups, (columns,), generator=draw)
    return ColumnGrid(Scheme(4, 128, False), scale.to(DEVICE), zero.to(DEVICE), group.to(DEVICE))


def _square(columns: int) -> torch.Tensor:
    mixed = _drawn(4, columns, columns)
    return torch.eye(columns, device=DEVICE) + mixed @ mixed.T / columns


@pytest.mark.parametrize("width", some([64, 50], [50]))
def test_the_column_loop_equals_torch(kernels: dict[str, ModuleType], weight: torch.Tensor, width: int) -> None:
    part, grid = slice(FIRST, FIRST + width), _grid(3, COLUMNS)
    upper = torch.linalg.cholesky(_square(COLUMNS)).T.contiguous()
    codes = torch.zeros(2, ROWS, COLUMNS, dtype=torch.uint8, device=DEVICE)
    inputs = (weight[:, part], upper[part, part], grid.part(part))
    errors = columns_.quantize_columns_plain(*inputs, codes[0, :, part])
    steps = grid.part(part).steps
    fast = kernels["gptq_columns_kernel"].quantize_columns_fast(*inputs[:2], steps, 15, codes[1, :, part])
    assert codes.any()
    same = _rows_alike(codes)
    torch.testing.assert_close(errors[same], fast[same])


@pytest.mark.parametrize("dtype", [pytest.param(torch.float32, marks=pytest.mark.slow), torch.bfloat16])
def test_the_coordinate_descent_equals_torch(
    kernels: dict[str, ModuleType], weight: torch.Tensor, dtype: torch.dtype
) -> None:
    part, grid, square = slice(FIRST, FIRST + 64), _grid(3, COLUMNS), _square(COLUMNS)
    share = square.diagonal().clone()
    square.diagonal().zero_()
    codes = torch.stack([quantize(weight + 0.2, *grid.expanded())] * 2)
    off = torch.stack([(weight - dequantize(codes[0], *grid.expanded())).to(dtype)] * 2)
    pull = off[0].float() @ square[part].T
    inputs = (weight[:, part], pull, square[part, part].to(dtype), share[part], grid.part(part))
    columns_.descend_columns_plain(*inputs, codes[0, :, part], off[0, :, part])
    assert (codes[0] != codes[1]).any(), "no code moved: the test says nothing"
    fast = (*inputs[:4], grid.part(part).steps, 15, codes[1, :, part], off[1, :, part])
    kernels["gptq_columns_kernel"].descend_columns_fast(*fast)
    same = _rows_alike(codes)
    torch.testing.assert_close(off[0, same], off[1, same])


def _rows_alike(codes: torch.Tensor) -> torch.Tensor:
    """Where both have the same codes, which is nearly everywhere: a tie changes all columns after it."""
    same = (codes[0] == codes[1]).all(1)
    assert (~same).float().mean() <= 2 * NEAR_TIES
    return same


# Every kind of scales and order, block and group; the other combinations are slow.
PAIRS = {
    ("row", 1, "activation"), (16, 128, "none"), ("row", 20, "in_loop"),
    (16, 20, "in_loop"),  # the short last block has two groups
}  # fmt: skip
GPTQ = [
    pytest.param(scales, order, block, group, marks=() if (group, block, key) in PAIRS else pytest.mark.slow)
    for group in (16, "row")
    for block in (1, 20, 128)
    for scales, order, key in (
        ("static", "activation", "activation"),
        ("static", "none", "none"),
        ("in_loop", "none", "in_loop"),
    )
]


@pytest.mark.parametrize(("scales", "order", "block", "group"), GPTQ)
def test_gptq_by_kernels_equals_torch(
    kernels: dict[str, ModuleType],
    monkeypatch: pytest.MonkeyPatch,
    scales: Any,
    order: Any,
    block: int,
    group: Any,
) -> None:
    columns = 50 if block > 1 else 20  # a block of one column is a launch a column
    weight, rows = _drawn(5, 5, columns), _drawn(6, 300, columns) @ _drawn(7, columns, columns) * 0.3
    statistics = gptq.Statistics(columns, DEVICE)
    statistics.update(rows)
    options = gptq.Options(block=block, scales=scales, order=order)
    results = []
    for fast in (False, True):
        monkeypatch.setattr(ColumnGrid, "has_kernels", fast)
        linear, notes = gptq.quantize_linear(weight, statistics, Scheme(4, group, False), options, torch.float16)
        off = linear.dequantize() - weight
        results.append((linear.codes, float(((off @ statistics.hessian) * off).sum())))
        assert notes == ()
    assert (results[0][0] != results[1][0]).float().mean() <= 2 * NEAR_TIES
    assert results[1][1] == pytest.approx(results[0][1], rel=0.01)


@pytest.mark.parametrize(
    ("group", "columns", "symmetric"),
    [(32, COLUMNS, True), (32, COLUMNS, False), ("row", COLUMNS, True), ("row", 1200, False)],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_learned_rounding_equals_torch(
    kernels: dict[str, ModuleType], group: Any, columns: int, symmetric: bool, dtype: torch.dtype
) -> None:
    rows = ROWS if columns < 1000 else 3
    weight, scheme = _drawn(8, rows, columns).to(dtype), Scheme(3, group, symmetric)
    scale, zero = ranges.fit_scale(weight.float(), scheme, torch.float16, "signed")
    start = QuantizedLinear(scheme, quantize(weight.float(), scale, zero, scheme), scale, zero)
    plain, fast = LearnedLinear(weight, start), LearnedLinear(weight, start)
    plain._has_kernels, fast._has_kernels = False, True
    for step in range(3):
        gradient = _drawn(9 + step, rows, columns)
        gradient[0, :3] = torch.tensor([torch.nan, torch.inf, -torch.inf])
        for learned in (plain, fast):
            learned.step(gradient, 0.2, 0.1)
        torch.testing.assert_close(plain.served(torch.float16), fast.served(torch.float16), rtol=1e-2, atol=1e-3)
        assert _share_of_other(plain._offset, fast._offset) <= NEAR_TIES
        assert _share_of_other(plain._low, fast._low) <= NEAR_TIES
        assert _share_of_other(plain._high, fast._high) <= NEAR_TIES
    assert (fast.quantized().codes != start.codes).float().mean() > 0.05
    assert torch.equal(fast.quantized().as_served().to(dtype), fast.served(dtype))


def _share_of_other(first: torch.Tensor, second: torch.Tensor) -> float:
    return float(((first - second).abs() > 1e-6).float().mean())
