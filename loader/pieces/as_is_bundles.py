"""Small tensors of weights that stay as stored: neighbours in a file are one piece, and copied stack by stack."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from ..checkpoint.headers import TensorEntry
from ..checkpoint.pieces import MAX_SHARED_READ, SMALL_PIECE, Piece
from ..checkpoint.workspace import Workspace
from ..geometry.spans import Span
from ..online.sink import Sink
from ..schemes.stored.weights import StoredWeight
from .stored_parts import PartMatrix
from .stored_stacks import MAX_HOLE, PartStack


class SmallPart(NamedTuple):
    """A tensor of a weight that goes to the model as a whole; `matrix` is that of any weight of its family."""

    entry: TensorEntry
    weight: StoredWeight
    matrix: PartMatrix
    span: Span


class KeptBundler:
    """Gathers small tensors, in any order, and makes pieces of at most `chunk_bytes` of those that are neighbours."""

    def __init__(self, sinks: Mapping[str, Sink], chunk_bytes: int) -> None:
        self._sinks = sinks
        self._largest, self._limit = min(SMALL_PIECE - 1, chunk_bytes), min(chunk_bytes, MAX_SHARED_READ)
        self._parts: list[SmallPart] = []

    def takes(self, nbytes: int) -> bool:
        """Whether a tensor is small."""
        return nbytes <= self._largest

    def add(self, entry: TensorEntry, weight: StoredWeight, matrix: PartMatrix, span: Span) -> None:
        """A tensor of a weight to be read, unless its parameter has no use for it."""
        if matrix.part.only_checked or self._loader(span.parameter, matrix.part.role) is not None:
            self._parts.append(SmallPart(entry, weight, matrix, span))

    def pieces(self) -> Iterator[Piece]:
        """The pieces of all tensors that were added."""
        members: list[SmallPart] = []
        start = stop = 0
        for part in sorted(self._parts, key=lambda part: (part.entry.shard, part.entry.offset)):
            entry = part.entry
            end = entry.offset + entry.nbytes
            near = members and entry.shard == members[0].entry.shard and entry.offset - stop <= MAX_HOLE
            if not near or end - start > self._limit:
                if members:
                    yield self._piece(members, start, stop)
                members, start = [], entry.offset
            members.append(part)
            stop = max(stop, end) if members[1:] else end
        if members:
            yield self._piece(members, start, stop)

    def _piece(self, members: Sequence[SmallPart], start: int, stop: int) -> Piece:
        calls = [(stack, self._loader(parameter, role)) for parameter, role, stack in _stacks(members, start)]
        return Piece(members[0].entry.shard, ((start, stop - start),), KeptDelivery(calls))

    def _loader(self, parameter: str, role: str) -> Any:
        loader = self._sinks[parameter].loader
        return loader.progress.loader(loader.parameter, role)


class KeptDelivery:
    """Hands stacks of stored tensors to the closures of what they go to; what has none is only checked."""

    __slots__ = ("_calls",)

    def __init__(self, calls: list[tuple[PartStack, Any]]) -> None:
        self._calls = calls

    def __call__(self, workspace: Workspace) -> None:
        for stack, loader in self._calls:
            values = stack.values(workspace.buffer)
            if loader is not None:
                loader.load_experts(values, stack.experts, stack.region.rows, stack.region.columns)


def _stacks(members: Sequence[SmallPart], start: int) -> Iterator[tuple[str, str, PartStack]]:
    """Tensors whose first byte in a buffer is byte `start` of a file, in as few stacks as they make."""
    growing: dict[Any, PartStack] = {}
    for entry, weight, matrix, (parameter, region, *_) in members:
        key = id(matrix), parameter, region.rows, region.columns
        stack, offset = growing.get(key), entry.offset - start
        if stack is not None and stack.continues(region, offset):
            stack.append(weight, region, offset)
            continue
        stack = growing[key] = PartStack(matrix, weight, region, offset)
        yield parameter, matrix.part.role, stack
