"""What is asked for at once: neighbouring reads of a run as blocks, and for how long each block is held."""

from __future__ import annotations

from array import array
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from ..pieces import MAX_GAP, Lines
from ..source import Reads

REQUEST_BYTES = 8 << 20
"""Most bytes of one request."""
MOST_HOLES = 0.05
"""Most bytes of a request that nobody needs, as a share of those that somebody does."""
LONGEST_HOLE = 1 << 20
SHORTEST_LINE = 64 << 10
"""Lines of a matrix that are shorter are fetched with what lies between them: one request each would take longer."""

_STEP = 64 << 10
_NEVER = 1 << 62


class Blocks:
    """The blocks of some files: ranges of at most `request_bytes` bytes that cover all of what is read."""

    def __init__(self, batches: Iterable[Reads], request_bytes: int) -> None:
        self._needs = [(path, list(_spans(extents))) for path, extents in batches]
        self.paths: list[str] = []
        """The file of each block."""
        self.starts: array[int] = array("q")
        self.stops: array[int] = array("q")
        self._first: dict[str, tuple[int, int]] = {}
        self.needed_bytes = 0
        by_path: dict[str, list[tuple[int, int]]] = {}
        for path, spans in self._needs:
            by_path.setdefault(path, []).extend(spans)
        for path, spans in by_path.items():
            self._cut(path, spans, request_bytes)

    def __len__(self) -> int:
        return len(self.starts)

    def uses(self, batch: int) -> Iterator[int]:
        """The blocks that a batch reads from, in that order; one stands there again when it is come back to."""
        path, spans = self._needs[batch]
        for start, stop in spans:
            yield from self.covering(path, start, stop)

    def covering(self, path: str, start: int, stop: int) -> range:
        """The blocks over a range of a file; raises `KeyError` where there are none."""
        low, high = self._first[path]
        first = bisect_right(self.starts, start, low, high) - 1
        last = bisect_right(self.starts, max(stop - 1, start), low, high) - 1
        if first < low or self.stops[last] < stop:
            raise KeyError(path)
        return range(first, last + 1)

    def nbytes(self, block: int) -> int:
        """Bytes of a block."""
        return self.stops[block] - self.starts[block]

    def forget_batches(self) -> None:
        """Give back what only a schedule is made of."""
        self._needs = []

    @property
    def batches(self) -> int:
        """How many there are."""
        return len(self._needs)

    def _cut(self, path: str, spans: list[tuple[int, int]], request_bytes: int) -> None:
        first = len(self.starts)
        for start, stop, needed in _joined(sorted(spans)):
            self.needed_bytes += needed
            step = _even(stop - start, request_bytes)
            for begin in range(start, stop, step):
                self.paths.append(path)
                self.starts.append(begin)
                self.stops.append(min(begin + step, stop))
        self._first[path] = first, len(self.starts)


def _even(nbytes: int, most: int) -> int:
    """Bytes of parts of at most `most` bytes that are about as large as each other."""
    each = -(-nbytes // -(-nbytes // most))
    return min(-(-each // _STEP) * _STEP, most)


def _spans(extents: Sequence[tuple[int, int]]) -> Iterator[tuple[int, int]]:
    """Ranges (start, stop) of what a batch reads, in order; those side by side as one."""
    if isinstance(extents, Lines) and extents.lines:
        hole = extents.pitch - extents.length
        if hole <= MAX_GAP or extents.length < SHORTEST_LINE:
            yield extents.start, extents.start + (extents.lines - 1) * extents.pitch + extents.length
            return
    start = stop = -1
    for offset, length in extents:
        if offset != stop:
            if start < stop:
                yield start, stop
            start = offset
        stop = offset + length
    if start < stop:
        yield start, stop


def _joined(spans: Iterable[tuple[int, int]]) -> Iterator[tuple[int, int, int]]:
    """Sorted ranges (start, stop, bytes needed), those joined that lie over or near to each other."""
    start = stop = needed = holes = 0
    for begin, end in spans:
        gap = max(begin - stop, 0)
        more = max(end - max(begin, stop), 0)
        if needed and gap <= LONGEST_HOLE and holes + gap <= MOST_HOLES * (needed + more):
            holes, needed, stop = holes + gap, needed + more, max(stop, end)
            continue
        if needed:
            yield start, stop, needed
        start, stop, needed, holes = begin, end, end - begin, 0
    if needed:
        yield start, stop, needed


@dataclass(slots=True)
class Stay:
    """One time that a block is fetched and held, for so many `uses` in a row."""

    block: int
    uses: int = 0


@dataclass(frozen=True, slots=True)
class Schedule:
    """The stays of a run in the order they are fetched, and for each use of a block, batch by batch, its stay."""

    stays: list[Stay]
    of_use: array[int]
    first_use: array[int]
    """Of each batch, and one more for the end."""
    fetched_bytes: int
    most_at_once: int

    def of_batch(self, batch: int) -> array[int]:
        """The stays that a batch reads from, in that order."""
        return self.of_use[self.first_use[batch] : self.first_use[batch + 1]]


def schedule(blocks: Blocks, most: int) -> Schedule:
    """Which blocks are fetched when, if at most `most` of them are held between their uses.

    A block is held until its last use where there is room, else those are let go that are needed again last (Belady's
    rule), and fetched again. That at most `most` stays are held at once in this order keeps a run from waiting for
    itself: whatever is read ahead, the stays of the earliest batch that is not done find room.
    """
    uses, first_use = array("q"), array("q", [0])
    for batch in range(blocks.batches):
        uses.extend(blocks.uses(batch))
        first_use.append(len(uses))
    next_use = array("q", bytes(8 * len(uses)))
    seen: dict[int, int] = {}
    for position in range(len(uses) - 1, -1, -1):
        next_use[position] = seen.get(uses[position], _NEVER)
        seen[uses[position]] = position
    stays: list[Stay] = []
    of_use = array("q", bytes(8 * len(uses)))
    held: dict[int, tuple[int, int]] = {}  # block: its stay, and its next use
    fetched = most_at_once = 0
    for position, block in enumerate(uses):
        known = held.pop(block, None)
        if known is None:
            if len(held) >= most:
                del held[max(held, key=lambda each: held[each][1])]
            known = len(stays), position
            stays.append(Stay(block))
            fetched += blocks.nbytes(block)
        number = known[0]
        stays[number].uses += 1
        of_use[position] = number
        most_at_once = max(most_at_once, len(held) + 1)
        if next_use[position] != _NEVER:
            held[block] = number, next_use[position]
    return Schedule(stays, of_use, first_use, fetched, most_at_once)
