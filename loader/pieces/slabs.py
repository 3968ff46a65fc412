"""Cut stored weights into slabs: whole rows of codes, or whole columns, and the parts of parameters they hold."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from ..errors import UnsupportedCheckpointError
from ..geometry.regions import Region
from ..geometry.spans import Span
from ..schemes.stored.weights import StoredWeight


class SlabRegion(NamedTuple):
    """A region, and the rows and columns of a slab that it takes."""

    span: Span
    region: Region
    rows: slice
    columns: slice


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
    """The rows of a stored weight, those of all its matrices, that a span takes: every `step`-th from `first` on.

    Of each it takes the columns from `left` on, all of them unless ranks divide the weight.
    """

    span: Span
    first: int
    step: int
    taken: int
    left: int

    @property
    def right(self) -> int:
        """The column behind the last."""
        columns = self.span.region.columns
        return self.left + columns[1] - columns[0]

    def part(self, low: int, high: int) -> SlabRegion | None:
        """What the span takes of rows `low` to `high`, counted from `low`; `None`: nothing."""
        begin = max(-(-(low - self.first) // self.step), 0)
        end = min(-(-(high - self.first) // self.step), self.taken)
        if begin >= end:
            return None
        region, top = self.span.region, self.span.region.rows[0]
        start = self.first + begin * self.step - low
        rows = slice(start, start + (end - begin - 1) * self.step + 1, self.step)
        taken = Region(region.expert, (top + begin, top + end), region.columns)
        return SlabRegion(self.span, taken, rows, slice(self.left, self.right))

    def columns_part(self, low: int, high: int) -> SlabRegion | None:
        """What the span takes of columns `low` to `high` of the weight, counted from `low`; `None`: nothing."""
        begin, end = max(low, self.left), min(high, self.right)
        if begin >= end:
            return None
        region, moved = self.span.region, self.span.region.columns[0] - self.left
        rows = slice(self.first, self.first + (self.taken - 1) * self.step + 1, self.step)
        taken = Region(region.expert, region.rows, (begin + moved, end + moved))
        return SlabRegion(self.span, taken, rows, slice(begin - low, end - low))


def rows_of(weight: StoredWeight, span: Span) -> Rows:
    """The rows a span takes; raises `UnsupportedCheckpointError` for a span that takes no whole blocks of rows."""
    region, columns = span.region, weight.columns
    count, width = region.rows[1] - region.rows[0], region.columns[1] - region.columns[0]
    first, left = divmod(span.offset, columns)
    step, skew = divmod(span.row_stride, columns) if count > 1 else (1, 0)
    if _cuts_blocks(weight, left, width) or skew or left + width > columns or (width > 1 and span.column_stride != 1):
        raise UnsupportedCheckpointError(
            f"{weight.name} goes to {span.parameter} with its rows and columns exchanged or cut; codes that are packed "
            f"along a row cannot be rearranged like that: load the checkpoint this one was made from"
        )
    return Rows(span, first, step, count, left)


def _cuts_blocks(weight: StoredWeight, left: int, width: int) -> bool:
    """Whether `width` columns from `left` on are not whole blocks of codes and scales of a weight."""
    fmt, right = weight.format, left + width
    step = math.lcm(fmt.packed, *(scale.block_cols for scale in fmt.scales if scale.block_cols))
    aligned = left % step == 0 and (right % step == 0 or right == weight.columns)
    return not aligned or (fmt.whole_rows and width != weight.columns)


def slabs(weight: StoredWeight, spans: Sequence[Span], lines: int) -> Iterator[Slab]:
    """Slabs of at most `lines` rows or columns."""
    taken = [rows_of(weight, span) for span in spans]
    for low in range(0, weight.lines, lines):
        high = min(low + lines, weight.lines)
        if weight.along == "columns":
            found = [rows.columns_part(low, high) for rows in taken]
        else:
            found = [rows.part(low, high) for rows in taken]
        parts = tuple(part for part in found if part is not None)
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
