"""Matrices that are read twice, maxima first and then codes, because a scale needs more than one piece can hold."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from typing import Protocol, TypeVar

from ..checkpoint.pieces import Barrier, Piece
from ..geometry.regions import Region
from ..geometry.spans import Span
from ..online.sink import Sink

Matrix = Hashable
"""Stands for the matrices that get their scales together."""


class Landed(Protocol):
    """A part of what is read at once: where it lands."""

    @property
    def span(self) -> Span: ...
    @property
    def region(self) -> Region: ...


class Readable(Protocol):
    """What is read at once, in parts."""

    @property
    def parts(self) -> Sequence[Landed]: ...


class Located(Protocol):
    """A tensor of the checkpoint."""

    @property
    def name(self) -> str: ...
    @property
    def shard(self) -> int: ...
    @property
    def offset(self) -> int: ...


E = TypeVar("E", bound=Located)


def read_twice(cuts: Iterable[Sequence[Readable]], sinks: Mapping[str, Sink]) -> set[Matrix]:
    """Matrices with a part whose scales depend on what is not in it."""
    return {
        matrix_of(part, sinks)
        for tensor_cuts in cuts
        for cut in tensor_cuts
        for part in cut.parts
        if not sinks[part.span.parameter].scales_are_local(part.region)
    }


def matrix_of(part: Landed, sinks: Mapping[str, Sink]) -> Matrix:
    """Where a part lands, as far as scales are concerned."""
    return sinks[part.span.parameter].scale_group(part.region.expert)


def first_pass(observing: Iterable[Piece | None], pieces: list[Piece]) -> Barrier | None:
    """Append the pieces of the first pass over a group; the barrier that opens behind them, None if there are none."""
    first = [piece for piece in observing if piece is not None]
    if not first:
        return None
    barrier = Barrier(len(first))
    for piece in first:
        piece.signal = barrier
    pieces.extend(first)
    return barrier


def together(
    entries: Sequence[E], cuts: Mapping[str, Sequence[Readable]], twice: set[Matrix], sinks: Mapping[str, Sink]
) -> Iterator[list[E]]:
    """Tensors in order, those that share a two-pass matrix in one list."""
    if not twice:
        yield from ([entry] for entry in entries)
        return
    members: dict[Matrix, list[str]] = defaultdict(list)
    matrices: dict[str, set[Matrix]] = {}
    for entry in entries:
        of_entry = {matrix_of(part, sinks) for cut in cuts.get(entry.name, ()) for part in cut.parts}
        matrices[entry.name] = of_entry & twice
        for matrix in matrices[entry.name]:
            members[matrix].append(entry.name)
    by_name = {entry.name: entry for entry in entries}
    done: set[str] = set()
    for entry in entries:
        if entry.name in done:
            continue
        group, waiting = [], [entry.name]
        done.add(entry.name)
        while waiting:
            name = waiting.pop()
            group.append(by_name[name])
            fresh = {other for matrix in matrices[name] for other in members[matrix]} - done
            done |= fresh
            waiting.extend(fresh)
        yield sorted(group, key=lambda entry: (entry.shard, entry.offset))
