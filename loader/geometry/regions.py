"""Which part of a parameter a piece fills, and which parts have arrived."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

from ..errors import MissingWeightsError, RepeatedRegionError

Interval = tuple[int, int]
_GAPS_SHOWN = 8


class Region(NamedTuple):
    """Rows and columns of one matrix of a parameter, in checkpoint-precision coordinates.

    `expert` is the index into the leading dimension of an experts parameter, `None` elsewhere. `rows` and `columns`
    are half-open intervals of the canonical orientation: rows are output features, columns run along K.
    """

    expert: int | None
    rows: Interval
    columns: Interval

    @property
    def numel(self) -> int:
        return (self.rows[1] - self.rows[0]) * (self.columns[1] - self.columns[0])

    def __str__(self) -> str:
        where = "" if self.expert is None else f"expert {self.expert}, "
        return f"{where}rows {self.rows[0]}:{self.rows[1]}, columns {self.columns[0]}:{self.columns[1]}"


class _Rectangle(NamedTuple):
    rows: Interval
    columns: Interval

    def meets(self, other: _Rectangle) -> bool:
        return (
            self.rows[0] < other.rows[1]
            and other.rows[0] < self.rows[1]
            and self.columns[0] < other.columns[1]
            and other.columns[0] < self.columns[1]
        )

    def joined(self, other: _Rectangle) -> _Rectangle | None:
        """The union, where it is a rectangle again."""
        if self.columns == other.columns and (self.rows[1] == other.rows[0] or other.rows[1] == self.rows[0]):
            return _Rectangle((min(self.rows[0], other.rows[0]), max(self.rows[1], other.rows[1])), self.columns)
        if self.rows == other.rows and (self.columns[1] == other.columns[0] or other.columns[1] == self.columns[0]):
            lowest, highest = min(self.columns[0], other.columns[0]), max(self.columns[1], other.columns[1])
            return _Rectangle(self.rows, (lowest, highest))
        return None

    def without(self, hole: _Rectangle) -> list[_Rectangle]:
        """What is left of it outside of another: at most four, that do not overlap."""
        if not self.meets(hole):
            return [self]
        (top, bottom), (left, right) = self.rows, self.columns
        high, low = max(top, hole.rows[0]), min(bottom, hole.rows[1])
        parts = (
            _Rectangle((top, high), self.columns),
            _Rectangle((low, bottom), self.columns),
            _Rectangle((high, low), (left, hole.columns[0])),
            _Rectangle((high, low), (hole.columns[1], right)),
        )
        return [part for part in parts if part.numel > 0]

    @property
    def numel(self) -> int:
        """Elements in it; 0 where its ends are crossed."""
        return max(self.rows[1] - self.rows[0], 0) * max(self.columns[1] - self.columns[0], 0)


class RegionTracker:
    """The set of regions of one parameter that have arrived; safe to use from several threads.

    `experts` matrices (None: one) of `rows` x `columns` elements. A region that arrives twice is an error: every
    element is written exactly once, so what is missing is known exactly and can be named.
    """

    def __init__(self, name: str, experts: int | None, rows: int, columns: int) -> None:
        self.name = name
        self._experts = experts
        self._rows, self._columns = rows, columns
        self._missing = (experts or 1) * rows * columns
        self._claimed: dict[int | None, list[_Rectangle]] = {}
        self._claimed_numel = 0
        self._lock = threading.Lock()

    def claim(self, region: Region) -> None:
        """Reserve a region for writing.

        Raises `RepeatedRegionError` if a part of it was claimed already, `IndexError` if it lies outside.
        """
        self.claim_each((region.expert,), region.rows, region.columns)

    def claim_each(self, experts: Sequence[int | None], rows: Interval, columns: Interval) -> None:
        """Reserve the same rows and columns of several experts, whose ids rise or fall."""
        for expert in (experts[0], experts[-1]):
            self._check_inside(Region(expert, rows, columns))
        new = _Rectangle(rows, columns)
        with self._lock:
            for expert in experts:
                claimed = self._claimed.setdefault(expert, [])
                if any(new.meets(old) for old in claimed):
                    raise RepeatedRegionError(
                        f"{self.name}: {Region(expert, rows, columns)} arrived twice; a part is written once in a "
                        f"load. Announce a reload first, or remove the second tensor"
                    )
                self._insert(claimed, new)
                self._claimed_numel += new.numel

    def commit(self, numel: int) -> bool:
        """Record that so many claimed elements are written; True when they were the last ones."""
        with self._lock:
            self._missing -= numel
            return self._missing == 0

    @property
    def complete(self) -> bool:
        """Whether every element has arrived."""
        return self._missing == 0

    def missing(self) -> Iterator[Region]:
        """The regions that have not arrived: whole rows of each matrix where nothing of the row is there."""
        with self._lock:
            for expert in [None] if self._experts is None else range(self._experts):
                yield from self._gaps(expert, self._claimed.get(expert, []))

    def described_gaps(self) -> Iterator[str]:
        """The regions that have not arrived, with the name of the parameter, for a message."""
        if not self.complete:
            yield from (f"{self.name} {region}" for region in self.missing())

    def reset(self, region: Region | None = None) -> None:
        """Forget what arrived, of one region or of all: it may, and must, arrive again.

        No piece may be on its way meanwhile. What was claimed inside of `region` and never written, as in a load that
        failed, is forgotten too. Raises `IndexError` for a region that lies outside.
        """
        if region is not None:
            self._check_inside(region)
        with self._lock:
            if region is None:
                self._claimed.clear()
                self._claimed_numel = 0
            else:
                hole = _Rectangle(region.rows, region.columns)
                claimed = self._claimed.pop(region.expert, [])
                left = [part for old in claimed for part in old.without(hole)]
                if left:
                    self._claimed[region.expert] = left
                self._claimed_numel += sum(part.numel for part in left) - sum(old.numel for old in claimed)
            self._missing = (self._experts or 1) * self._rows * self._columns - self._claimed_numel

    def arrived(self, region: Region) -> bool:
        """Whether all of a region has been claimed; of a load that failed, that is not to say written."""
        with self._lock:
            left = [_Rectangle(region.rows, region.columns)] if region.numel else []
            for old in self._claimed.get(region.expert, []):
                left = [part for each in left for part in each.without(old)]
        return not left

    def _check_inside(self, region: Region) -> None:
        experts_ok = region.expert is None if self._experts is None else region.expert in range(self._experts)
        rows_ok = 0 <= region.rows[0] <= region.rows[1] <= self._rows
        if not (experts_ok and rows_ok and 0 <= region.columns[0] <= region.columns[1] <= self._columns):
            raise IndexError(
                f"{self.name}: {region} lies outside of {self._experts or 1} x {self._rows} x {self._columns}"
            )

    @staticmethod
    def _insert(seen: list[_Rectangle], new: _Rectangle) -> None:
        merged = True
        while merged:
            merged = False
            for i, old in enumerate(seen):
                union = old.joined(new)
                if union is not None:
                    del seen[i]
                    new, merged = union, True
                    break
        seen.append(new)

    def _gaps(self, expert: int | None, seen: list[_Rectangle]) -> Iterator[Region]:
        edges = sorted({0, self._rows, *(edge for r in seen for edge in r.rows)})
        for low, high in itertools.pairwise(edges):
            at = 0
            for start, stop in sorted(r.columns for r in seen if r.rows[0] <= low and high <= r.rows[1]):
                if at < start:
                    yield Region(expert, (low, high), (at, start))
                at = stop
            if at < self._columns:
                yield Region(expert, (low, high), (at, self._columns))


def check_no_gaps(gaps: Iterable[str], what: str = "parts that never arrived", hint: str = "") -> None:
    """Raise `MissingWeightsError` where there are gaps, as `described_gaps` words them: `what` they are, and a hint."""
    found = list(gaps)
    if found:
        more = f" and {len(found) - _GAPS_SHOWN} more" if len(found) > _GAPS_SHOWN else ""
        raise MissingWeightsError(f"{what}: {'; '.join(found[:_GAPS_SHOWN])}{more}{hint}")
