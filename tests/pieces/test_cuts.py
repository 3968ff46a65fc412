"""What of a tensor is read at once where only some of its columns are wanted."""

from __future__ import annotations

import pytest
import torch
from fake_sink import FakeSink
from quantload.checkpoint.headers import TensorEntry
from quantload.geometry.regions import Region
from quantload.geometry.spans import Span
from quantload.pieces.cuts import Cut, cut_tensor

ROWS, COLUMNS = 12, 40


def cuts_of(*spans: Span, chunk_bytes: int = 1 << 20) -> list[Cut]:
    entry = TensorEntry("t", torch.bfloat16, (ROWS, COLUMNS), 0, 0, ROWS * COLUMNS * 2)
    return list(cut_tensor(entry, spans, {"p": FakeSink()}, chunk_bytes))


def columns(low: int, high: int, first: int = 0) -> Span:
    """Columns of the tensor that are columns `first` on of the parameter."""
    return Span("p", Region(None, (0, ROWS), (first, first + high - low)), low, COLUMNS, 1)


@pytest.mark.parametrize("chunk_bytes", [1 << 20, 100, 8])
def test_columns_of_other_ranks_are_not_read(chunk_bytes: int) -> None:
    cuts = cuts_of(columns(10, 20), chunk_bytes=chunk_bytes)
    read = [place for cut in cuts for start, length in cut.extents for place in range(start, start + length)]
    assert sorted(read) == [row * COLUMNS + column for row in range(ROWS) for column in range(10, 20)]
    if chunk_bytes >= 20:
        assert all(sum(length for _, length in cut.extents) * 2 <= chunk_bytes for cut in cuts)


def test_parts_of_lines_that_are_wanted_together_are_read_together() -> None:
    (cut,) = cuts_of(columns(0, 8), columns(16, 24, first=8))
    assert list(cut.extents) == [(row * COLUMNS, 24) for row in range(ROWS)]
    assert [(part.offset, part.row_stride) for part in cut.parts] == [(0, 24), (16, 24)]


def test_whole_lines_are_one_extent() -> None:
    (cut,) = cuts_of(columns(0, COLUMNS))
    assert list(cut.extents) == [(0, ROWS * COLUMNS)]


def test_every_second_column_is_read_with_its_neighbours() -> None:
    (cut,) = cuts_of(Span("p", Region(None, (0, ROWS), (0, COLUMNS // 2)), 0, COLUMNS, 2))
    assert list(cut.extents) == [(0, ROWS * COLUMNS - 1)]
