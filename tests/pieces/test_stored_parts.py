"""Stored tensors seen as matrices: how much of one is read at once."""

from __future__ import annotations

import pytest
import torch
from quantload.checkpoint.headers import TensorEntry
from quantload.kernels.formats import FORMATS
from quantload.pieces.stored_parts import CONVERTED_BYTES, TensorMatrix, codes_of
from quantload.schemes.stored.weights import StoredTensor, StoredWeight

CHUNK = 8 << 20
ROWS, COLUMNS = 16384, 8192


def entry(name: str, dtype: torch.dtype, *shape: int) -> TensorEntry:
    return TensorEntry(name, dtype, shape, 0, 0, dtype.itemsize * torch.Size(shape).numel())


def weight(convert: bool) -> StoredWeight:
    """INT8 codes of 128 MiB, in rows that are converted or not."""
    codes = StoredTensor(
        "codes", entry("w", torch.int8, ROWS, COLUMNS), 1, (lambda stored: stored) if convert else None
    )
    return StoredWeight("w", FORMATS["int8_channel"], None, ROWS, COLUMNS, torch.bfloat16, (codes,))


def test_codes_that_stay_as_they_are_come_in_whole_pieces() -> None:
    assert codes_of(weight(False)).lines_within(CHUNK, 1) * COLUMNS == CHUNK


def test_codes_that_are_converted_come_in_small_pieces() -> None:
    """What a conversion takes is not in the arena."""
    codes = codes_of(weight(True))
    assert codes.lines_within(CHUNK, 1) * COLUMNS == CONVERTED_BYTES
    assert codes.lines_within(CONVERTED_BYTES // 4, 1) * COLUMNS == CONVERTED_BYTES // 4
    assert codes.lines_within(CHUNK, 128) == 128, "whole steps, however large"


@pytest.mark.parametrize("role", ["scale", "zero_point", "must_be_zero", "order"])
def test_scales_and_what_is_checked_come_in_small_pieces(role: str) -> None:
    part = StoredTensor(role, entry("w_scale", torch.float32, ROWS, 64), 1)  # type: ignore[arg-type]
    ranges = list(TensorMatrix(weight(False), part).ranges(CHUNK))
    assert [ranges[0][0], ranges[-1][1]] == [0, ROWS]
    assert all((high - low) * 64 * 4 == CONVERTED_BYTES for low, high in ranges)
