"""The factor of the inverse, panel by panel, equals inverting and factorizing in float64."""

import pytest
import torch

from exporter.numerics.inverse_cholesky import inverse_factor_


def positive(columns: int, seed: int = 0) -> torch.Tensor:
    """A symmetric positive definite matrix whose columns differ in size by a factor of 100."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(3 * columns, columns, generator=generator) @ torch.randn(columns, columns, generator=generator)
    x *= torch.logspace(-1, 1, columns)
    square = x.T @ x / len(x)
    return square + torch.eye(columns) * 0.01 * square.diagonal().mean()


def by_inverting(square: torch.Tensor) -> torch.Tensor:
    """What the paper does: invert, then factorize the inverse."""
    return torch.linalg.cholesky(torch.linalg.inv(square.double()), upper=True)


@pytest.mark.parametrize("panel", [1, 7, 32, 99, 100, 512])
def test_equals_inverting_and_factorizing(panel: int) -> None:
    square = positive(100)
    upper = square.clone()
    assert inverse_factor_(upper, panel)
    assert torch.equal(upper, upper.triu())
    torch.testing.assert_close(upper.double(), by_inverting(square), rtol=1e-4, atol=1e-6)


def test_works_in_place() -> None:
    square = positive(64)
    place = square.data_ptr()
    assert inverse_factor_(square, 16)
    assert square.data_ptr() == place
    assert square.is_contiguous()


@pytest.mark.parametrize("column", [0, 40, 99], ids=["first panel", "middle panel", "last panel"])
@pytest.mark.parametrize("value", [-1.0, float("nan"), float("inf")])
def test_returns_false_when_there_is_no_factor(column: int, value: float) -> None:
    square = positive(100)
    square[column, column] = value
    assert not inverse_factor_(square, 16)


def test_the_same_bits_every_time() -> None:
    first, two = positive(100), positive(100)
    assert inverse_factor_(first, 32)
    assert inverse_factor_(two, 32)
    assert torch.equal(first, two)


@pytest.mark.skipif(not torch.accelerator.is_available(), reason="needs a GPU")
def test_needs_little_memory_besides_the_matrix() -> None:
    device = torch.accelerator.current_accelerator()
    square = positive(1024).to(device)
    torch.accelerator.reset_peak_memory_stats(device)
    before = torch.accelerator.memory_allocated(device)
    assert inverse_factor_(square, 128)
    beside = torch.accelerator.max_memory_allocated(device) - before
    assert beside <= 4 * 1024 * 128 * 4 + 16 * 2**20  # strips, and the workspaces of libraries
