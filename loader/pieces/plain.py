"""Tensors of values: cut in whole scale blocks of what they land in, or bundled where they are small."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

from ..checkpoint.headers import TensorEntry
from ..checkpoint.pieces import Barrier, Lines, Piece
from ..geometry.spans import Span
from ..online.sink import InPlace, Sink
from .cuts import Cut, cut_tensor
from .plain_bundles import LocalScales, bundles, may_be_bundled
from .plain_delivery import Arrival, Delivery
from .planner import Planned, plan
from .two_passes import Landed, Matrix


def plan_pieces(
    entries: Sequence[TensorEntry],
    spans: Mapping[str, Sequence[Span]],
    sinks: Mapping[str, Sink],
    chunk_bytes: int,
) -> Planned:
    """Pieces of all tensors, by shard and offset; tensors that need two passes come first pass, second pass."""
    return plan(PlainSource(spans, sinks, chunk_bytes), entries, sinks)


class PlainSource:
    """How tensors of values are read (see `planner.Source`)."""

    def __init__(self, spans: Mapping[str, Sequence[Span]], sinks: Mapping[str, Sink], chunk_bytes: int) -> None:
        self._spans, self._sinks, self._chunk_bytes = spans, sinks, chunk_bytes
        self._local = LocalScales(sinks)

    def is_small(self, entry: TensorEntry) -> bool:
        return may_be_bundled(entry, self._spans[entry.name], self._local, self._chunk_bytes)

    def matrices(self, entry: TensorEntry) -> Iterable[Matrix]:
        return [self._sinks[span.parameter].scale_group(span.region.expert) for span in self._spans[entry.name]]

    def bundles(self, entries: Sequence[TensorEntry]) -> Iterator[Piece]:
        return bundles(entries, self._spans, self._sinks, self._chunk_bytes)

    def cut(self, entry: TensorEntry) -> list[Cut]:
        return list(cut_tensor(entry, self._spans[entry.name], self._sinks, self._chunk_bytes))

    def needed_first(self, group: Sequence[TensorEntry]) -> Iterable[Piece]:
        """Nothing: values are what they are."""
        return ()

    def observing(self, entry: TensorEntry, cut: Cut, observed: Callable[[Landed], bool]) -> Piece | None:
        parts = [part for part in cut.parts if observed(part)]
        if not parts:
            return None
        return Piece(entry.shard, _bytes(entry, cut), Delivery(entry, parts, self._sinks, observe=True))

    def pieces(self, entry: TensorEntry, cuts: Sequence[Cut], after: Barrier | None) -> Iterator[Piece]:
        return (self._piece(entry, cut, after) for cut in cuts)

    def _piece(self, entry: TensorEntry, cut: Cut, after: Barrier | None) -> Piece:
        place = self._in_place(entry, cut)
        if place is not None:
            return Piece(entry.shard, _bytes(entry, cut), Arrival(entry, cut.parts[0], place), place.target)
        return Piece(
            entry.shard, _bytes(entry, cut), Delivery(entry, cut.parts, self._sinks, observe=False), after=after
        )

    def _in_place(self, entry: TensorEntry, cut: Cut) -> InPlace | None:
        """How a cut is read straight into its final storage, if it can be."""
        if len(cut.parts) != 1 or len(cut.extents) != 1:
            return None
        (part,) = cut.parts
        if cut.extents[0][1] != part.region.numel or part.column_stride != 1:
            return None
        return self._sinks[part.span.parameter].in_place(entry.dtype, part.region)


def _bytes(entry: TensorEntry, cut: Cut) -> Lines:
    return cut.extents.of_bytes(entry.offset, entry.dtype.itemsize)
