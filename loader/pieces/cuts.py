"""Cut checkpoint tensors into contiguous reads that can be quantized on their own.

A cut is made along the slower dimension of the checkpoint tensor, in whole scale blocks of whatever it lands in.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from ..checkpoint.headers import TensorEntry
from ..checkpoint.pieces import Lines
from ..geometry.regions import Interval, Region
from ..geometry.spans import Span
from ..online.sink import Sink


class CutRegion(NamedTuple):
    """A region and where its elements stand in a piece's buffer, in elements."""

    span: Span
    region: Region
    offset: int
    row_stride: int
    column_stride: int


class Cut(NamedTuple):
    """One read of a checkpoint tensor: extents in elements of the tensor, and the parts it holds."""

    extents: Lines
    parts: tuple[CutRegion, ...]


@dataclass(frozen=True, slots=True)
class _Line:
    """A span seen from the checkpoint tensor: outer lines, each of inner elements."""

    span: Span
    along_rows: bool
    outer: int
    outer_stride: int
    inner: int
    inner_stride: int
    outer_align: int
    inner_align: int

    @property
    def width(self) -> int:
        return (self.inner - 1) * self.inner_stride + 1

    @property
    def end(self) -> int:
        return self.span.offset + (self.outer - 1) * self.outer_stride + self.width

    def part(self, outer: Interval, inner: Interval, offset: int, outer_stride: int) -> CutRegion:
        """The part of this span between the given outer and inner indices."""
        region = self.span.region
        rows, columns = (outer, inner) if self.along_rows else (inner, outer)
        strides = (outer_stride, self.inner_stride)
        row_stride, column_stride = strides if self.along_rows else strides[::-1]
        cut = Region(
            region.expert,
            (region.rows[0] + rows[0], region.rows[0] + rows[1]),
            (region.columns[0] + columns[0], region.columns[0] + columns[1]),
        )
        return CutRegion(self.span, cut, offset, row_stride, column_stride)


def _line(span: Span, align: tuple[int, int]) -> _Line:
    rows, columns = span.region.rows[1] - span.region.rows[0], span.region.columns[1] - span.region.columns[0]
    along_rows = columns == 1 or (span.row_stride >= span.column_stride and rows > 0) or rows == 1
    line = (rows, span.row_stride, columns, span.column_stride)
    outer, outer_stride, inner, inner_stride = line if along_rows else (*line[2:], *line[:2])
    # A dimension of one may come with any stride, 0 where a conversion added it; what is read depends on them.
    inner_stride = 1 if inner == 1 else inner_stride
    if outer == 1:
        outer_stride = max(outer_stride, (inner - 1) * inner_stride + 1)
    return _Line(span, along_rows, outer, outer_stride, inner, inner_stride, *(align if along_rows else align[::-1]))


def cut_tensor(entry: TensorEntry, spans: Sequence[Span], sinks: Mapping[str, Sink], chunk_bytes: int) -> Iterator[Cut]:
    """Cuts of one checkpoint tensor, each at most `chunk_bytes` where the scale blocks allow it."""
    limit = max(chunk_bytes // entry.dtype.itemsize, 1)
    lines = sorted((_line(span, sinks[span.parameter].align) for span in spans), key=lambda line: line.span.offset)
    for group in _groups(lines):
        step = max(line.outer_align for line in group)
        pitch = _pitch(group)
        if step * pitch <= limit or group[0].outer * pitch <= limit:
            yield from _bands(group, step, pitch, limit)
        else:
            for line in group:
                yield from _tiles(line, limit)


def _groups(lines: list[_Line]) -> Iterator[list[_Line]]:
    """Spans whose lines run side by side through the same bytes, such as two halves that are interleaved."""
    group: list[_Line] = []
    for line in lines:
        if group and _side_by_side(group, line):
            group.append(line)
        else:
            if group:
                yield group
            group = [line]
    if group:
        yield group


def _side_by_side(group: list[_Line], line: _Line) -> bool:
    first = group[0]
    same = (line.along_rows, line.outer, line.outer_stride) == (first.along_rows, first.outer, first.outer_stride)
    return same and line.span.offset + line.width - first.span.offset <= first.outer_stride


def _width(group: list[_Line]) -> int:
    return max(line.span.offset + line.width for line in group) - group[0].span.offset


def _pitch(group: list[_Line]) -> int:
    """How far apart lines stand in a buffer: as in the file, or without the columns there that are not wanted."""
    width, stride = _width(group), group[0].outer_stride
    return width if stride - width >= max(line.inner_stride for line in group) else stride


def _bands(group: list[_Line], step: int, pitch: int, limit: int) -> Iterator[Cut]:
    first = group[0]
    start, stride, width = first.span.offset, first.outer_stride, _width(group)
    lines_per_cut = max(limit // max(pitch, 1) // step, 1) * step
    for low in range(0, first.outer, lines_per_cut):
        high = min(low + lines_per_cut, first.outer)
        parts = tuple(line.part((low, high), (0, line.inner), line.span.offset - start, pitch) for line in group)
        length = (high - low - 1) * pitch + width
        together = Lines(start + low * stride, length, length, 1)
        yield Cut(together if pitch == stride else Lines(start + low * stride, stride, width, high - low), parts)


def _tiles(line: _Line, limit: int) -> Iterator[Cut]:
    """Cut the inner dimension as well: one extent a line, packed one after the other in the buffer."""
    per_line = max(limit // line.outer_align // line.inner_stride // line.inner_align, 1) * line.inner_align
    for low in range(0, line.outer, line.outer_align):
        high = min(low + line.outer_align, line.outer)
        for left in range(0, line.inner, per_line):
            right = min(left + per_line, line.inner)
            length = (right - left - 1) * line.inner_stride + 1
            begin = line.span.offset + left * line.inner_stride
            extents = Lines(begin + low * line.outer_stride, line.outer_stride, length, high - low)
            yield Cut(extents, (line.part((low, high), (left, right), 0, length),))


def is_dense(region: Region, row_stride: int, column_stride: int, limit: int) -> bool:
    """Whether a region stands in the checkpoint row after row without gaps, in at most `limit` elements."""
    rows, columns = region.rows[1] - region.rows[0], region.columns[1] - region.columns[0]
    return rows * columns <= limit and column_stride == 1 and (row_stride == columns or rows == 1)
