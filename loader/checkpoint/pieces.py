"""What a load asks the reader for: pieces of tensors, barriers between them, and how small ones share a read."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import overload

from torch import Tensor

from .workspace import Workspace

SMALL_PIECE = 256 << 10
SMALL_TARGET = 64 << 10
MAX_GAP = 16 << 10
MAX_SHARED_READ = 1 << 20


@dataclass(frozen=True, slots=True)
class Lines(Sequence[tuple[int, int]]):
    """So many `lines`, extents of `length` each, `pitch` apart from `start` on: some columns of a matrix, by rows.

    One object, where a tuple of thousands of lines for each of thousands of pieces would take gigabytes.
    """

    start: int
    pitch: int
    length: int
    lines: int

    def __len__(self) -> int:
        return self.lines

    @overload
    def __getitem__(self, index: int) -> tuple[int, int]: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[tuple[int, int]]: ...
    def __getitem__(self, index: int | slice) -> tuple[int, int] | Sequence[tuple[int, int]]:
        starts = range(self.start, self.start + self.lines * self.pitch, self.pitch)[index]
        return (starts, self.length) if isinstance(starts, int) else [(start, self.length) for start in starts]

    def of_bytes(self, offset: int, itemsize: int) -> Lines:
        """The same in bytes of a file, of elements of a tensor that begins at `offset` there."""
        return Lines(offset + self.start * itemsize, self.pitch * itemsize, self.length * itemsize, self.lines)


class Barrier:
    """Holds pieces back until `count` others were delivered, for tensors that are streamed twice."""

    __slots__ = ("_lock", "_open", "_remaining", "count")

    def __init__(self, count: int) -> None:
        if count < 1:
            raise ValueError(f"a barrier waits for at least 1 piece, not {count}")
        self.count = count
        self._remaining = count
        self._lock = threading.Lock()
        self._open = threading.Event()

    def signal(self) -> None:
        """Counts one delivered piece."""
        with self._lock:
            self._remaining -= 1
            if self._remaining == 0:
                self._open.set()

    def wait(self, seconds: float) -> bool:
        """Whether all signals have come, after at most `seconds`."""
        return self._open.is_set() or self._open.wait(seconds)


@dataclass(slots=True)
class Piece:
    """Bytes to read and whom to give them to.

    `extents`: (file offset, length) in bytes, read back to back into one buffer of at most `chunk_bytes`.
    `deliver` runs in a reader thread while the buffer is in cache. With `target` the bytes go into the 1-D uint8
    tensor it returns, any size, instead of a buffer; `target` is called just before the read, and `deliver` sees that
    tensor. `after` holds the delivery (not the read) back until the barrier is open; `signal` counts a barrier down
    after delivery. Pieces that signal a barrier come before those that wait for it.
    """

    shard: int
    extents: Sequence[tuple[int, int]]
    deliver: Callable[[Workspace], None]
    target: Callable[[], Tensor] | None = None
    after: Barrier | None = None
    signal: Barrier | None = None

    @property
    def nbytes(self) -> int:
        """Bytes of all extents."""
        return sum(length for _, length in self.extents)


@dataclass(slots=True)
class Batch:
    """Pieces handled one after the other by one thread; several share one read of the range [offset, stop)."""

    shard: int
    offset: int
    stop: int
    pieces: list[Piece]

    @property
    def reads(self) -> Sequence[tuple[int, int]]:
        """(file offset, length) in bytes of what is read, in that order."""
        return self.pieces[0].extents if len(self.pieces) == 1 else ((self.offset, self.stop - self.offset),)


def plan_batches(pieces: Sequence[Piece], slot_bytes: int, read_bytes: int = MAX_SHARED_READ) -> list[Batch]:
    """Batches in the order of the pieces; small neighbours of one shard share a batch, the rest stand alone."""
    limit = min(MAX_SHARED_READ, read_bytes, slot_bytes // 2)
    batches: list[Batch] = []
    joinable: Batch | None = None
    for piece in pieces:
        extents = piece.extents
        if len(extents) != 1:
            start = min((offset for offset, _ in extents), default=0)
            stop = max((offset + length for offset, length in extents), default=0)
            batches.append(Batch(piece.shard, start, stop, [piece]))
            joinable = None
            continue
        start, length = extents[0]
        stop = start + length
        small = length < (SMALL_PIECE if piece.target is None else SMALL_TARGET)
        if (
            joinable is not None
            and small
            and joinable.shard == piece.shard
            and 0 <= start - joinable.stop <= MAX_GAP
            and stop - joinable.offset <= limit
        ):
            joinable.pieces.append(piece)
            joinable.stop = stop
            continue
        batch = Batch(piece.shard, start, stop, [piece])
        batches.append(batch)
        joinable = batch if small else None
    return batches


def check_barriers(pieces: Sequence[Piece]) -> None:
    """Raises `ValueError` where a piece waits for signals that do not all come before it: it would wait for ever."""
    signals: dict[int, int] = {}
    for number, piece in enumerate(pieces):
        barrier = piece.after
        if barrier is not None and signals.get(id(barrier), 0) != barrier.count:
            raise ValueError(
                f"piece {number} waits for {barrier.count} signals, but {signals.get(id(barrier), 0)} pieces before "
                "it signal its barrier; put those first and count them"
            )
        if piece.signal is not None:
            signals[id(piece.signal)] = signals.get(id(piece.signal), 0) + 1


def sub_reads(extents: Sequence[tuple[int, int]], step: int) -> Iterator[tuple[int, int, int]]:
    """(position in the buffer, file offset, length) of reads of at most `step` bytes; adjacent extents are joined."""
    position = 0
    start = stop = -1
    for offset, length in (*extents, (-1, 0)):
        if offset == stop:
            stop += length
            continue
        while start < stop:
            count = min(step, stop - start)
            yield position, start, count
            position += count
            start += count
        start, stop = offset, offset + length
