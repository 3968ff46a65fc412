"""Small neighbours on the disk: read as one piece, and handed over together where they land side by side.

A checkpoint with one tensor an expert has tens of thousands of matrices that take longer to talk about than to
quantize. Those that follow each other in a file are read at once; gate and up of one expert, neighbours here as there,
become one matrix, and the same rows of one expert after the other become one stack.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from operator import attrgetter, itemgetter

import torch

from ..checkpoint.headers import TensorEntry
from ..checkpoint.neighbours import Extent, neighbours
from ..checkpoint.pieces import MAX_SHARED_READ, SMALL_PIECE, Piece
from ..checkpoint.workspace import Workspace
from ..errors import NonFiniteWeightError
from ..geometry.regions import Interval, Region
from ..geometry.spans import Span
from ..online.sink import Sink
from .cuts import CutRegion, is_dense
from .plain_delivery import located, matrix
from .stacks import Stack

_offset = attrgetter("offset")


Member = tuple[TensorEntry, Span]
"""A span of a tensor that goes to a small matrix."""
_extent = itemgetter(1)


class LocalScales:
    """Tells whether spans are quantized and their scales are local; experts differ in nothing there."""

    def __init__(self, sinks: Mapping[str, Sink]) -> None:
        self._sinks = sinks
        self._known: dict[tuple[str, Interval, Interval], bool] = {}

    def __call__(self, parameter: str, region: Region) -> bool:
        key = (parameter, region.rows, region.columns)
        known = self._known.get(key)
        if known is None:
            sink = self._sinks[parameter]
            known = self._known[key] = sink.values_dtype is None and sink.scales_are_local(region)
        return known


def may_be_bundled(entry: TensorEntry, spans: Sequence[Span], local: LocalScales, chunk_bytes: int) -> bool:
    """Whether all of a tensor goes to small matrices without gaps, each to be quantized on its own."""
    limit = min(SMALL_PIECE - 1, chunk_bytes) // entry.dtype.itemsize
    return all(
        is_dense(region, row_stride, column_stride, limit) and local(parameter, region)
        for parameter, region, _, row_stride, column_stride in spans
    )


def bundles(
    entries: Sequence[TensorEntry], spans: Mapping[str, Sequence[Span]], sinks: Mapping[str, Sink], chunk_bytes: int
) -> Iterator[Piece]:
    """Small tensors that follow each other in a file, in pieces of at most `chunk_bytes`."""
    located_members = (member for entry in entries for member in _located_members(entry, spans[entry.name]))
    for group in neighbours(located_members, _extent, min(chunk_bytes, MAX_SHARED_READ)):
        start, stop = group[0][1].start, group[-1][1].stop
        members = [member for member, _ in group]
        yield Piece(members[0][0].shard, ((start, stop - start),), BundleDelivery(members, sinks))


def _located_members(
    entry: TensorEntry, spans: Sequence[Span]
) -> Iterator[tuple[Member, Extent[tuple[int, torch.dtype]]]]:
    size, file = entry.dtype.itemsize, (entry.shard, entry.dtype)
    for span in spans if len(spans) == 1 else sorted(spans, key=_offset):
        begin = entry.offset + span.offset * size
        yield (entry, span), Extent(file, begin, begin + span.region.numel * size)


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
                (offset,), (pitch,) = stack.offsets, stack.pitches
                if stack.count == 1:
                    piece = elements.as_strided((rows, columns), (columns, 1), first + offset)
                    sink.load_region(piece, stack.region)
                else:
                    shape, strides = (stack.count, rows, columns), (pitch, columns, 1)
                    pieces = elements.as_strided(shape, strides, first + offset)
                    sink.load_experts(pieces, stack.experts, stack.rows, stack.columns)
        except NonFiniteWeightError as error:
            raise self._located(error, workspace) from None

    def _located(self, error: NonFiniteWeightError, workspace: Workspace) -> NonFiniteWeightError:
        """The same error for the first member that is not finite, in the checkpoint's own coordinates."""
        elements, at = workspace.buffer.view(self._members[0][0].dtype), 0
        for entry, span in self._members:
            part = CutRegion(span, span.region, at, span.region.columns[1] - span.region.columns[0], 1)
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
        if stack is None or not stack.takes(region.expert, (offset,)):
            if stack is not None:
                yield stack
            growing[key] = Stack(parameter, region, (offset,))
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
