"""From routes to pieces: what is read at once, in which order, and what is read twice.

Where a scale needs more than one piece can hold (a row too long, a transposed tensor, one scale a tensor) the pieces
of that matrix go through twice: maxima first, then codes. Small neighbours are bundled into one piece.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence

from torch import Tensor

from ..checkpoint.headers import TensorEntry
from ..checkpoint.pieces import Barrier, Lines, Piece
from ..checkpoint.workspace import Workspace
from ..geometry.spans import Span
from ..online.sink import Sink
from ..online.weight_loader import DirectWeightLoader
from .cuts import Cut, Part, cut_tensor
from .plain_bundles import Bundler, QuantizedAlone, may_be_bundled
from .plain_delivery import Delivery
from .two_passes import first_pass, read_twice, together


def plan_pieces(
    entries: Sequence[TensorEntry],
    spans: Mapping[str, Sequence[Span]],
    sinks: Mapping[str, Sink],
    chunk_bytes: int,
) -> list[Piece]:
    """Pieces of all tensors, by shard and offset; tensors that need two passes come first pass, second pass."""
    alone = QuantizedAlone(sinks)
    small = {entry.name for entry in entries if may_be_bundled(entry, spans[entry.name], alone, chunk_bytes)}
    cuts = {
        entry.name: list(cut_tensor(entry, spans[entry.name], sinks, chunk_bytes))
        for entry in entries
        if entry.name not in small
    }
    twice = read_twice(cuts.values(), sinks)
    for entry in entries if twice else ():
        if entry.name in small and any((span.parameter, span.region.expert) in twice for span in spans[entry.name]):
            small.remove(entry.name)
            cuts[entry.name] = list(cut_tensor(entry, spans[entry.name], sinks, chunk_bytes))

    def observing(entry: TensorEntry, cut: Cut, parts: tuple[Part, ...]) -> Piece:
        return Piece(entry.shard, _bytes(entry, cut), Delivery(entry, parts, sinks, observe=True))

    pieces: list[Piece] = []
    bundler = Bundler(pieces, sinks, chunk_bytes)
    for group in together(entries, cuts, twice):
        if group[0].name in small:
            bundler.add(group[0], spans[group[0].name])
            continue
        bundler.close()
        barrier = first_pass(group, cuts, twice, observing, pieces)
        pieces.extend(_piece(entry, cut, sinks, barrier) for entry in group for cut in cuts[entry.name])
    bundler.close()
    return pieces


def _piece(entry: TensorEntry, cut: Cut, sinks: Mapping[str, Sink], after: Barrier | None) -> Piece:
    target = _direct(entry, cut, sinks)
    if target is not None:
        return Piece(entry.shard, _bytes(entry, cut), *target)
    return Piece(entry.shard, _bytes(entry, cut), Delivery(entry, cut.parts, sinks, observe=False), after=after)


def _direct(
    entry: TensorEntry, cut: Cut, sinks: Mapping[str, Sink]
) -> tuple[Callable[[Workspace], None], Callable[[], Tensor]] | None:
    """`deliver` and `target` of a piece that can be read straight into its final storage."""
    if len(cut.parts) != 1 or len(cut.extents) != 1:
        return None
    (part,) = cut.parts
    loader = sinks[part.span.parameter].loader
    if not isinstance(loader, DirectWeightLoader) or cut.extents[0][1] != part.region.numel:
        return None
    if part.column_stride != 1 or not loader.accepts_bytes(entry.dtype, part.region):
        return None
    return lambda _: loader.direct_done(part.region), functools.partial(loader.direct_target, part.region)


def _bytes(entry: TensorEntry, cut: Cut) -> Lines:
    return cut.extents.of_bytes(entry.offset, entry.dtype.itemsize)
