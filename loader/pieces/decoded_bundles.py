"""Small stored weights that become something else: neighbours are read at once and go through float32 as one.

The tensors of each role stand one after the other in a file, or alternate with those of the others. What lies together
is read together; scales that lie elsewhere come first, and are held until the codes have come.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..checkpoint.headers import TensorEntry
from ..checkpoint.neighbours import Extent, neighbours
from ..checkpoint.pieces import MAX_SHARED_READ, SMALL_PIECE, Barrier, Piece
from ..checkpoint.workspace import Workspace
from ..geometry.regions import Interval
from ..geometry.spans import Span
from ..online.sink import Sink
from ..schemes.stored.weights import Role, StoredWeight, scale_role
from .decoded import Dequantize
from .plain_bundles import LocalScales
from .stored_stacks import MAX_HOLE, Family, StoredStack

MAX_VALUES = 4 * MAX_SHARED_READ
"""Bytes of the float32 values of a bundle: they are worked on while they are in cache."""


class Member(NamedTuple):
    """A weight, and the only span that takes anything of it: all of it."""

    weight: StoredWeight
    family: Family
    span: Span


class DecodedBundler:
    """Makes pieces of small weights that follow each other.

    Says afterwards how many bytes of scratch memory the largest piece takes, and of scales the largest bundle holds.
    """

    def __init__(self, sinks: Mapping[str, Sink], chunk_bytes: int, dequantizer: Callable[[str], Dequantize]) -> None:
        self._sinks, self._dequantizer = sinks, dequantizer
        self._local = LocalScales(sinks)
        self._limit, self._values_limit = min(chunk_bytes, MAX_SHARED_READ), min(chunk_bytes, MAX_VALUES)
        self.scratch_bytes = self.held_bytes = 0

    def takes(self, family: Family, span: Span) -> bool:
        """Whether a weight is small, and its scales are local."""
        small = family.nbytes < SMALL_PIECE and family.nbytes <= self._limit
        fits = small and family.values_bytes <= self._values_limit
        return fits and self._local(span.parameter, span.region)

    def pieces(self, members: Iterable[Member]) -> Iterator[Piece]:
        """The pieces of weights in the order of files and offsets."""
        group: list[Member] = []
        reads: list[Extent[int]] = []
        nbytes = values_bytes = 0
        for member in members:
            family = member.family
            own = [_extent(part.entry) for part in member.weight.parts]
            joined = self._joined(reads, own, MAX_HOLE * len(group), nbytes, family.nbytes) if group else []
            if not joined or values_bytes + family.values_bytes > self._values_limit:
                yield from self._bundle(group, reads)
                group, joined, nbytes, values_bytes = [], own, 0, 0
            group.append(member)
            reads = joined
            nbytes += family.nbytes
            values_bytes += family.values_bytes
        yield from self._bundle(group, reads)

    def _bundle(self, members: Sequence[Member], reads: Sequence[Extent[int]]) -> list[Piece]:
        if not members:
            return []
        bundle = DecodedBundle(members, _merged(reads, self._limit), self._sinks, self._dequantizer)
        self.scratch_bytes = max(self.scratch_bytes, bundle.scratch_bytes)
        self.held_bytes = max(self.held_bytes, bundle.held_bytes)
        return bundle.pieces()

    def _joined(
        self, reads: Sequence[Extent[int]], more: Sequence[Extent[int]], most: int, nbytes: int, more_bytes: int
    ) -> list[Extent[int]]:
        """What is read of each role with one more weight; nothing if that is too far away, or too much.

        `most` are the bytes that may be read and not needed.
        """
        pairs = list(zip(reads, more, strict=False))
        if len(reads) != len(more) or any(
            old.file != new.file or not old.stop <= new.start <= old.stop + more_bytes + MAX_HOLE for old, new in pairs
        ):
            return []
        joined = [Extent(old.file, old.start, new.stop) for old, new in pairs]
        together = _merged(joined, self._limit)
        holes = sum(read.nbytes for read in together) - nbytes - more_bytes
        return joined if holes <= most and all(read.nbytes <= self._limit for read in together) else []


class DecodedBundle:
    """Small weights on their way through float32, and those of their scales that lie apart from the codes.

    `reads` are what is to be read, without overlaps.
    """

    def __init__(
        self,
        members: Sequence[Member],
        reads: Sequence[Extent[int]],
        sinks: Mapping[str, Sink],
        dequantizer: Callable[[str], Dequantize],
    ) -> None:
        self._reads = reads
        self._of_codes = _place(reads, members[0].weight.codes.entry)
        self._held: list[Tensor | None] = [None] * len(reads)
        self._calls = [
            (decoded, dequantizer(decoded.family.weight.format.name), sinks[decoded.stored.stack.parameter])
            for decoded in _stacks(members, reads)
        ]
        self.held_bytes = sum(read.nbytes for read in reads) - reads[self._of_codes].nbytes
        self.scratch_bytes = max(decoded.values_bytes for decoded, *_ in self._calls)

    def pieces(self) -> list[Piece]:
        """First what is held, then the codes."""
        apart = [number for number in range(len(self._reads)) if number != self._of_codes]
        barrier = Barrier(len(apart)) if apart else None
        pieces = [self._piece(number, functools.partial(self._hold, number), signal=barrier) for number in apart]
        return [*pieces, self._piece(self._of_codes, self._deliver, after=barrier)]

    def _piece(
        self,
        number: int,
        deliver: Callable[[Workspace], None],
        after: Barrier | None = None,
        signal: Barrier | None = None,
    ) -> Piece:
        read = self._reads[number]
        return Piece(read.file, ((read.start, read.nbytes),), deliver, after=after, signal=signal)

    def _hold(self, number: int, workspace: Workspace) -> None:
        self._held[number] = workspace.buffer.clone()

    def _deliver(self, workspace: Workspace) -> None:
        buffers = [workspace.buffer if held is None else held for held in self._held]
        for decoded, dequantize, sink in self._calls:
            values, stack = decoded.values(buffers, workspace, dequantize), decoded.stored.stack
            if len(values) == 1:
                sink.load_region(values[0], stack.region)
            else:
                sink.load_experts(values, stack.experts, stack.rows, stack.columns)
        self._held = [None] * len(self._reads)


class DecodedStack:
    """Weights of one family that become values together; `where` says for each tensor which read it is in."""

    def __init__(self, family: Family, stored: StoredStack, where: Sequence[int]) -> None:
        self.family, self.stored, self.where = family, stored, where

    @property
    def values_bytes(self) -> int:
        """Bytes of the float32 values."""
        return len(self.stored.weights) * self.family.values_bytes

    def values(self, buffers: Sequence[Tensor], workspace: Workspace, dequantize: Dequantize) -> Tensor:
        """The float32 values [weights, rows, columns], in the scratch buffer."""
        weight, fmt = self.family.weight, self.family.weight.format
        found = {
            matrix.part.role: self.stored.finite(number, buffers[at])
            for number, (matrix, at) in enumerate(zip(self.stored.matrices, self.where, strict=True))
        }
        codes = found["codes"]
        tensors = (codes, *_scales(weight, found))
        values = workspace.scratch(self.values_bytes).view(torch.float32).view(len(codes), weight.rows, weight.columns)
        if fmt.rows_in_common and weight.rows % fmt.rows_in_common == 0:
            dequantize(tuple(each.flatten(0, 1) for each in tensors), values.flatten(0, 1))
        else:
            for *own, each in zip(*tensors, values, strict=True):
                dequantize(tuple(own), each)
        return values


def _scales(weight: StoredWeight, found: Mapping[Role, Tensor]) -> Iterator[Tensor]:
    """The scales of some weights with their zero points, as a kernel takes them."""
    for scale in weight.format.scales:
        values = found[scale_role(scale)]
        if scale.width == 1:
            yield values.contiguous()
        else:
            zeros = found.get("zero_point", torch.full_like(values, weight.zero_point))
            yield torch.stack((values, zeros), dim=-1).flatten(2)


def _extent(entry: TensorEntry) -> Extent[int]:
    return Extent(entry.shard, entry.offset, entry.offset + entry.nbytes)


def _merged(reads: Iterable[Extent[int]], most: int) -> list[Extent[int]]:
    """Reads that overlap as one, and neighbours too if that is at most so many bytes."""
    groups = neighbours(sorted(reads), lambda read: read, most, MAX_HOLE, overlap=True)
    return [Extent(group[0].file, group[0].start, max(read.stop for read in group)) for group in groups]


def _place(reads: Sequence[Extent[int]], entry: TensorEntry) -> int:
    """Which of the reads holds a tensor."""
    return next(
        n for n, read in enumerate(reads) if read.file == entry.shard and read.start <= entry.offset < read.stop
    )


def _stacks(members: Sequence[Member], reads: Sequence[Extent[int]]) -> list[DecodedStack]:
    """Weights in as few stacks as they make."""
    growing: dict[tuple[int, str, Interval, Interval], DecodedStack] = {}
    found: list[DecodedStack] = []
    for weight, family, span in members:
        where = [_place(reads, part.entry) for part in weight.parts]
        offsets = tuple([part.entry.offset - reads[at].start for part, at in zip(weight.parts, where, strict=True)])
        key = id(family), span.parameter, span.region.rows, span.region.columns
        decoded = growing.get(key)
        if decoded is None or where != decoded.where or not decoded.stored.takes(weight, span, offsets):
            decoded = growing[key] = DecodedStack(family, StoredStack(family.matrices, weight, span, offsets), where)
            found.append(decoded)
    return found
