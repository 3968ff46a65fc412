"""The reader: workers that read pieces in order into reused buffers and deliver them while they are in cache."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
import torch
from numpy.lib.stride_tricks import as_strided
from torch import Tensor

from ..errors import PolicyError
from .arena import rounded_slot
from .crew import Crew, Stopped
from .index import Shard
from .pieces import MAX_GAP, Batch, Lines, Piece, check_barriers, plan_batches, sub_reads
from .source import Source, Turn
from .working_memory import CPU, slots_per_worker, working_memory
from .workspace import ALIGNMENT, WorkingMemory, Workspace

_BARRIER_POLL = 0.05
_READAHEAD_BATCHES = 4


@dataclass(frozen=True, slots=True)
class ReadTotals:
    """What a run read: bytes of its pieces, seconds, and the most bytes of the arena that were ever touched.

    `bytes_between` lie between the lines of pieces, and were read with them.
    """

    bytes_read: int
    seconds: float
    staging_peak_bytes: int
    bytes_between: int = 0


class PieceReader:
    """Reads pieces of `shards` through `source` with up to `workers` threads.

    `run` may be called any number of times; inside of `with reader:` its buffers and open files stay for the next run.
    On a CPU each worker owns one buffer of `chunk_bytes` and, if it asks for it, one scratch buffer of the same size.
    For another `device`, pieces are worked on there, in two buffers and a scratch buffer, behind two on the host. All
    of them come out of `staging_bytes` (default: exactly that much; for the host as for the device), and fewer workers
    run when it holds fewer. Raises `PolicyError` when it holds none. `cancel` ends a run with `LoadCancelledError`;
    `on_progress` gets the bytes read so far, in the thread that called `run`, ten times a second and once at the end.
    """

    def __init__(
        self,
        source: Source,
        shards: Sequence[Shard],
        *,
        workers: int = 1,
        chunk_bytes: int = 8 << 20,
        staging_bytes: int | None = None,
        device: torch.device = CPU,
        cancel: threading.Event | None = None,
        on_progress: Callable[[int], None] | None = None,
    ) -> None:
        minimum = slots_per_worker(device) * rounded_slot(chunk_bytes)
        staging_bytes = workers * minimum if staging_bytes is None else staging_bytes
        if staging_bytes < minimum:
            raise PolicyError(
                f"staging_bytes is {staging_bytes}; pieces of {chunk_bytes} bytes need at least {minimum}: "
                "give more staging_bytes or a smaller chunk_bytes"
            )
        self.workers = max(1, min(workers, staging_bytes // minimum))
        self._device = device
        self._source = source
        self._paths = [shard.path for shard in shards]
        self._chunk_bytes = chunk_bytes
        self._cancel = cancel
        self._on_progress = on_progress
        self._memory: WorkingMemory | None = None
        self._held = contextlib.ExitStack()

    def __enter__(self) -> Self:
        with contextlib.ExitStack() as held:
            held.callback(self._source.close)
            self._memory = held.enter_context(working_memory(self._device, self.workers, self._chunk_bytes))
            self._held = held.pop_all()
        return self

    def __exit__(self, *exc_info: object) -> None:
        """Free the buffers and close the source, as it may be opened again."""
        self._memory = None
        self._held.close()

    def run(self, pieces: Sequence[Piece]) -> ReadTotals:
        """Reads and delivers every piece once.

        Raises the first error of a read or of a `deliver` unchanged. Afterwards, error or not, all threads have ended
        and, outside of `with`, the arena is freed and no file is open.
        """
        check_barriers(pieces)
        self._check_sizes(pieces)
        start = time.perf_counter()
        with contextlib.ExitStack() as held:
            if self._memory is None:
                held.enter_context(self)
            assert self._memory is not None
            work = self._run(pieces, self._memory)
            seconds = time.perf_counter() - start
            peak = self._memory.peak_bytes + self._source.staging_peak_bytes  # of the arena, and of what was read ahead
            return ReadTotals(work.bytes_read, seconds, peak, work.bytes_between)

    def _run(self, pieces: Sequence[Piece], memory: WorkingMemory) -> _Work:
        batches = plan_batches(pieces, memory.slot_bytes, self._source.read_bytes)
        work = _Work(self._source, self._paths, memory, batches)
        crew = Crew(min(self.workers, max(1, len(batches))), self._cancel)
        self._source.expect(((self._paths[each.shard], each.reads) for each in batches), lambda: crew.stopping)
        report = self._on_progress
        crew.work(work.take_part, None if report is None else lambda: report(work.bytes_read))
        if report is not None:
            report(work.bytes_read)
        return work

    def _check_sizes(self, pieces: Sequence[Piece]) -> None:
        for number, piece in enumerate(pieces):
            if piece.target is None and piece.nbytes > self._chunk_bytes:
                raise ValueError(
                    f"piece {number} has {piece.nbytes} bytes, chunk_bytes is {self._chunk_bytes}; "
                    "cut it smaller or give it a target"
                )
            if not 0 <= piece.shard < len(self._paths):
                raise ValueError(f"piece {number} is of shard {piece.shard}, there are {len(self._paths)}")


class _Work:
    """What the workers of one run share."""

    def __init__(self, source: Source, paths: list[str], memory: WorkingMemory, batches: list[Batch]) -> None:
        self.source = source
        self.paths = paths
        self.memory = memory
        self.batches = batches
        # Threads share the iterator: the interpreter makes each step of it atomic.
        self.numbers = iter(range(len(batches)))
        self._tallies: list[_Tally] = []

    @property
    def bytes_read(self) -> int:
        """Bytes read so far by all workers."""
        return sum(tally.bytes_read for tally in tuple(self._tallies))

    @property
    def bytes_between(self) -> int:
        """Bytes that were read with them and are of no piece."""
        return sum(tally.bytes_between for tally in tuple(self._tallies))

    def take_part(self, crew: Crew, number: int) -> None:
        """Takes batches in order until there are none left."""
        with self.memory.workspace() as workspace:
            tally = _Tally()
            self._tallies.append(tally)
            worker = _Worker(self, crew, workspace, tally)
            for index in self.numbers:
                if crew.stopping:
                    raise Stopped
                worker.read_ahead(index)
                worker.handle(index, self.batches[index])


@dataclass(slots=True)
class _Tally:
    """What one worker has read; counted by it alone, so without a lock."""

    bytes_read: int = 0
    bytes_between: int = 0


class _Worker:
    """One thread's part of a run."""

    def __init__(self, work: _Work, crew: Crew, workspace: Workspace, tally: _Tally) -> None:
        self._work = work
        self._crew = crew
        self._source = work.source
        self._turn: Turn
        self._workspace = workspace
        self._tally = tally

    def read_ahead(self, index: int) -> None:
        """Asks for the batch a few places after `index`; the first batch asks for all up to there."""
        first = index + _READAHEAD_BATCHES if index else 1
        for batch in self._work.batches[first : index + _READAHEAD_BATCHES + 1]:
            self._source.prefetch(self._work.paths[batch.shard], batch.offset, batch.stop - batch.offset)

    def handle(self, index: int, batch: Batch) -> None:
        """Reads a batch, the one at `index`, and delivers its pieces."""
        self._turn = self._source.turn(index)
        if len(batch.pieces) > 1:
            self._handle_shared(batch)
        else:
            self._handle_single(batch, batch.pieces[0])

    def _handle_single(self, batch: Batch, piece: Piece) -> None:
        path, nbytes = self._work.paths[batch.shard], piece.nbytes
        if piece.target is None:
            self._fill(path, piece.extents, self._workspace.next_slot().memory)
            buffer = self._workspace.landed(nbytes)
        else:
            buffer = _checked(piece.target(), nbytes)
            if buffer.device.type == "cpu":
                self._fill(path, piece.extents, buffer.numpy().data)
            else:
                self._fill_device(path, piece.extents, buffer)
        self._turn.done()
        # Strided pieces share their pages with the next ones, and a first pass is read again: both stay for now.
        if batch.stop - batch.offset == nbytes and piece.signal is None:
            self._source.release(path, batch.offset, nbytes)
        self._deliver(piece, buffer)

    def _handle_shared(self, batch: Batch) -> None:
        path, span = self._work.paths[batch.shard], batch.stop - batch.offset
        if self._crew.stopping:
            raise Stopped
        self._turn.read_into(path, batch.offset, self._workspace.next_slot().memory[:span])
        self._turn.done()
        shared = self._workspace.landed(span)
        if all(piece.signal is None for piece in batch.pieces):
            self._source.release(path, batch.offset, span)
        for piece in batch.pieces:
            ((offset, nbytes),) = piece.extents
            position = offset - batch.offset
            buffer = shared[position : position + nbytes]
            if piece.target is not None:
                buffer = _checked(piece.target(), nbytes).copy_(buffer)
            elif position % ALIGNMENT:
                buffer = self._workspace.aligned(buffer)
            self._tally.bytes_read += nbytes
            self._deliver(piece, buffer)

    def _fill(self, path: str, extents: Sequence[tuple[int, int]], memory: memoryview) -> None:
        if isinstance(extents, Lines) and 0 < extents.pitch - extents.length <= MAX_GAP:
            self._fill_lines(path, extents, memory)
            return
        for position, offset, count in sub_reads(extents, self._source.read_bytes):
            if self._crew.stopping:
                raise Stopped
            self._turn.read_into(path, offset, memory[position : position + count])
            self._tally.bytes_read += count

    def _fill_lines(self, path: str, lines: Lines, memory: memoryview) -> None:
        """Reads lines with the little that lies between them, as many as there is room for, and moves them together."""
        done, length, pitch = 0, lines.length, lines.pitch
        while done < len(lines):
            if self._crew.stopping:
                raise Stopped
            begin, end = done * length, len(lines) * length
            count = max(min(end - begin, self._source.read_bytes) - length, 0) // pitch + 1
            room = memory[begin : begin + (count - 1) * pitch + length]
            self._turn.read_into(path, lines.start + done * pitch, room)
            move_together(np.frombuffer(room, np.uint8), count, length, pitch)
            done += count
            self._tally.bytes_read += count * length
            self._tally.bytes_between += len(room) - count * length

    def _fill_device(self, path: str, extents: Sequence[tuple[int, int]], target: Tensor) -> None:
        for position, offset, count in sub_reads(extents, min(self._source.read_bytes, self._work.memory.slot_bytes)):
            if self._crew.stopping:
                raise Stopped
            self._turn.read_into(path, offset, self._workspace.next_slot().memory[:count])
            self._workspace.write(target[position : position + count], count)
            self._tally.bytes_read += count

    def _deliver(self, piece: Piece, buffer: Tensor) -> None:
        if piece.after is not None:
            while not piece.after.wait(_BARRIER_POLL):
                if self._crew.stopping:
                    raise Stopped
        self._workspace.buffer = buffer
        piece.deliver(self._workspace)
        self._workspace.delivered()
        if piece.signal is not None:
            piece.signal.signal()


def move_together(found: np.ndarray[Any, np.dtype[np.uint8]], count: int, length: int, pitch: int) -> None:
    """Move `count` lines of `length` bytes, `pitch` apart from the beginning of `found` on, to its beginning.

    As many at once as end before the first of them begins: of lines that overlap with their new places numpy would
    make a copy first, as large as all of them.
    """
    lines, places = as_strided(found, (count, length), (pitch, 1)), found[: count * length].reshape(count, length)
    low = 1
    while low < count:
        high = min(max(low * pitch // length, low + 1), count)
        places[low:high] = lines[low:high]
        low = high


def _checked(target: Tensor, nbytes: int) -> Tensor:
    if target.dtype != torch.uint8 or target.dim() != 1 or target.numel() != nbytes or not target.is_contiguous():
        raise ValueError(
            f"a target is a contiguous 1-D uint8 tensor of the piece's {nbytes} bytes, "
            f"not {target.dtype} of shape {list(target.shape)}"
        )
    return target
