"""Small neighbours on the disk: read as one piece, and handed over together where they land side by side.

A checkpoint with one tensor an expert has tens of thousands of matrices that take longer to talk about than to
quantize. Those that follow each other in a file are read at once; gate and up of one expert, neighbours here as there,
become one matrix, and the same rows of one expert after the other become one stack.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from operator import attrgetter

import torch

from ..checkpoint.headers import TensorEntry
from ..checkpoint.pieces import MAX_SHARED_READ, SMALL_PIECE, Piece
from ..checkpoint.workspace import Workspace
from ..errors import NonFiniteWeightError
from ..geometry.regions import Interval, Region
from ..geometry.spans import Span
from ..online.sink import Sink
from .cuts import Part, is_dense
from .plain_delivery import located, matrix

Member = tuple[TensorEntry, Span]

_offset = attrgetter("offset")


@dataclass(slots=True)
class Stack:
    """The same rows and columns of `count` experts, `step` apart in the parameter and `pitch` apart in a buffer.

    `expert` is the first one, `None` for a parameter without experts; `offset` is where its matrix begins. Offsets and
    pitches are in elements.
    """

    parameter: str
    expert: int | None
    rows: Interval
    columns: Interval
    offset: int
    count: int = 1
    step: int = 0
    pitch: int = 0

    @property
    def region(self) -> Region:
        """The first matrix."""
        return Region(self.expert, self.rows, self.columns)

    @property
    def experts(self) -> range:
        """All experts, in the order of their matrices."""
        first = self.expert or 0
        return range(first, first + self.count * self.step, self.step)

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and columns of one matrix."""
        return self.rows[1] - self.rows[0], self.columns[1] - self.columns[0]

    def takes(self, region: Region, offset: int) -> bool:
        """Put another matrix of the same rows and columns at the end, if it stands where the next one would."""
        if self.expert is None or region.expert is None:
            return False
        step, pitch = region.expert - self.expert, offset - self.offset
        if self.count == 1:
            self.step, self.pitch = step, pitch
        if step <= 0 or step != self.count * self.step or pitch != self.count * self.pitch:
            return False
        self.count += 1
        return True


class QuantizedAlone:
    """Tells whether spans are quantized, and need nothing but themselves for it; experts differ in nothing there."""

    def __init__(self, sinks: Mapping[str, Sink]) -> None:
        self._sinks = sinks
        self._known: dict[tuple[str, Interval, Interval], bool] = {}

    def __call__(self, parameter: str, region: Region) -> bool:
        key = (parameter, region.rows, region.columns)
        known = self._known.get(key)
        if known is None:
            sink = self._sinks[parameter]
            known = self._known[key] = not sink.direct and sink.whole(region)
        return known


def may_be_bundled(entry: TensorEntry, spans: Sequence[Span], alone: QuantizedAlone, chunk_bytes: int) -> bool:
    """Whether all of a tensor goes to small matrices without gaps, each to be quantized on its own."""
    limit = min(SMALL_PIECE - 1, chunk_bytes) // entry.dtype.itemsize
    return all(
        is_dense(region, row_stride, column_stride, limit) and alone(parameter, region)
        for parameter, region, _, row_stride, column_stride in spans
    )


class Bundler:
    """Puts small tensors that follow each other in a file into pieces of at most `chunk_bytes`, and those in a list."""

    def __init__(self, pieces: list[Piece], sinks: Mapping[str, Sink], chunk_bytes: int) -> None:
        self._pieces, self._sinks, self._limit = pieces, sinks, min(chunk_bytes, MAX_SHARED_READ)
        self._members: list[Member] = []
        self._file: tuple[int, torch.dtype] | None = None
        self._start = self._stop = 0

    def add(self, entry: TensorEntry, spans: Sequence[Span]) -> None:
        """The next tensor in the order of files and offsets."""
        size = entry.dtype.itemsize
        for span in spans if len(spans) == 1 else sorted(spans, key=_offset):
            begin = entry.offset + span.offset * size
            stop = begin + span.region.numel * size
            follows = begin == self._stop and (entry.shard, entry.dtype) == self._file
            if not follows or stop - self._start > self._limit:
                self.close()
                self._start, self._file = begin, (entry.shard, entry.dtype)
            self._members.append((entry, span))
            self._stop = stop

    def close(self) -> None:
        """What comes next belongs to another piece."""
        if self._members:
            extents = ((self._start, self._stop - self._start),)
            self._pieces.append(Piece(self._members[0][0].shard, extents, BundleDelivery(self._members, self._sinks)))
            self._members, self._file = [], None


class BundleDelivery:
    """Hands the parts of a bundle to the closures of their parameters, in as few calls as they make matrices."""

    __slots__ = ("_calls", "_members")

    def __init__(self, members: list[Member], sinks: Mapping[str, Sink]) -> None:
        self._members = members
        self._calls = [(stack, sinks[stack.parameter]) for stack in stacks([span for _, span in members])]

    def __call__(self, workspace: Workspace) -> None:
        elements = workspace.buffer.view(self._members[0][0].dtype)
        first = elements.storage_offset()
        try:
            for stack, sink in self._calls:
                rows, columns = stack.shape
                if stack.count == 1:
                    piece = elements.as_strided((rows, columns), (columns, 1), first + stack.offset)
                    sink.loader(sink.param, piece, region=stack.region)
                else:
                    shape, strides = (stack.count, rows, columns), (stack.pitch, columns, 1)
                    pieces = elements.as_strided(shape, strides, first + stack.offset)
                    sink.loader.load_experts(pieces, stack.experts, stack.rows, stack.columns)
        except NonFiniteWeightError as error:
            raise self._located(error, workspace) from None

    def _located(self, error: NonFiniteWeightError, workspace: Workspace) -> NonFiniteWeightError:
        """The same error for the first member that is not finite, in the checkpoint's own coordinates."""
        elements, at = workspace.buffer.view(self._members[0][0].dtype), 0
        for entry, span in self._members:
            part = Part(span, span.region, at, span.region.columns[1] - span.region.columns[0], 1)
            bad = ~torch.isfinite(matrix(elements, part, workspace))
            if bad.any():
                row, column = bad.nonzero()[0].tolist()
                error.position = (row, column)
                return located(error, entry, part)
            at += span.region.numel
        return error


def stacks(spans: list[Span]) -> Iterator[Stack]:
    """The calls in which spans that stand one after the other in a buffer are handed over."""
    growing: dict[tuple[str, Interval, Interval], Stack] = {}
    for parameter, region, offset in _joined(spans):
        key = (parameter, region.rows, region.columns)
        stack = growing.get(key)
        if stack is None or not stack.takes(region, offset):
            if stack is not None:
                yield stack
            growing[key] = Stack(parameter, region.expert, region.rows, region.columns, offset)
    yield from growing.values()


def _joined(spans: list[Span]) -> Iterator[tuple[str, Region, int]]:
    """Parameter, region and offset in the buffer of spans, those joined whose rows follow each other there as here."""
    held: tuple[str, Region, int] | None = None
    at = 0
    for parameter, region, *_ in spans:
        joined = None if held is None or held[0] != parameter else _below(held[1], region)
        if held is not None and joined is not None:
            held = parameter, joined, held[2]
        else:
            if held is not None:
                yield held
            held = parameter, region, at
        at += region.numel
    if held is not None:
        yield held


def _below(region: Region, other: Region) -> Region | None:
    """Both as one region, where the rows of the second follow those of the first."""
    expert, rows, columns = region
    if other.expert != expert or other.columns != columns or other.rows[0] != rows[1]:
        return None
    return Region(expert, (rows[0], other.rows[1]), columns)
