"""Slabs of stored weights: every row lands where the unquantized tensor's row would, once."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from quantload.checkpoint.headers import TensorEntry
from quantload.errors import UnsupportedCheckpointError
from quantload.geometry.regions import Region
from quantload.geometry.spans import Span
from quantload.kernels.formats import FORMATS
from quantload.pieces.slabs import lines_per_slab, slabs
from quantload.schemes.stored.weights import StoredTensor, StoredWeight
from torch import Tensor


def weight(
    rows: int, columns: int, along: str = "rows", experts: int | None = None, fmt: str = "int8_channel"
) -> StoredWeight:
    codes = TensorEntry("w.codes", torch.int8, (rows, columns), 0, 0, rows * columns)
    part = StoredTensor("codes", codes)
    return StoredWeight("w", FORMATS[fmt], experts, rows, columns, torch.bfloat16, (part,), along=along)  # type: ignore[arg-type]


def taken(stored: StoredWeight, spans: list[Span], lines: int) -> dict[tuple[str, int | None], Tensor]:
    """What arrives of a matrix of distinct numbers, in the coordinates of the regions; -1 where nothing did."""
    numbers = torch.arange(stored.all_rows * stored.columns).view(stored.all_rows, stored.columns)
    found = {
        (span.parameter, span.region.expert): torch.full((64, stored.columns + 8), -1, dtype=torch.long)
        for span in spans
    }
    for slab in slabs(stored, spans, lines):
        assert slab.lines <= lines
        held = numbers[slab.low : slab.high] if stored.along == "rows" else numbers[:, slab.low : slab.high]
        for part in slab.parts:
            target = found[part.span.parameter, part.region.expert]
            target = target[slice(*part.region.rows), slice(*part.region.columns)]
            assert (target == -1).all(), "it arrived twice"
            target.copy_(held[part.rows, part.columns])
    return found


@given(st.integers(1, 12), st.integers(1, 9), st.integers(1, 14), st.sampled_from(["rows", "columns"]))
def test_gate_and_up_that_are_interleaved_come_apart(half: int, columns: int, lines: int, along: str) -> None:
    stored = weight(2 * half, columns, along)
    spans = [
        Span("gate_up", Region(0, (start * half, (start + 1) * half), (0, columns)), start * columns, 2 * columns, 1)
        for start in range(2)
    ]
    got = taken(stored, spans, lines)["gate_up", 0][: 2 * half, :columns]
    numbers = torch.arange(2 * half * columns).view(2 * half, columns)
    assert torch.equal(got, torch.cat([numbers[0::2], numbers[1::2]]))


@given(st.integers(1, 4), st.integers(1, 5), st.integers(1, 9), st.integers(1, 30))
def test_experts_one_below_the_other_come_apart(experts: int, rows: int, columns: int, lines: int) -> None:
    stored = weight(rows, columns, experts=experts)
    size = rows * columns
    spans = [Span("w", Region(e, (0, rows), (0, columns)), e * size, columns, 1) for e in range(experts)]
    got = taken(stored, spans, lines)
    numbers = torch.arange(experts * size).view(experts, rows, columns)
    for expert in range(experts):
        assert torch.equal(got["w", expert][:rows, :columns], numbers[expert])


def test_a_part_that_nothing_takes_is_not_read() -> None:
    span = Span("w", Region(None, (0, 2), (0, 4)), 4 * 4, 4, 1)
    assert [(slab.low, slab.high) for slab in slabs(weight(8, 4), [span], 2)] == [(4, 6)]


@pytest.mark.parametrize(
    "span",
    [
        Span("w", Region(None, (0, 4), (0, 8)), 0, 1, 4),
        Span("w", Region(None, (0, 8), (0, 4)), 2, 4, 1),
        Span("w", Region(None, (0, 6), (0, 4)), 0, 5, 1),
    ],
    ids=["transposed", "shifted", "askew"],
)
def test_what_takes_no_whole_rows_is_refused(span: Span) -> None:
    with pytest.raises(UnsupportedCheckpointError, match="w goes to w with its rows and columns exchanged or cut"):
        list(slabs(weight(8, 4), [span], 2))


@pytest.mark.parametrize("along", ["rows", "columns"])
@pytest.mark.parametrize("lines", [1, 3, 64])
def test_some_columns_come_alone(along: str, lines: int) -> None:
    stored = weight(6, 8, along=along)
    spans = [Span("left", Region(None, (0, 6), (2, 5)), 0, 8, 1), Span("right", Region(None, (0, 6), (0, 4)), 4, 8, 1)]
    got, numbers = taken(stored, spans, lines), torch.arange(48).view(6, 8)
    assert torch.equal(got["left", None][:6, 2:5], numbers[:, :3])
    assert torch.equal(got["right", None][:6, :4], numbers[:, 4:])


@pytest.mark.parametrize(("left", "width", "whole"), [(0, 32, True), (64, 8, True), (16, 32, False), (0, 40, False)])
def test_columns_that_are_no_whole_blocks_are_refused(left: int, width: int, whole: bool) -> None:
    stored, span = weight(2, 72, fmt="mxfp4"), Span("w", Region(None, (0, 2), (0, width)), left, 72, 1)
    if whole:
        assert list(slabs(stored, [span], 2))
    else:
        with pytest.raises(UnsupportedCheckpointError, match="w goes to w with its rows and columns exchanged or cut"):
            list(slabs(stored, [span], 2))


def test_the_rows_of_a_format_that_needs_all_of_them_are_not_cut() -> None:
    stored, span = weight(2, 64, fmt="mxfp4_rows"), Span("w", Region(None, (0, 2), (0, 32)), 0, 64, 1)
    with pytest.raises(UnsupportedCheckpointError, match="exchanged or cut"):
        list(slabs(stored, [span], 2))


@pytest.mark.parametrize(
    ("line_bytes", "step", "limit", "lines"), [(10, 1, 100, 10), (10, 4, 100, 8), (10, 32, 100, 32), (0, 1, 7, 7)]
)
def test_lines_are_whole_steps_and_at_least_one(line_bytes: int, step: int, limit: int, lines: int) -> None:
    assert lines_per_slab(line_bytes, step, limit) == lines
