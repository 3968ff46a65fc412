"""Cut stored weights into slabs: whole rows of codes, or whole columns, and the parts of parameters they hold."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

from ..errors import UnsupportedCheckpointError
from ..geometry.regions import Interval, Region
from ..geometry.spans import Span
from ..schemes.stored.weights import StoredWeight


class SlabRegion(NamedTuple):
    """A region, and the rows of a slab that it takes; all columns of the slab belong to it."""

    span: Span
    region: Region
    rows: slice


class Slab(NamedTuple):
    """Lines `low` to `high` of a stored weight, rows or columns, and the parts they hold."""

    low: int
    high: int
    parts: tuple[SlabRegion, ...]

    @property
    def lines(self) -> int:
        """How many rows or columns."""
        return self.high - self.low


class Rows(NamedTuple):
    """The rows of a stored weight, those of all its matrices, that a span takes: every `step`-th from `first` on."""

    span: Span
    first: int
    step: int
    taken: int

    def part(self, low: int, high: int) -> SlabRegion | None:
        """What the span takes of rows `low` to `high`, counted from `low`; `None`: nothing."""
        begin = max(-(-(low - self.first) // self.step), 0)
        end = min(-(-(high - self.first) // self.step), self.taken)
        if begin >= end:
            return None
        region, top = self.span.region, self.span.region.rows[0]
        start = self.first + begin * self.step - low
        rows = slice(start, start + (end - begin - 1) * self.step + 1, self.step)
        return SlabRegion(self.span, Region(region.expert, (top + begin, top + end), region.columns), rows)

    def columns_part(self, columns: Interval) -> SlabRegion:
        """What the span takes of some columns of the weight."""
        region, left = self.span.region, self.span.region.columns[0]
        rows = slice(self.first, self.first + (self.taken - 1) * self.step + 1, self.step)
        return SlabRegion(self.span, Region(region.expert, region.rows, (left + columns[0], left + columns[1])), rows)


def rows_of(weight: StoredWeight, span: Span) -> Rows:
    """The rows a span takes; raises `UnsupportedCheckpointError` for a span that takes no whole rows."""
    region, columns = span.region, weight.columns
    count, width = region.rows[1] - region.rows[0], region.columns[1] - region.columns[0]
    first, left = divmod(span.offset, columns)
    step, skew = divmod(span.row_stride, columns) if count > 1 else (1, 0)
    if left or skew or width != columns or (width > 1 and span.column_stride != 1):
        raise UnsupportedCheckpointError(
            f"{weight.name} goes to {span.parameter} with its rows and columns exchanged or cut; codes that are packed "
            f"along a row cannot be rearranged like that: load the checkpoint this one was made from"
        )
    return Rows(span, first, step, count)


def slabs(weight: StoredWeight, spans: Sequence[Span], lines: int) -> Iterator[Slab]:
    """Slabs of at most `lines` rows or columns."""
    taken = [rows_of(weight, span) for span in spans]
    for low in range(0, weight.lines, lines):
        high = min(low + lines, weight.lines)
        if weight.along == "columns":
            parts = tuple(rows.columns_part((low, high)) for rows in taken)
        else:
            parts = tuple(part for part in (rows.part(low, high) for rows in taken) if part is not None)
        if parts:
            yield Slab(low, high, parts)


def slabs_across(weight: StoredWeight, spans: Sequence[Span], rows: int) -> Iterator[Slab]:
    """Slabs of at most so many rows, of a weight that is cut along columns; all of it, whatever spans take."""
    taken = [rows_of(weight, span) for span in spans]
    for low in range(0, weight.rows, rows):
        high = min(low + rows, weight.rows)
        yield Slab(low, high, tuple(part for part in (each.part(low, high) for each in taken) if part is not None))


def lines_per_slab(line_bytes: int, step: int, limit: int) -> int:
    """How many lines fit `limit` bytes, in whole steps and at least one."""
    return max(limit // max(line_bytes, 1) // step, 1) * step
