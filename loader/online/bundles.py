"""Small neighbours on the disk: read as one piece, and handed over together where they land side by side.

A checkpoint with one tensor an expert has tens of thousands of matrices that take longer to talk about than to
quantize. Those that follow each other in a file are read at once; gate and up of one expert, neighbours here as there,
become one matrix, and the same rows of one expert after the other become one stack.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch

from ..checkpoint.headers import TensorEntry
from ..checkpoint.pieces import MAX_SHARED_READ, SMALL_PIECE, Piece
from ..checkpoint.workspace import Workspace
from ..errors import NonFiniteWeightError
from .cuts import Cut, Part, Sink, is_dense
from .delivery import Delivery, located, matrix
from .regions import Interval, Region


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


class Bundle:
    """Parts that fill a range of one file, one after the other; at most `limit` bytes."""

    def __init__(self, entry: TensorEntry, cut: Cut, limit: int) -> None:
        self._shard, self._dtype, self._limit = entry.shard, entry.dtype, min(limit, MAX_SHARED_READ)
        self._start = self._stop = _begin(entry, cut)
        self._members: list[tuple[TensorEntry, Part]] = []
        self.take(entry, cut)

    def take(self, entry: TensorEntry, cut: Cut) -> bool:
        """Put a cut at the end, if it follows on the disk and there is room."""
        begin, (_, length) = _begin(entry, cut), cut.extents[0]
        stop = begin + length * entry.dtype.itemsize
        if begin != self._stop or entry.shard != self._shard or entry.dtype != self._dtype:
            return False
        if self._members and stop - self._start > self._limit:
            return False
        self._stop = stop
        self._members.append((entry, cut.parts[0]))
        return True

    def piece(self, sinks: Mapping[str, Sink]) -> Piece:
        """The piece that reads all of it."""
        deliver: BundleDelivery | Delivery
        if len(self._members) == 1:
            ((entry, part),) = self._members
            deliver = Delivery(entry, [part], sinks, observe=False)
        else:
            deliver = BundleDelivery(self._members, sinks)
        return Piece(self._shard, ((self._start, self._stop - self._start),), deliver)


class BundleDelivery:
    """Hands the parts of a bundle to the closures of their parameters, in as few calls as they make matrices."""

    __slots__ = ("_calls", "_members")

    def __init__(self, members: list[tuple[TensorEntry, Part]], sinks: Mapping[str, Sink]) -> None:
        self._members = members
        self._calls = [(stack, sinks[stack.parameter]) for stack in stacks([part for _, part in members])]

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
        for entry, part in self._members:
            bad = ~torch.isfinite(matrix(elements[at:], part._replace(offset=0), workspace))
            if bad.any():
                row, column = bad.nonzero()[0].tolist()
                error.position = (row, column)
                return located(error, entry, part)
            at += part.region.numel
        return error


def bundled(entry: TensorEntry, cut: Cut, sinks: Mapping[str, Sink]) -> bool:
    """Whether a cut may be part of a bundle: small, without gaps, and to be quantized."""
    if len(cut.parts) != 1 or len(cut.extents) != 1:
        return False
    part = cut.parts[0]
    limit = (SMALL_PIECE - 1) // entry.dtype.itemsize
    return is_dense(part.region, part.row_stride, part.column_stride, limit) and not sinks[part.span.parameter].direct


def stacks(parts: list[Part]) -> Iterator[Stack]:
    """The fewest calls that parts standing one after the other in a buffer can be handed over in."""
    growing: dict[tuple[str, Interval, Interval], Stack] = {}
    for parameter, region, offset in _joined(parts):
        key = (parameter, region.rows, region.columns)
        stack = growing.get(key)
        if stack is None or not stack.takes(region, offset):
            if stack is not None:
                yield stack
            growing[key] = Stack(parameter, region.expert, region.rows, region.columns, offset)
    yield from growing.values()


def _joined(parts: list[Part]) -> Iterator[tuple[str, Region, int]]:
    """Parameter, region and offset in the buffer of parts, those joined whose rows follow each other there as here."""
    held: tuple[str, Region, int] | None = None
    at = 0
    for part in parts:
        parameter, region = part.span.parameter, part.region
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


def _begin(entry: TensorEntry, cut: Cut) -> int:
    return entry.offset + cut.extents[0][0] * entry.dtype.itemsize
