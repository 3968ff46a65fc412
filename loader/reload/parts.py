"""Where a tensor, or a part of one, that was handed over in memory lands: views of it, and the regions they fill."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

from torch import Tensor

from ..geometry.regions import Region
from ..geometry.spans import Span
from ..online.sink import Sink
from ..online.weight_loader import OnlineWeightLoader


class Landed(NamedTuple):
    """A matrix that was handed over: where it goes, as the closure there counts, and its values, of any strides."""

    span: Span
    sink: Sink
    region: Region
    values: Tensor


def landed(
    tensor: Tensor, shape: Sequence[int], start: Sequence[int], spans: Sequence[Span], sinks: Mapping[str, Sink]
) -> list[Landed] | None:
    """What a part of a tensor of `shape` fills, whose first element is that at `start`.

    `None` for one that cannot be handed on alone: it is no run of whole rows of what it lands in, or cuts through what
    must not be cut.
    """
    flat = tensor.reshape(-1)
    first = _flat_start(shape, start, tensor.shape)
    if first is None:
        return None
    found: list[Landed] = []
    for span in spans:
        part = _within(span, first, first + flat.numel())
        if part is None:
            return None
        if part.numel == 0:
            continue
        sink, whole = sinks[span.parameter], span.region
        if part != whole and not _may_be_cut(sink, part):
            return None
        row, column = part.rows[0] - whole.rows[0], part.columns[0] - whole.columns[0]
        offset = span.offset + row * span.row_stride + column * span.column_stride - first
        size = part.rows[1] - part.rows[0], part.columns[1] - part.columns[0]
        view = flat.as_strided(size, (span.row_stride, span.column_stride), flat.storage_offset() + offset)
        found.append(Landed(span, sink, part, view))
    return found


def pieces(part: Landed, chunk_bytes: int) -> Iterator[Landed]:
    """The same, a few rows at a time: whole blocks of scales, of at most `chunk_bytes` where those allow it."""
    _, sink, region, values = part
    rows, columns = values.shape
    align = sink.align[0]
    step = max(chunk_bytes // max(columns * values.element_size(), 1) // align, 1) * align
    for low in range(0, rows, step):
        high = min(low + step, rows)
        inside = Region(region.expert, (region.rows[0] + low, region.rows[0] + high), region.columns)
        yield part._replace(region=inside, values=values[low:high])


def _flat_start(shape: Sequence[int], start: Sequence[int], extents: Sequence[int]) -> int | None:
    """The flat index of the first element of a part that is one run of elements of its tensor; `None` for others."""
    if math.prod(extents) == math.prod(shape):
        return 0
    sliced = [dim for dim, (own, whole) in enumerate(zip(extents, shape, strict=True)) if own != whole]
    if any(own != 1 for own in extents[: sliced[-1]]):
        return None
    flat = 0
    for extent, at in zip(shape, start, strict=True):
        flat = flat * extent + at
    return flat


def _within(span: Span, first: int, stop: int) -> Region | None:
    """The part of a span that lies within a run of elements, in whole lines of it; `None` where a line is cut."""
    region = span.region
    rows, columns = region.rows[1] - region.rows[0], region.columns[1] - region.columns[0]
    by_rows = columns == 1 or rows == 1 or span.row_stride >= span.column_stride
    lines, pitch, width = rows, span.row_stride, (columns - 1) * span.column_stride + 1
    if not by_rows:
        lines, pitch, width = columns, span.column_stride, (rows - 1) * span.row_stride + 1
    ends = span.offset, span.offset + (lines - 1) * pitch + width
    if first <= ends[0] and ends[1] <= stop:
        return region
    if stop <= ends[0] or ends[1] <= first:
        return Region(region.expert, (region.rows[0],) * 2, (region.columns[0],) * 2)
    if lines == 1 or width > pitch:
        return None
    low = max(-(-(first - span.offset) // pitch), 0)
    high = min((stop - width - span.offset) // pitch + 1, lines)
    before, behind = span.offset + (low - 1) * pitch + width, span.offset + high * pitch
    if low > high or (low > 0 and before > first) or (high < lines and behind < stop):
        return None
    part = (region.rows[0] + low, region.rows[0] + high), region.columns
    if not by_rows:
        part = region.rows, (region.columns[0] + low, region.columns[0] + high)
    return Region(region.expert, *part)


def _may_be_cut(sink: Sink, region: Region) -> bool:
    """Whether a part of a parameter may come alone: it is whole blocks of scales and whole bytes of codes.

    What is scaled by one number, a row or a matrix, may be cut anywhere, unless maxima of its parts do not tell it.
    """
    if sink.values_dtype is not None:
        return True
    if not isinstance(sink, OnlineWeightLoader):
        return False
    layout = sink.parameter.layout
    first = max(border for border in layout.shard_borders() if border <= region.rows[0])
    last = min(border for border in layout.shard_borders() if border >= region.rows[1])
    rows, columns = sink.align
    by_rows = (region.rows[0] - first) % rows == 0 and (region.rows[1] == last or (region.rows[1] - first) % rows == 0)
    left, right = region.columns
    return by_rows and left % columns == 0 and (right == layout.columns or right % columns == 0)
