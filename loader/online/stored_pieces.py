"""Pieces of stored weights: copied where the model keeps the format, through float32 where it does not."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ..checkpoint.pieces import Piece
from ..model.routes import Span
from ..schemes.stored.weights import StoredWeight
from .cuts import Sink
from .dequantized_pieces import Dequantize, DequantizedWeight
from .kept_pieces import plan_kept
from .slabs import Slab
from .stored import StoredCodesLoader
from .two_passes import first_pass, read_twice, together


@dataclass
class StoredPieces:
    """Pieces, the bytes of scratch memory the largest one takes, and the bytes of scales that are held beside it."""

    pieces: list[Piece] = field(default_factory=list)
    scratch_bytes: int = 0
    held_bytes: int = 0


def plan_stored(
    weights: Sequence[StoredWeight],
    spans: Mapping[str, Sequence[Span]],
    sinks: Mapping[str, Sink],
    chunk_bytes: int,
    dequantizer: Callable[[str], Dequantize],
) -> StoredPieces:
    """Pieces of all stored weights; `dequantizer(format name)` gives the kernel for those that are not kept."""
    planned = StoredPieces()
    others: list[DequantizedWeight] = []
    for weight in weights:
        loaders = [sinks[span.parameter].loader for span in spans[weight.name]]
        if all(isinstance(loader, StoredCodesLoader) for loader in loaders):
            planned.pieces.extend(plan_kept(weight, spans[weight.name], sinks, chunk_bytes))
        else:
            others.append(DequantizedWeight(weight, dequantizer(weight.format.name)))
    _plan_dequantized(others, spans, sinks, chunk_bytes, planned)
    return planned


def _plan_dequantized(
    weights: Sequence[DequantizedWeight],
    spans: Mapping[str, Sequence[Span]],
    sinks: Mapping[str, Sink],
    chunk_bytes: int,
    planned: StoredPieces,
) -> None:
    cuts = {weight.name: weight.cut(spans[weight.name], sinks, chunk_bytes) for weight in weights}
    twice = read_twice(cuts.values(), sinks)

    def observing(weight: DequantizedWeight, slab: Slab, parts: tuple[Any, ...]) -> Piece:
        return weight.observing_piece(slab, parts, sinks)

    for group in together(weights, cuts, twice):
        for weight in group:
            planned.pieces += weight.scale_pieces(chunk_bytes)
        barrier = first_pass(group, cuts, twice, observing, planned.pieces)
        for weight in group:
            planned.pieces += [weight.piece(slab, sinks, barrier) for slab in cuts[weight.name]]
        planned.held_bytes = max(planned.held_bytes, sum(weight.held_bytes for weight in group))
    planned.scratch_bytes = max((w.scratch_bytes(slab) for w in weights for slab in cuts[w.name]), default=0)
