"""The quantized linear: packing equals plain Python integers; properties of quantize and dequantize."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from exporter.numerics.bit_packing import pack_bits, unpack_bits
from exporter.numerics.quantized import FP8_MAX, GroupSize, QuantizedLinear, Scheme, dequantize, expand_groups, quantize
from tests.oracles import naive_pack_bits

SIZES: tuple[GroupSize, ...] = (1, 3, 8, 32, "row", "tensor")


@st.composite
def code_matrices(draw: st.DrawFn) -> tuple[int, Tensor]:
    """bits, and codes `[rows, n]` of them; n from less than a word to several, ragged."""
    bits, rows, n = draw(st.integers(2, 8)), draw(st.integers(1, 4)), draw(st.integers(1, 75))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32 - 1)))
    return bits, torch.randint(0, 1 << bits, (rows, n), generator=generator, dtype=torch.uint8)


@given(code_matrices())
@settings(deadline=None, max_examples=200)
def test_pack_bits_agrees_with_plain_integers(case: tuple[int, Tensor]) -> None:
    bits, codes = case
    packed = pack_bits(codes, bits)
    assert packed.dtype == torch.int32
    assert packed.is_contiguous()
    assert packed.tolist() == naive_pack_bits(codes.tolist(), bits)


@given(code_matrices())
@settings(deadline=None, max_examples=200)
def test_unpack_bits_inverts_pack_bits(case: tuple[int, Tensor]) -> None:
    bits, codes = case
    unpacked = unpack_bits(torch.tensor(naive_pack_bits(codes.tolist(), bits), dtype=torch.int32), bits, codes.shape[1])
    assert unpacked.is_contiguous()
    assert torch.equal(unpacked, codes)


@pytest.mark.parametrize("bits", range(2, 9))
def test_packing_reads_transposed_codes_and_does_not_change_them(bits: int) -> None:
    codes = torch.randint(0, 1 << bits, (40, 7), dtype=torch.uint8)
    before = codes.clone()
    assert torch.equal(pack_bits(codes.T, bits), pack_bits(codes.T.contiguous(), bits))
    packed = pack_bits(codes, bits)
    copy = packed.clone()
    unpack_bits(packed, bits, 7)
    assert torch.equal(codes, before)
    assert torch.equal(packed, copy)


@pytest.mark.parametrize("bits", range(2, 9))
def test_packed_size_is_the_bits_rounded_up_to_words_on_meta_too(bits: int) -> None:
    for n in (1, 31, 32, 100):
        packed = pack_bits(torch.empty(3, n, dtype=torch.uint8, device="meta"), bits)
        assert (packed.dtype, tuple(packed.shape)) == (torch.int32, (3, -(-n * bits // 32)))


@st.composite
def linears(draw: st.DrawFn) -> tuple[Tensor, Tensor, Tensor, Scheme]:
    """A weight, scales and zero points of a scheme; scales reach both ends of the codes."""
    rows, columns = draw(st.integers(1, 5)), draw(st.integers(1, 40))
    scheme = Scheme(draw(st.integers(2, 8)), draw(st.sampled_from(SIZES)), draw(st.booleans()))
    torch.manual_seed(draw(st.integers(0, 2**32 - 1)))
    weight, groups = torch.randn(rows, columns), scheme.groups(columns)
    scale = torch.rand(rows, groups) * 4 / scheme.levels + 1e-3
    zero = torch.randint(0, scheme.levels + 1, (rows, groups), dtype=torch.uint8)
    return weight, scale, torch.full_like(zero, scheme.middle) if scheme.symmetric else zero, scheme


@given(linears())
@settings(deadline=None, max_examples=200)
def test_no_code_is_nearer_than_the_chosen_one(case: tuple[Tensor, Tensor, Tensor, Scheme]) -> None:
    weight, scale, zero, scheme = case
    nearest = dequantize(quantize(weight, scale, zero, scheme), scale, zero, scheme)
    all_codes = torch.arange(scheme.levels + 1, dtype=torch.uint8)
    for row in range(weight.shape[0]):
        for column in range(weight.shape[1]):
            group = column // scheme.columns_per_group(weight.shape[1])
            values = (all_codes.float() - zero[row, group].float()) * scale[row, group]
            best = (values - weight[row, column]).abs().min()
            assert (nearest[row, column] - weight[row, column]).abs() <= best + 1e-6


@given(linears())
@settings(deadline=None, max_examples=200)
def test_quantizing_dequantized_codes_gives_the_codes(case: tuple[Tensor, Tensor, Tensor, Scheme]) -> None:
    weight, scale, zero, scheme = case
    codes = quantize(weight, scale, zero, scheme)
    assert torch.equal(quantize(dequantize(codes, scale, zero, scheme), scale, zero, scheme), codes)


@given(st.integers(1, 40), st.sampled_from(SIZES))
@settings(deadline=None)
def test_expand_groups_gives_each_column_its_own_group(columns: int, size: GroupSize) -> None:
    scheme = Scheme(4, size)
    per_group = torch.arange(2 * scheme.groups(columns)).view(2, -1)
    wide = expand_groups(per_group, columns, scheme)
    assert wide.shape == (2, columns)
    for column in range(columns):
        group = 0 if isinstance(size, str) else column // size
        assert wide[:, column].tolist() == per_group[:, group].tolist()


def test_ties_go_to_the_even_code() -> None:
    weight = torch.tensor([[0.5, 1.5, 2.5, -0.5]])
    codes = quantize(weight, torch.ones(1, 1), torch.full((1, 1), 8, dtype=torch.uint8), Scheme(4, "row"))
    assert codes.tolist() == [[8, 10, 10, 8]]


def test_an_all_zero_group_gives_the_zero_point() -> None:
    scheme = Scheme(4, 2, symmetric=False)
    codes = quantize(torch.zeros(1, 4), torch.tensor([[0.0, 1.0]]), torch.tensor([[3, 5]], dtype=torch.uint8), scheme)
    assert codes.tolist() == [[3, 3, 5, 5]]


def test_fp8_codes_are_the_bytes_of_saturated_floats() -> None:
    scheme = Scheme(8, "row", number="fp8")
    weight, scale = torch.tensor([[1.0, -3.1, 2e4, -2e4]]), torch.tensor([[2.0]])
    codes = quantize(weight, scale, torch.zeros(1, 1, dtype=torch.uint8), scheme)
    assert codes.dtype == torch.uint8
    expected = torch.tensor([[0.5, -1.55, FP8_MAX, -FP8_MAX]]).to(torch.float8_e4m3fn)
    assert torch.equal(codes.view(torch.float8_e4m3fn), expected)
    linear = QuantizedLinear(scheme, codes, scale, torch.zeros(1, 1, dtype=torch.uint8))
    assert linear.dequantize().tolist() == [[1.0, -3.0, 2 * FP8_MAX, -2 * FP8_MAX]]


@pytest.mark.parametrize(
    ("scheme", "label"),
    [
        (Scheme(4, 128), "W4 g128"),
        (Scheme(3, "row", symmetric=False), "W3 row asym"),
        (Scheme(8, "row", activations="int8"), "W8 row A8"),
        (Scheme(8, "tensor", number="fp8", activations="fp8"), "FP8 tensor A-FP8"),
    ],
)
def test_labels(scheme: Scheme, label: str) -> None:
    assert scheme.label() == label
