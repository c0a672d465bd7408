"""GPTQ equals the paper's own derivation; edge cases."""

import itertools

import pytest
import torch

from exporter.methods import gptq, rtn
from exporter.methods.gptq import Options, Statistics, importance, inverse_factor
from exporter.numerics import gptq_columns as loops
from exporter.numerics import hessian as moments
from exporter.numerics.quantized import ColumnGrid, Scheme, dequantize, expand_groups, quantize
from exporter.numerics.ranges import fit_scale
from tests.oracles import columns_by_hand, descent_by_hand, descent_columns_by_hand, gptq_by_inversion
from tests.slow import some, some_of

CPU = torch.device("cpu")


def correlated(rows: int, columns: int, seed: int = 0) -> tuple[torch.Tensor, Statistics]:
    """A random weight `[24, columns]` and statistics of correlated inputs, gathered in two uneven batches."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, columns, generator=generator) @ torch.randn(columns, columns, generator=generator) * 0.3
    statistics = Statistics(columns, CPU)
    statistics.update(x[: rows // 3])
    statistics.update(x[rows // 3 :])
    return torch.randn(24, columns, generator=generator), statistics


@pytest.mark.parametrize(
    ("symmetric", "scales", "order", "size"),
    [
        pytest.param(symmetric, scales, order, size, marks=() if symmetric == (size[0] > 2) else pytest.mark.slow)
        for symmetric, (scales, order), size in itertools.product(
            (True, False),
            (("static", "none"), ("in_loop", "none"), ("static", "activation")),
            ((4, 32), (3, 16), (2, 40), (4, "row")),
        )
    ],
    ids=str,
)
def test_equals_inverting_again_at_every_column(
    symmetric: bool, scales: str, order: str, size: tuple[int, int | str]
) -> None:
    weight, statistics = correlated(300, 100)  # 100 columns: every group size leaves a ragged last group
    scheme = Scheme(size[0], size[1], symmetric)  # type: ignore[arg-type]
    options = Options(block=24, scales=scales, order=order, range="minmax", descent=0)  # type: ignore[arg-type]
    actual, notes = gptq.quantize_linear(weight, statistics, scheme, options, torch.float16)
    scale, zero = fit_scale(weight, scheme, torch.float16)
    by_size = statistics.hessian.diagonal().argsort(descending=True, stable=True).tolist()
    columns = by_size if order == "activation" else list(range(100))
    fit = (lambda part: fit_scale(part, scheme, torch.float16)) if scales == "in_loop" else None
    codes = gptq_by_inversion(weight, statistics.hessian, scheme, scale, zero, 0.01, columns, fit)
    assert notes == ()
    assert torch.equal(actual.scale, scale)
    assert torch.equal(actual.zero, zero)
    different = int((actual.codes != codes).sum())
    assert different <= 2, f"{different} codes differ; float32 against float64 may break a tie, no more"


LOOP_SCHEMES = [
    Scheme(4, 32),
    Scheme(3, 16, False),
    Scheme(8, "row", False),
    Scheme(8, 32, number="fp8"),
    Scheme(4, 16, number="nvfp4"),
]


@pytest.mark.parametrize("scheme", LOOP_SCHEMES, ids=lambda scheme: scheme.label())
@pytest.mark.parametrize("errors_dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_column_loops_equal_rounding_each_column_by_itself(scheme: Scheme, errors_dtype: torch.dtype) -> None:
    """Bit for bit, with columns of the groups in any order, and with scales of 0."""
    weight, statistics = correlated(300, 100)
    scale, zero = fit_scale(weight, scheme, torch.float16)
    scale[:12, 0] = 0
    order = torch.randperm(100, generator=torch.Generator().manual_seed(1))
    weight, grid = weight[:, order], ColumnGrid(scheme, scale, zero, order // scheme.columns_per_group(100))
    upper, _ = inverse_factor(statistics.hessian, 0.01, order)
    assert upper is not None
    expected, expected_errors = columns_by_hand(weight, upper, grid)
    codes = torch.zeros(24, 100, dtype=torch.uint8)
    errors = loops.quantize_columns_plain(weight, upper, grid, codes)
    assert torch.equal(codes, expected)
    assert torch.equal(errors, expected_errors)
    hessian = statistics.hessian[order][:, order]
    before = (weight - dequantize(codes, *grid.expanded())).to(errors_dtype)
    diagonal, after = hessian.diagonal().clone(), before.clone()
    hessian = hessian.to(errors_dtype).fill_diagonal_(0)
    block = (weight, before.float() @ hessian.float(), hessian, diagonal, grid)
    expected, expected_errors = descent_columns_by_hand(*block, before)
    loops.descend_columns_plain(*block, codes, after)
    assert torch.equal(codes, expected)
    assert torch.equal(after, expected_errors)
    assert not torch.equal(after, before)


@pytest.mark.parametrize("columns", [32, 100])  # two groups, and several with a short one
def test_scales_in_the_loop_are_searched_with_the_importance_of_their_own_columns(columns: int) -> None:
    weight, statistics = correlated(300, columns)
    statistics.hessian *= torch.linspace(0.1, 3, columns).outer(
        torch.linspace(0.1, 3, columns)
    )  # later columns count more
    scheme = Scheme(3, 16)
    options = Options(block=24, scales="in_loop", order="none", descent=0)
    actual, _ = gptq.quantize_linear(weight, statistics, scheme, options, torch.float16)
    order = torch.arange(columns)
    upper, _ = inverse_factor(statistics.hessian, 0.01)
    assert upper is not None
    parts = iter(importance(statistics.hessian, upper, 0.01, order).split(16))
    scale, zero = fit_scale(weight, scheme, torch.float16)
    fit = lambda part: fit_scale(part, scheme, torch.float16, "mse", next(parts))  # noqa: E731
    codes = gptq_by_inversion(weight, statistics.hessian, scheme, scale, zero, 0.01, order.tolist(), fit)
    assert int((actual.scale != scale).sum()) <= 1  # a tie between two ranges, float32 against float64
    assert int((actual.codes != codes).sum()) <= 4


def damped(statistics: Statistics, share: float = 0.01) -> torch.Tensor:
    """The Hessian with damping on its diagonal."""
    return statistics.hessian + torch.eye(len(statistics.hessian)) * share * statistics.hessian.diagonal().mean()


DESCENTS = {
    f"{scheme.label()} {block}": (scheme, block)
    for scheme in (Scheme(3, 8), Scheme(2, 9, False), Scheme(3, "row"))
    for block in (7, 30, 128)
}


@pytest.mark.parametrize(("scheme", "block"), some_of(DESCENTS, ["W3 g8 7", "W2 g9 asym 30", "W3 row 128"]))
def test_coordinate_descent_equals_trying_every_code(scheme: Scheme, block: int) -> None:
    weight, statistics = correlated(300, 30)
    start, _ = gptq.quantize_linear(weight, statistics, scheme, Options(descent=0), torch.float16)
    once, _ = gptq.quantize_linear(weight, statistics, scheme, Options(block=block), torch.float16)
    steps, zeros = (expand_groups(part.float(), 30, scheme) for part in (start.scale, start.zero))
    codes = descent_by_hand(weight, start.codes, steps, zeros, scheme.levels, damped(statistics))
    assert torch.equal(once.scale, start.scale)
    assert int((codes != start.codes).sum()) > 10  # it has something to do
    different = int((once.codes != codes).sum())
    assert different <= 2, f"{different} codes differ; float32 against float64 may break a tie, no more"


@pytest.mark.parametrize("bits", some([2, 3, 4, 8], [3]))
@pytest.mark.parametrize("group", [32, "row", "tensor"])
@pytest.mark.parametrize("symmetric", [True, False])
def test_every_pass_of_coordinate_descent_lowers_the_error(bits: int, group: int | str, symmetric: bool) -> None:
    weight, statistics = correlated(300, 100)
    scheme = Scheme(bits, group, symmetric)  # type: ignore[arg-type]
    errors = []
    for passes in (0, 1, 2):
        actual, _ = gptq.quantize_linear(weight, statistics, scheme, Options(descent=passes), torch.float16)
        off = actual.dequantize() - weight
        errors.append(((off @ damped(statistics)) * off).sum(1))
        assert int(actual.codes.max()) <= scheme.levels
    assert (errors[1] <= errors[0] * 1.0001).all()  # row by row
    assert (errors[2] <= errors[1] * 1.0001).all()
    assert errors[1].sum() < 0.97 * errors[0].sum()


def test_a_columns_importance_is_the_part_that_later_columns_cannot_compensate() -> None:
    _, statistics = correlated(300, 12)
    statistics.hessian[4], statistics.hessian[:, 4] = 0, 0
    order = torch.randperm(12, generator=torch.Generator().manual_seed(2))
    upper, _ = inverse_factor(statistics.hessian, 0.01, order)
    assert upper is not None
    mean = statistics.hessian.diagonal()[statistics.hessian.diagonal() > 0].mean()
    full = (statistics.hessian + torch.eye(12) * 0.01 * mean).double()
    full[4, 4] = 0.01 * 1.01 * mean  # never an input: next to nothing
    left = [order[step:].tolist() for step in range(12)]
    expected = torch.zeros(12, dtype=torch.float64)
    for columns in left:
        expected[columns[0]] = 1 / torch.linalg.inv(full[columns][:, columns])[0, 0]
    actual = importance(statistics.hessian, upper, 0.01, order)
    torch.testing.assert_close(actual.double(), expected / expected.mean(), rtol=1e-4, atol=1e-6)


def test_searched_ranges_follow_the_inputs() -> None:
    """Columns with large inputs decide a group's scale, in the walk's own error."""
    weight, _ = correlated(300, 32)
    x = torch.randn(400, 32, generator=torch.Generator().manual_seed(4))
    x[:, ::2] *= 0.02
    weight[:, ::2] *= 4  # large weights that hardly matter
    statistics = Statistics(32, CPU)
    statistics.update(x)
    scheme = Scheme(3, "row")
    actual, _ = gptq.quantize_linear(weight, statistics, scheme, Options(descent=0), torch.float16)
    blind, _ = fit_scale(weight, scheme, torch.float16, "mse")
    assert (actual.scale < blind).float().mean() > 0.9


@pytest.mark.parametrize("block", [1, 7, 100, 512])
def test_block_size_does_not_change_the_result(block: int) -> None:
    weight, statistics = correlated(300, 100)
    scheme = Scheme(4, 32)
    codes = [
        gptq.quantize_linear(weight, statistics, scheme, Options(block=b), torch.float16)[0].codes for b in (block, 24)
    ]
    assert int((codes[0] != codes[1]).sum()) <= 2


def test_stacked_linears_equal_separate_ones() -> None:
    weight, statistics = correlated(300, 96)
    scheme, options = Scheme(4, 32), Options()
    whole, _ = gptq.quantize_linear(weight, statistics, scheme, options, torch.bfloat16)
    parts = [gptq.quantize_linear(part, statistics, scheme, options, torch.bfloat16)[0] for part in weight.split(8)]
    assert torch.equal(whole.codes, torch.cat([part.codes for part in parts]))
    assert torch.equal(whole.scale, torch.cat([part.scale for part in parts]))


@pytest.mark.parametrize("strip", [5, 4096])
def test_statistics_are_the_mean_outer_product_however_batched(strip: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(moments, "STRIP", strip)
    x = torch.randn(50, 12, generator=torch.Generator().manual_seed(3))
    weights = torch.rand(50)
    single, many, weighted = Statistics(12, CPU), Statistics(12, CPU), Statistics(12, CPU)
    single.update(x)
    for part in x.split(7):
        many.update(part)
    many.update(x[:0])
    weighted.update(x, weights)
    torch.testing.assert_close(single.hessian, x.T @ x / 50)
    torch.testing.assert_close(many.hessian, single.hessian)
    torch.testing.assert_close(weighted.hessian, (x * weights[:, None]).T @ x / 50)
    matrix = torch.randn(5, 12)
    assert single.energy(matrix) == pytest.approx(float((x @ matrix.T).square().sum() / 50), rel=1e-5)


def test_inverse_factor_is_the_factor_of_the_inverse() -> None:
    _, statistics = correlated(300, 40)
    upper, notes = inverse_factor(statistics.hessian, 0.01)
    assert upper is not None
    assert notes == ()
    assert torch.equal(upper, upper.triu())
    damped = statistics.hessian + torch.eye(40) * 0.01 * statistics.hessian.diagonal().mean()
    torch.testing.assert_close(upper.T @ upper @ damped, torch.eye(40), atol=2e-4, rtol=0)


@pytest.mark.parametrize("columns", [1, 511, 1025])
def test_the_factor_follows_the_order_of_the_columns(columns: int) -> None:
    """Columns in an order, then the factor; whatever strips the permutation is made of."""
    _, statistics = correlated(2 * columns, columns)
    order = torch.randperm(columns, generator=torch.Generator().manual_seed(1))
    permuted = statistics.hessian[order[:, None], order]
    assert torch.equal(inverse_factor(statistics.hessian, 0.01, order)[0], inverse_factor(permuted, 0.01)[0])


def test_damping_grows_until_it_helps_with_a_note() -> None:
    weight, statistics = correlated(300, 40)
    statistics.hessian -= torch.eye(40) * 0.2 * statistics.hessian.diagonal().mean()  # indefinite
    linear, notes = gptq.quantize_linear(weight, statistics, Scheme(4, "row"), Options(), torch.float16)
    assert len(notes) == 1
    assert "damping grew to" in notes[0]
    assert int(linear.codes.max()) <= 15
    walked, _ = gptq.quantize_linear(weight, statistics, Scheme(4, "row"), Options(descent=0), torch.float16)
    assert torch.equal(linear.codes, walked.codes)  # an indefinite Hessian has no least error to go down to


def test_an_indefinite_hessian_falls_back_to_rounding_with_a_note() -> None:
    weight, statistics = correlated(300, 40)
    statistics.hessian.fill_(float("nan"))
    linear, notes = gptq.quantize_linear(weight, statistics, Scheme(4, "row"), Options(), torch.float16)
    rounded, _ = rtn.quantize_linear(weight, None, Scheme(4, "row"), rtn.Options(range="mse"), torch.float16)
    assert "rounded to nearest" in notes[0]
    assert torch.equal(linear.codes, rounded.codes)


def test_dead_columns_are_rounded_and_change_nothing_else() -> None:
    weight, _ = correlated(300, 40)
    x = torch.randn(200, 40, generator=torch.Generator().manual_seed(1)) * 0.01  # damping would notice a 1 among these
    silent = [5, *range(12, 30)]
    keep = [i for i in range(40) if i not in silent]
    x[:, silent] = 0
    dead, alive = Statistics(40, CPU), Statistics(len(keep), CPU)
    dead.update(x)
    alive.update(x[:, keep])
    scheme, options = Scheme(4, "row"), Options(order="none", range="minmax", damping=0.1)
    weight[:, silent] *= 0.1  # so that they do not decide a scale
    with_dead, _ = gptq.quantize_linear(weight, dead, scheme, options, torch.float16)
    without, _ = gptq.quantize_linear(weight[:, keep], alive, scheme, options, torch.float16)
    assert torch.equal(with_dead.codes[:, keep], without.codes)
    rounded, _ = rtn.quantize_linear(weight, None, scheme, rtn.Options(), torch.float16)
    assert torch.equal(with_dead.codes[:, silent], rounded.codes[:, silent])


def test_no_input_at_all_is_rounding() -> None:
    weight, _ = correlated(300, 40)
    linear, notes = gptq.quantize_linear(weight, Statistics(40, CPU), Scheme(4, 16), Options(), torch.float16)
    assert notes == ()
    assert torch.equal(linear.codes, quantize(weight, linear.scale, linear.zero, Scheme(4, 16)))


def test_options_that_contradict_each_other_are_refused() -> None:
    with pytest.raises(ValueError, match="scales: in_loop needs order: none"):
        Options(order="activation", scales="in_loop")
