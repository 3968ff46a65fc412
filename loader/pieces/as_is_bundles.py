"""Small tensors of weights that stay as stored: neighbours in a file are one piece, and copied stack by stack."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

from ..checkpoint.headers import TensorEntry
from ..checkpoint.neighbours import Extent, neighbours
from ..checkpoint.pieces import MAX_SHARED_READ, SMALL_PIECE, Piece
from ..checkpoint.workspace import Workspace
from ..geometry.regions import Interval
from ..geometry.spans import Span
from ..online.sink import Sink
from ..schemes.stored.weights import Role, StoredWeight
from .stored_parts import TensorMatrix
from .stored_stacks import MAX_HOLE, StoredStack

AsIs = Mapping[str, Mapping[Role, Sink]]
"""Of parameters that stay as stored, by name: what takes each of their tensors."""


class SmallTensor(NamedTuple):
    """A tensor of a weight that goes to the model as a whole; `matrix` is that of any weight of its family."""

    entry: TensorEntry
    weight: StoredWeight
    matrix: TensorMatrix
    span: Span

    @property
    def extent(self) -> Extent[int]:
        """Where it is."""
        return Extent(self.entry.shard, self.entry.offset, self.entry.offset + self.entry.nbytes)


class AsIsBundler:
    """Gathers small tensors, in any order, and makes pieces of at most `chunk_bytes` of those that are neighbours."""

    def __init__(self, as_is: AsIs, chunk_bytes: int) -> None:
        self._as_is = as_is
        self._largest, self._limit = min(SMALL_PIECE - 1, chunk_bytes), min(chunk_bytes, MAX_SHARED_READ)
        self._parts: list[SmallTensor] = []

    def takes(self, nbytes: int) -> bool:
        """Whether a tensor is small."""
        return nbytes <= self._largest

    def add(self, entry: TensorEntry, weight: StoredWeight, matrix: TensorMatrix, span: Span) -> None:
        """A tensor of a weight to be read, unless its parameter has no use for it."""
        if matrix.part.only_checked or matrix.part.role in self._as_is[span.parameter]:
            self._parts.append(SmallTensor(entry, weight, matrix, span))

    def pieces(self) -> Iterator[Piece]:
        """The pieces of all tensors that were added."""
        parts = sorted(self._parts, key=lambda part: (part.entry.shard, part.entry.offset))
        for group in neighbours(parts, lambda part: part.extent, self._limit, MAX_HOLE, overlap=True):
            start, stop = group[0].extent.start, max(part.extent.stop for part in group)
            calls = [
                (stack, self._as_is[stack.stack.parameter].get(stack.matrices[0].part.role))
                for stack in _stacks(group, start)
            ]
            yield Piece(group[0].entry.shard, ((start, stop - start),), AsIsDelivery(calls))


class AsIsDelivery:
    """Hands stacks of stored tensors to the closures of what they go to; what has none is only checked."""

    __slots__ = ("_calls",)

    def __init__(self, calls: list[tuple[StoredStack, Sink | None]]) -> None:
        self._calls = calls

    def __call__(self, workspace: Workspace) -> None:
        for stored, sink in self._calls:
            values = stored.values(0, workspace.buffer)
            if sink is not None:
                sink.load_experts(values, stored.stack.experts, stored.stack.rows, stored.stack.columns)


def _stacks(members: Sequence[SmallTensor], start: int) -> Iterator[StoredStack]:
    """Tensors whose first byte in a buffer is byte `start` of a file, in as few stacks as they make."""
    growing: dict[tuple[int, str, Interval, Interval], StoredStack] = {}
    for entry, weight, matrix, span in members:
        key = id(matrix), span.parameter, span.region.rows, span.region.columns
        stack, offsets = growing.get(key), (entry.offset - start,)
        if stack is None or not stack.takes(weight, span, offsets):
            stack = growing[key] = StoredStack((matrix,), weight, span, offsets)
            yield stack
