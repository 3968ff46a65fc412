"""Pieces of stored weights: copied as they are where the model keeps the format, else decoded to float32."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from ..checkpoint.pieces import Barrier, Piece
from ..geometry.spans import Span
from ..online.sink import Sink
from ..schemes.stored.weights import StoredWeight
from .as_is import plan_as_is
from .as_is_bundles import AsIs
from .decoded import DecodedWeight, Dequantize
from .decoded_bundles import DecodedBundler, Member
from .planner import plan
from .slabs import Slab
from .stored_stacks import Families
from .two_passes import Landed, Matrix


@dataclass(frozen=True)
class StoredPieces:
    """Pieces, the bytes of scratch memory the largest one takes, and those of scales and maxima held beside it.

    `observed` are the matrices that are read twice (see `planner.Planned`).
    """

    pieces: list[Piece]
    scratch_bytes: int
    held_bytes: int
    maxima_bytes: int = 0
    observed: Sequence[Matrix] = ()


def plan_stored(
    weights: Sequence[StoredWeight],
    spans: Mapping[str, Sequence[Span]],
    sinks: Mapping[str, Sink],
    as_is: AsIs,
    chunk_bytes: int,
    dequantizer: Callable[[str], Dequantize],
) -> StoredPieces:
    """Pieces of all stored weights.

    Those that go to parameters in `as_is` only are copied; `dequantizer(format name)` gives the kernel for the others.
    """
    copied: list[StoredWeight] = []
    others: list[StoredWeight] = []
    for weight in weights:
        (copied if all(span.parameter in as_is for span in spans[weight.name]) else others).append(weight)
    source = DecodedSource(spans, sinks, chunk_bytes, dequantizer)
    decoded = plan(source, others, sinks)
    pieces = plan_as_is(copied, spans, as_is, chunk_bytes) + decoded.pieces
    return StoredPieces(pieces, source.scratch_bytes, source.held_bytes, decoded.maxima_bytes, decoded.observed)


class DecodedSource:
    """How stored weights that become something else are read (see `planner.Source`): small ones bundled, or by slabs.

    Says afterwards how many bytes of scratch memory the largest piece takes, and of scales the largest group holds.
    """

    def __init__(
        self,
        spans: Mapping[str, Sequence[Span]],
        sinks: Mapping[str, Sink],
        chunk_bytes: int,
        dequantizer: Callable[[str], Dequantize],
    ) -> None:
        self._spans, self._sinks, self._chunk_bytes, self._dequantizer = spans, sinks, chunk_bytes, dequantizer
        self._families = Families()
        self._bundler = DecodedBundler(sinks, chunk_bytes, dequantizer)
        self._small: dict[str, Member] = {}
        self._large: dict[str, DecodedWeight] = {}
        self._scratch_bytes = self._held_bytes = 0

    @property
    def scratch_bytes(self) -> int:
        """Bytes of the float32 values of the largest piece."""
        return max(self._scratch_bytes, self._bundler.scratch_bytes)

    @property
    def held_bytes(self) -> int:
        """Bytes of scales that wait for their codes."""
        return max(self._held_bytes, self._bundler.held_bytes)

    def is_small(self, weight: StoredWeight) -> bool:
        family = self._families.of(weight)
        span = family.whole_span(self._spans[weight.name])
        if span is None or not self._bundler.takes(family, span):
            return False
        self._small[weight.name] = Member(weight, family, span)
        return True

    def matrices(self, weight: StoredWeight) -> Iterable[Matrix]:
        span = self._small[weight.name].span
        return (self._sinks[span.parameter].scale_group(span.region.expert),)

    def bundles(self, weights: Sequence[StoredWeight]) -> Iterator[Piece]:
        return self._bundler.pieces([self._small[weight.name] for weight in weights])

    def cut(self, weight: StoredWeight) -> list[Slab]:
        large = self._large[weight.name] = DecodedWeight(weight, self._dequantizer)
        slabs = large.cut(self._spans[weight.name], self._sinks, self._chunk_bytes)
        self._scratch_bytes = max((self._scratch_bytes, *map(large.scratch_bytes, slabs)))
        return slabs

    def needed_first(self, group: Sequence[StoredWeight]) -> Iterator[Piece]:
        """The scales."""
        members = [self._large[weight.name] for weight in group]
        self._held_bytes = max(self._held_bytes, sum(member.held_bytes for member in members))
        for member in members:
            yield from member.scale_pieces(self._chunk_bytes)

    def observing(self, weight: StoredWeight, slab: Slab, observed: Callable[[Landed], bool]) -> Piece | None:
        parts = [part for part in slab.parts if observed(part)]
        return self._large[weight.name].observing_piece(slab, parts, self._sinks) if parts else None

    def pieces(self, weight: StoredWeight, slabs: Sequence[Slab], after: Barrier | None) -> Iterator[Piece]:
        return self._large[weight.name].pieces(slabs, self._sinks, after)
