"""Pieces of stored weights: copied where the model keeps the format, through float32 where it does not."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ..checkpoint.pieces import Piece
from ..geometry.spans import Span
from ..online.as_stored import StoredCodesLoader
from ..online.sink import Sink
from ..schemes.stored.weights import StoredWeight
from .as_is import plan_kept
from .decoded import Dequantize, DequantizedWeight
from .decoded_bundles import DequantizedBundler, Member
from .slabs import Slab
from .stored_stacks import Families
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
    keeps = {parameter: isinstance(sink.loader, StoredCodesLoader) for parameter, sink in sinks.items()}
    kept: list[StoredWeight] = []
    others: list[StoredWeight] = []
    for weight in weights:
        (kept if all(keeps[span.parameter] for span in spans[weight.name]) else others).append(weight)
    planned = StoredPieces(plan_kept(kept, spans, sinks, chunk_bytes))
    _plan_dequantized(others, spans, sinks, chunk_bytes, dequantizer, planned)
    return planned


def _plan_dequantized(
    weights: Sequence[StoredWeight],
    spans: Mapping[str, Sequence[Span]],
    sinks: Mapping[str, Sink],
    chunk_bytes: int,
    dequantizer: Callable[[str], Dequantize],
    planned: StoredPieces,
) -> None:
    """Add the pieces of weights that become something else: small neighbours bundled, the others slab by slab."""
    bundler = DequantizedBundler(planned.pieces, sinks, chunk_bytes, dequantizer)
    families, small = Families(), {}
    for weight in weights:
        family = families.of(weight)
        span = family.whole_span(spans[weight.name])
        if span is not None and bundler.takes(family, span):
            small[weight.name] = Member(weight, family, span)
    large = {weight.name: DequantizedWeight(weight, dequantizer) for weight in weights if weight.name not in small}
    cuts = {name: weight.cut(spans[name], sinks, chunk_bytes) for name, weight in large.items()}
    twice = read_twice(cuts.values(), sinks)
    for name in [name for name, member in small.items() if twice and member.matrix in twice]:
        large[name] = DequantizedWeight(small.pop(name).weight, dequantizer)
        cuts[name] = large[name].cut(spans[name], sinks, chunk_bytes)

    def observing(weight: StoredWeight, slab: Slab, parts: tuple[Any, ...]) -> Piece:
        return large[weight.name].observing_piece(slab, parts, sinks)

    for group in together(weights, cuts, twice):
        if group[0].name in small:
            bundler.add(small[group[0].name])
            continue
        bundler.close()
        for weight in group:
            planned.pieces += large[weight.name].scale_pieces(chunk_bytes)
        barrier = first_pass(group, cuts, twice, observing, planned.pieces)
        for weight in group:
            planned.pieces += large[weight.name].pieces(cuts[weight.name], sinks, barrier)
        planned.held_bytes = max(planned.held_bytes, sum(large[weight.name].held_bytes for weight in group))
    bundler.close()
    planned.held_bytes = max(planned.held_bytes, bundler.held_bytes)
    slabs = (weight.scratch_bytes(slab) for name, weight in large.items() for slab in cuts[name])
    planned.scratch_bytes = max(slabs, default=0)
    planned.scratch_bytes = max(planned.scratch_bytes, bundler.scratch_bytes)
