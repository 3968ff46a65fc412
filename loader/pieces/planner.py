"""The one planner of a load and of a conversion: pieces of tensors, in order, of whatever kind their source is.

Where a scale needs more than one piece can hold (a row too long, a transposed tensor, one scale a tensor) the pieces of
that matrix go through twice: maxima first, then codes. Small neighbours are bundled.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import NamedTuple, Protocol, TypeVar

from ..checkpoint.pieces import Barrier, Piece
from ..online.sink import Sink
from .two_passes import Landed, Located, Matrix, Readable, first_pass, matrix_of, read_twice, together

E = TypeVar("E", bound=Located)
C = TypeVar("C", bound=Readable)
E_contra = TypeVar("E_contra", bound=Located, contravariant=True)


class Source(Protocol[E_contra, C]):
    """How tensors of one kind are read: `E` is a tensor in a file, `C` a part of it that is worked on at once."""

    def is_small(self, entry: E_contra) -> bool:
        """Whether a tensor may be bundled with its neighbours: it is small, and its scales are local."""

    def matrices(self, entry: E_contra) -> Iterable[Matrix]:
        """The scale groups that a small tensor lands in."""

    def bundles(self, entries: Sequence[E_contra]) -> Iterable[Piece]:
        """The pieces of small tensors that follow each other in the order of files and offsets."""

    def cut(self, entry: E_contra) -> Sequence[C]:
        """What of a large tensor is worked on at once."""

    def needed_first(self, group: Sequence[E_contra]) -> Iterable[Piece]:
        """Pieces that come before all others of some large tensors: what must be known to make values of them."""

    def observing(self, entry: E_contra, cut: C, observed: Callable[[Landed], bool]) -> Piece | None:
        """The piece that shows the parts that are to be `observed` to closures that need to see all of a matrix first.

        `None`: there is no such part.
        """

    def pieces(self, entry: E_contra, cuts: Sequence[C], after: Barrier | None) -> Iterable[Piece]:
        """The pieces that hand a large tensor over; `after` opens behind those that observed it."""


class Planned(NamedTuple):
    """Pieces, and the bytes of maxima that are held at most while they are read: of one first pass and the next.

    `observed` are the matrices that are read twice, in the order in which their first passes end.
    """

    pieces: list[Piece]
    maxima_bytes: int
    observed: list[Matrix]


def plan(source: Source[E, C], entries: Sequence[E], sinks: Mapping[str, Sink]) -> Planned:
    """Pieces of all tensors, which come by shard and offset; those that need two passes: first pass, second pass."""
    small = {entry.name for entry in entries if source.is_small(entry)}
    cuts = {entry.name: source.cut(entry) for entry in entries if entry.name not in small}
    twice = read_twice(cuts.values(), sinks)
    for entry in entries if twice else ():
        if entry.name in small and not twice.isdisjoint(source.matrices(entry)):
            small.remove(entry.name)
            cuts[entry.name] = source.cut(entry)

    def observed(part: Landed) -> bool:
        return matrix_of(part, sinks) in twice

    def maxima_bytes(group: Sequence[E]) -> int:
        parts = (part for entry in group for cut in cuts[entry.name] for part in cut.parts if observed(part))
        return sum(
            sinks[name].maxima_bytes for name, _ in {(part.span.parameter, part.region.expert) for part in parts}
        )

    pieces: list[Piece] = []
    run: list[E] = []
    order: dict[Matrix, None] = {}
    most = 0
    for group in together(entries, cuts, twice, sinks):
        if group[0].name in small:
            run.append(group[0])
            continue
        pieces += source.bundles(run)
        run = []
        pieces += source.needed_first(group)
        observing = (source.observing(entry, cut, observed) for entry in group for cut in cuts[entry.name])
        barrier = first_pass(observing, pieces)
        if barrier is not None:
            most = max(most, maxima_bytes(group))
            parts = (part for entry in group for cut in cuts[entry.name] for part in cut.parts)
            order |= _in_order(matrix_of(part, sinks) for part in parts)
        for entry in group:
            pieces += source.pieces(entry, cuts[entry.name], barrier)
    pieces += source.bundles(run)
    return Planned(pieces, 2 * most, [matrix for matrix in order if matrix in twice])


def _in_order(matrices: Iterable[Matrix]) -> dict[Matrix, None]:
    """Each once, in the order of their last places."""
    found: dict[Matrix, None] = {}
    for matrix in matrices:
        found.pop(matrix, None)
        found[matrix] = None
    return found
