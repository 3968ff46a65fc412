"""Four-bit codes as tools pack them, and as they are kept here: unsigned, two in a byte, the first in the low bits.

A 32-bit word of eight codes is seen as four bytes, its lowest first. In the order that AWQ and AMD Quark's `reorder`
share, the code of column c stands in bits 4i to 4i + 3 of the word with i = 0, 4, 1, 5, 2, 6, 3, 7 for c = 0 .. 7: the
four low nibbles hold the columns 0, 4, 1, 5, and the four high ones 2, 6, 3, 7.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, partial

import torch
from torch import Tensor

WORD = 8
"""Codes of four bits in a word of 32."""

_LOW_COLUMNS = (0, 4, 1, 5)
_HIGH_COLUMNS = (2, 6, 3, 7)
_LOW_NIBBLES = 0x0F0F0F0F


def awq_codes(words: Tensor) -> Tensor:
    """AWQ's `qweight` [k, N / 8] to codes [N, k / 2]; k is even.

    Two words one below the other become one with the codes of four columns and one with those of the other four. Words
    are transposed before they are taken apart: four times fewer elements than bytes.
    """
    k, groups = words.shape
    even, odd = words.view(torch.int32)[0::2], words.view(torch.int32)[1::2]
    low = (even & _LOW_NIBBLES) | ((odd & _LOW_NIBBLES) << 4)
    high = ((even >> 4) & _LOW_NIBBLES) | (odd & ~_LOW_NIBBLES)
    codes = torch.empty(groups, WORD, k // 2, dtype=torch.uint8, device=words.device)
    for columns, pairs in ((_LOW_COLUMNS, low), (_HIGH_COLUMNS, high)):
        found = pairs.t().clone(memory_format=torch.contiguous_format).view(torch.uint8).view(groups, k // 2, -1)
        for place, column in enumerate(columns):
            codes[:, column] = found[..., place]
    return codes.view(groups * WORD, k // 2)


@cache
def column_values(dtype: torch.dtype) -> Callable[[Tensor], Tensor]:
    """AWQ's `qzeros` [g, N / 8] to numbers [N, g] of `dtype`."""
    return partial(_column_values, dtype)


def reordered_codes(words: Tensor) -> Tensor:
    """AMD Quark's `reorder` of signed codes, [n, K / 8] words, to unsigned ones, [n, K / 2].

    The codes of even columns are the low half of a word, in their order, and those of odd ones the high half.
    """
    words = words.contiguous().view(torch.int32)
    codes = _one_in_each_byte(words >> 16).bitwise_left_shift_(4).bitwise_or_(_one_in_each_byte(words))
    return codes.view(torch.uint8).bitwise_xor_(0x88)


def ordered_codes(words: Tensor) -> Tensor:
    """Signed codes in the order of their columns, [n, K / 8] words, to unsigned ones, [n, K / 2]."""
    return _bytes(words).view(words.shape[0], -1) ^ 0x88


PACK_METHODS: dict[str, Callable[[Tensor], Tensor]] = {"reorder": reordered_codes, "order": ordered_codes}
"""What undoes a `pack_method` of AMD Quark."""


@cache
def plain_bytes(count: int) -> Callable[[Tensor], Tensor]:
    """Unsigned codes in the order of their columns: the first `count` bytes of each row of words."""
    return partial(_plain_bytes, count)


@cache
def filled_up(lacking: int) -> Callable[[Tensor], Tensor]:
    """Codes, and so many bytes of zeros at the end of each row: what the last block of it lacks."""
    return partial(_filled_up, lacking)


@cache
def row_values(bits: int, dtype: torch.dtype) -> Callable[[Tensor], Tensor]:
    """Numbers packed along the rows, [n * bits / 32, G] words, to [n, G] of `dtype`."""
    return partial(_row_values, bits, dtype)


def gptq_codes(words: Tensor) -> Tensor:
    """GPTQ's `qweight` [k * bits / 32, N], words of a row's columns in their order, to codes [N, k * bits / 8]."""
    return _bytes(words).transpose(0, 1).reshape(words.shape[1], -1)


@cache
def gptq_zero_points(bits: int, count: int, first: int, dtype: torch.dtype) -> Callable[[Tensor], Tensor]:
    """GPTQ's `qzeros` [g, count * bits / 32] words, counted from `first`, to numbers [count, g] of `dtype`.

    Who subtracted `first` did so from whole words, and a number below it borrowed from the next.
    """
    in_each = first * sum(1 << place for place in range(0, 32, bits))
    return partial(_gptq_zero_points, bits, count, in_each, dtype)


def unsigned_codes(bits: int) -> Callable[[Tensor], Tensor]:
    """Signed codes, one in a byte, to unsigned ones: [n, K], or [n, ceil(K / 2)] of four bits."""
    return _unsigned_bytes if bits == 8 else _unsigned_pairs


@cache
def unsigned_values(bits: int, dtype: torch.dtype) -> Callable[[Tensor], Tensor]:
    """Signed zero points, one in a byte, to those of unsigned codes in `dtype`."""
    return partial(_unsigned_values, 1 << bits - 1, dtype)


def _unsigned_bytes(codes: Tensor) -> Tensor:
    return codes.view(torch.uint8) ^ 0x80


def _unsigned_pairs(codes: Tensor) -> Tensor:
    padded = torch.nn.functional.pad(codes.view(torch.uint8), (0, codes.shape[1] % 2), value=8)
    return ((padded[:, 0::2] & 15) | (padded[:, 1::2] << 4)) ^ 0x88


def _unsigned_values(offset: int, dtype: torch.dtype, values: Tensor) -> Tensor:
    return (values.to(torch.int16) + offset).to(dtype)


def _column_values(dtype: torch.dtype, words: Tensor) -> Tensor:
    return _columns(words).permute(1, 2, 0).reshape(-1, words.shape[0]).to(dtype)


def _plain_bytes(count: int, words: Tensor) -> Tensor:
    return _bytes(words).view(words.shape[0], -1)[:, :count]


def _filled_up(lacking: int, codes: Tensor) -> Tensor:
    return torch.nn.functional.pad(codes.view(torch.uint8), (0, lacking))


def _row_values(bits: int, dtype: torch.dtype, words: Tensor) -> Tensor:
    return _in_words(bits, words).transpose(1, 2).reshape(-1, words.shape[1]).to(dtype)


def _gptq_zero_points(bits: int, count: int, in_each: int, dtype: torch.dtype, words: Tensor) -> Tensor:
    return _in_words(bits, words.view(torch.int32) + in_each).flatten(1)[:, :count].t().to(dtype)


def _in_words(bits: int, words: Tensor) -> Tensor:
    """The numbers of each word, its lowest bits first, [rows, words, 32 / bits]."""
    values = _bytes(words)
    return values if bits == 8 else torch.stack((values & 15, values >> 4), dim=-1).flatten(2)


def _one_in_each_byte(words: Tensor) -> Tensor:
    """The four codes in the low half of int32 words, one in the low bits of each byte."""
    pairs = (words & 0xFF).bitwise_or_((words & 0xFF00) << 8)
    return (pairs & 0x000F000F).bitwise_or_((pairs & 0x00F000F0) << 4)


def _columns(words: Tensor) -> Tensor:
    """The codes of each word in the order of their columns, [rows, words, 8]."""
    packed = _bytes(words)
    columns = torch.empty(*words.shape, WORD, dtype=torch.uint8, device=words.device)
    columns[..., _LOW_COLUMNS] = packed & 15
    columns[..., _HIGH_COLUMNS] = packed >> 4
    return columns


def _bytes(words: Tensor) -> Tensor:
    return words.contiguous().view(torch.uint8).view(*words.shape, 4)
