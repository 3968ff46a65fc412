"""Codes unpacked to what was packed, by the rules of the tools written out one code at a time."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st
from quantload.schemes.stored import packing

AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
"""The column whose code stands in each four bits of a word, from the lowest."""

sizes = st.integers(1, 5)
seeds = st.integers(0, 2**31)


def codes(rows: int, columns: int, seed: int) -> torch.Tensor:
    return torch.randint(0, 16, (rows, columns), generator=torch.Generator().manual_seed(seed))


def words(values: torch.Tensor, order: tuple[int, ...]) -> torch.Tensor:
    """Rows of codes in words of eight, the code of column order[i] in bits 4i to 4i + 3."""
    grouped = values.reshape(len(values), -1, 8)
    packed = sum(grouped[..., column] << 4 * i for i, column in enumerate(order))
    return torch.as_tensor(packed).to(torch.int32)


def pairs(values: torch.Tensor) -> torch.Tensor:
    return (values[:, 0::2] | values[:, 1::2] << 4).to(torch.uint8)


def fresh(values: torch.Tensor) -> torch.Tensor:
    return values.clone(memory_format=torch.contiguous_format)


@given(sizes, sizes, seeds)
def test_awq_codes_are_transposed(half: int, groups: int, seed: int) -> None:
    values = codes(2 * half, 8 * groups, seed)
    assert torch.equal(packing.awq_codes(words(values, AWQ_ORDER)), pairs(values.t()))


@given(sizes, sizes, seeds)
def test_awq_zero_points_are_transposed(rows: int, groups: int, seed: int) -> None:
    values = codes(rows, 8 * groups, seed)
    found = packing.column_values(torch.float16)(words(values, AWQ_ORDER))
    assert found.dtype is torch.float16
    assert torch.equal(found, values.t().half())


@given(sizes, sizes, seeds)
def test_quark_codes_are_signed(rows: int, groups: int, seed: int) -> None:
    unsigned = codes(rows, 8 * groups, seed)
    signed = (unsigned - 8) & 15
    assert torch.equal(packing.reordered_codes(words(signed, AWQ_ORDER)), pairs(unsigned))
    assert torch.equal(packing.ordered_codes(words(signed, tuple(range(8)))), pairs(unsigned))


@given(sizes, sizes, seeds)
def test_zero_points_packed_along_rows(groups: int, columns: int, seed: int) -> None:
    values = codes(8 * groups, columns, seed)
    packed = fresh(words(values.t(), tuple(range(8))).t())
    assert torch.equal(packing.row_values(4, torch.bfloat16)(packed), values.bfloat16())


@given(sizes, sizes, seeds)
def test_zero_points_of_eight_bits_packed_along_rows(groups: int, columns: int, seed: int) -> None:
    values = torch.randint(0, 256, (4 * groups, columns), generator=torch.Generator().manual_seed(seed))
    packed = fresh(fresh(values.to(torch.uint8).t()).view(torch.int32).t())
    assert torch.equal(packing.row_values(8, torch.float32)(packed), values.float())


@given(sizes, st.integers(1, 20), seeds)
def test_signed_bytes_become_unsigned(rows: int, columns: int, seed: int) -> None:
    unsigned = codes(rows, columns, seed)
    padded = torch.nn.functional.pad(unsigned, (0, columns % 2))
    assert torch.equal(packing.unsigned_codes(4)((unsigned - 8).to(torch.int8)), pairs(padded))
    assert torch.equal(packing.unsigned_codes(8)((unsigned - 128).to(torch.int8)), unsigned.to(torch.uint8))
    assert torch.equal(packing.unsigned_values(8, torch.float16)((unsigned - 128).to(torch.int8)), unsigned.half())


def test_the_extreme_values_of_a_word() -> None:
    assert packing.unsigned_values(8, torch.float32)(torch.tensor([[-128, 127]], dtype=torch.int8)).tolist() == [
        [0, 255]
    ]
    assert packing.ordered_codes(torch.tensor([[-1]], dtype=torch.int32)).tolist() == [[0x77] * 4]
    assert packing.plain_bytes(3)(torch.tensor([[-1]], dtype=torch.int32)).tolist() == [[255] * 3]
