"""Codes of 2 to 8 bits as dense bit streams, in words of 32 bits."""

from __future__ import annotations

from math import gcd
from typing import TYPE_CHECKING

from exporter.lazy_torch import torch

if TYPE_CHECKING:
    from torch import Tensor


def packed_words(count: int, bits: int) -> int:
    """Number of 32-bit words in a row of `pack_bits` with `count` codes."""
    return -(-count * bits // 32)


def pack_bits(codes: Tensor, bits: int) -> Tensor:
    """Pack codes uint8 `[rows, n]`, all below `2**bits`, into a dense little-endian bit stream along the last axis.

    Element i of a row occupies bits `i*bits .. i*bits+bits-1` of the stream, least significant first; 32 stream
    bits make one int32. Returns int32 `[rows, ceil(n*bits/32)]`, unused high bits zero.
    """
    rows, n = codes.shape
    period, octets, parts = _overlaps(bits)
    padded = -n % 32  # 32 codes fill `bits` whole words
    codes = torch.nn.functional.pad(codes, (0, padded)) if padded else codes
    stream = torch.zeros(rows, (n + padded) * bits // 8, dtype=torch.uint8, device=codes.device)
    for code, octet, shift in parts:
        stream[:, octet::octets] |= _shifted(codes[:, code::period], shift)
    return stream.view(torch.int32)[:, : packed_words(n, bits)].contiguous()


def unpack_bits(packed: Tensor, bits: int, n: int) -> Tensor:
    """Inverse of `pack_bits`: int32 `[rows, words]` to uint8 `[rows, n]`."""
    rows, words = packed.shape
    period, octets, parts = _overlaps(bits)
    padded = -words % bits
    packed = torch.nn.functional.pad(packed, (0, padded)) if padded else packed.contiguous()
    stream = packed.view(torch.uint8)  # [rows, whole multiple of 4*bits]
    codes = torch.zeros(rows, stream.shape[1] * 8 // bits, dtype=torch.uint8, device=packed.device)
    for code, octet, shift in parts:
        codes[:, code::period] |= _shifted(stream[:, octet::octets], -shift)
    return codes[:, :n].bitwise_and_((1 << bits) - 1).contiguous()


def _overlaps(bits: int) -> tuple[int, int, list[tuple[int, int, int]]]:
    """How codes overlap bytes: `period` codes fill exactly `octets` bytes, then the pattern repeats.

    Returns period, octets, and `(code, octet, left shift of the code)` for every pair that shares bits.
    """
    period, octets = 8 // gcd(8, bits), bits // gcd(8, bits)
    pairs = [(code, octet, code * bits - octet * 8) for code in range(period) for octet in range(octets)]
    return period, octets, [pair for pair in pairs if -bits < pair[2] < 8]


def _shifted(octets: Tensor, left: int) -> Tensor:
    """Bytes shifted left, or right when negative; bits outside of the byte are dropped."""
    return octets << left if left >= 0 else octets >> -left
