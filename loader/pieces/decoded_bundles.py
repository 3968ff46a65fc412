"""Small stored weights that become something else: neighbours are read at once and go through float32 as one.

The tensors of each role stand one after the other in a file, or alternate with those of the others. What lies together
is read together; scales that lie elsewhere come first, and are held until the codes have come.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..checkpoint.headers import TensorEntry
from ..checkpoint.pieces import MAX_SHARED_READ, SMALL_PIECE, Barrier, Piece
from ..checkpoint.workspace import Workspace
from ..geometry.spans import Span
from ..online.sink import Sink
from ..schemes.stored.weights import Role, StoredWeight
from .decoded import Dequantize
from .plain_bundles import QuantizedAlone
from .stored_stacks import MAX_HOLE, Family, PartStack
from .two_passes import Matrix

MAX_VALUES = 4 * MAX_SHARED_READ
"""Bytes of the float32 values of a bundle: they are worked on while they are in cache."""


class Member(NamedTuple):
    """A weight, and the only span that takes anything of it: all of it."""

    weight: StoredWeight
    family: Family
    span: Span

    @property
    def matrix(self) -> Matrix:
        """The parameter and expert it lands in."""
        return self.span.parameter, self.span.region.expert


class Read(NamedTuple):
    """Bytes of one file."""

    shard: int
    start: int
    stop: int

    @property
    def nbytes(self) -> int:
        """How many."""
        return self.stop - self.start

    def holds(self, entry: TensorEntry) -> bool:
        """Whether a tensor is among them."""
        return self.shard == entry.shard and self.start <= entry.offset < self.stop


class DequantizedBundler:
    """Puts small weights that follow each other into bundles, and the pieces of those in a list."""

    def __init__(
        self,
        pieces: list[Piece],
        sinks: Mapping[str, Sink],
        chunk_bytes: int,
        dequantizer: Callable[[str], Dequantize],
    ) -> None:
        self._pieces, self._sinks, self._dequantizer = pieces, sinks, dequantizer
        self._alone = QuantizedAlone(sinks)
        self._limit, self._values_limit = min(chunk_bytes, MAX_SHARED_READ), min(chunk_bytes, MAX_VALUES)
        self._members: list[Member] = []
        self._reads: list[Read] = []
        self._nbytes = self._values_bytes = 0
        self.scratch_bytes = self.held_bytes = 0

    def takes(self, family: Family, span: Span) -> bool:
        """Whether a weight is small, and needs nothing but itself to be quantized."""
        small = family.nbytes < SMALL_PIECE and family.nbytes <= self._limit
        fits = small and family.values_bytes <= self._values_limit
        return fits and self._alone(span.parameter, span.region)

    def add(self, member: Member) -> None:
        """The next weight in the order of files and offsets."""
        entries = [part.entry for part in member.weight.parts]
        reads = [Read(entry.shard, entry.offset, entry.offset + entry.nbytes) for entry in entries]
        together = self._reads and self._joined(reads, member.family.nbytes)
        if not together or self._values_bytes + member.family.values_bytes > self._values_limit:
            self.close()
            together = reads
        self._reads = together
        self._members.append(member)
        self._nbytes += member.family.nbytes
        self._values_bytes += member.family.values_bytes

    def close(self) -> None:
        """What comes next belongs to another bundle."""
        if self._members:
            reads = merged(self._reads, self._limit)
            bundle = DequantizedBundle(self._members, reads, self._sinks, self._dequantizer)
            self._pieces += bundle.pieces()
            self.scratch_bytes = max(self.scratch_bytes, bundle.scratch_bytes)
            self.held_bytes = max(self.held_bytes, bundle.held_bytes)
        self._members, self._reads = [], []
        self._nbytes = self._values_bytes = 0

    def _joined(self, reads: Sequence[Read], nbytes: int) -> list[Read]:
        """What is read of each role with one more weight; nothing if that is too far away, or too much."""
        pairs = list(zip(self._reads, reads, strict=False))
        if len(reads) != len(self._reads) or any(
            old.shard != new.shard or not old.stop <= new.start <= old.stop + nbytes + MAX_HOLE for old, new in pairs
        ):
            return []
        joined = [Read(old.shard, old.start, new.stop) for old, new in pairs]
        together = merged(joined, self._limit)
        holes = sum(read.nbytes for read in together) - self._nbytes - nbytes
        most = MAX_HOLE * len(self._members)
        return joined if holes <= most and all(read.nbytes <= self._limit for read in together) else []


class DequantizedBundle:
    """Small weights on their way through float32, and those of their scales that lie apart from the codes.

    `reads` are what is to be read, without overlaps.
    """

    def __init__(
        self,
        members: Sequence[Member],
        reads: Sequence[Read],
        sinks: Mapping[str, Sink],
        dequantizer: Callable[[str], Dequantize],
    ) -> None:
        self._reads = reads
        self._of_codes = _place(reads, members[0].weight.codes.entry)
        self._held: list[Tensor | None] = [None] * len(reads)
        self._calls = [
            (stack, dequantizer(stack.family.weight.format.name), sinks[stack.parameter])
            for stack in _stacks(members, reads)
        ]
        self.held_bytes = sum(read.nbytes for read in reads) - reads[self._of_codes].nbytes
        self.scratch_bytes = max(stack.values_bytes for stack, *_ in self._calls)

    def pieces(self) -> list[Piece]:
        """First what is held, then the codes."""
        apart = [number for number in range(len(self._reads)) if number != self._of_codes]
        barrier = Barrier(len(apart)) if apart else None
        pieces = [self._piece(number, functools.partial(self._hold, number), signal=barrier) for number in apart]
        return [*pieces, self._piece(self._of_codes, self._deliver, after=barrier)]

    def _piece(self, number: int, deliver: Callable[[Workspace], None], **how: Any) -> Piece:
        read = self._reads[number]
        return Piece(read.shard, ((read.start, read.nbytes),), deliver, **how)

    def _hold(self, number: int, workspace: Workspace) -> None:
        self._held[number] = workspace.buffer.clone()

    def _deliver(self, workspace: Workspace) -> None:
        buffers: list[Any] = [*self._held]
        buffers[self._of_codes] = workspace.buffer
        for stack, dequantize, sink in self._calls:
            values = stack.values(buffers, workspace, dequantize)
            region = stack.region
            if len(values) == 1:
                sink.loader(sink.param, values[0], region=region)
            else:
                sink.loader.load_experts(values, stack.experts, region.rows, region.columns)
        self._held = [None] * len(self._reads)


class WeightStack:
    """Weights of one family that land in the same rows and columns of experts, all their tensors in step.

    `where` says for each part which read it is in.
    """

    def __init__(self, member: Member, where: Sequence[int], offsets: Sequence[int]) -> None:
        weight, self.family, span = member
        self.parameter, self.region, self._where = span.parameter, span.region, where
        self._parts = [
            PartStack(matrix, weight, span.region, offset)
            for matrix, offset in zip(self.family.matrices, offsets, strict=True)
        ]

    @property
    def experts(self) -> Sequence[int | None]:
        """The experts, in order."""
        return self._parts[0].experts

    @property
    def values_bytes(self) -> int:
        """Bytes of the float32 values."""
        return len(self._parts[0].weights) * self.family.values_bytes

    def takes(self, member: Member, where: Sequence[int], offsets: Sequence[int]) -> bool:
        """Put one more weight at the end, if all its tensors stand where the next ones would."""
        region = member.span.region
        if where != self._where or not all(
            part.continues(region, offset) for part, offset in zip(self._parts, offsets, strict=True)
        ):
            return False
        for part, offset in zip(self._parts, offsets, strict=True):
            part.append(member.weight, region, offset)
        return True

    def values(self, buffers: Sequence[Tensor], workspace: Workspace, dequantize: Dequantize) -> Tensor:
        """The float32 values [weights, rows, columns], in the scratch buffer."""
        weight, fmt = self.family.weight, self.family.weight.format
        found = {part.role: part.finite(buffers[at]) for part, at in zip(self._parts, self._where, strict=True)}
        codes = found["codes"]
        scales = _scales(weight, found)
        values = workspace.scratch(self.values_bytes).view(torch.float32).view(len(codes), weight.rows, weight.columns)
        if fmt.block_rows and weight.rows % fmt.block_rows == 0:
            dequantize(codes.flatten(0, 1), scales.flatten(0, 1), values.flatten(0, 1))
        else:
            for each in zip(codes, scales, values, strict=True):
                dequantize(*each)
        return values


def _scales(weight: StoredWeight, found: Mapping[Role, Tensor]) -> Tensor:
    """The scales of some weights with their zero points, as a kernel takes them."""
    words, scales = weight.format.scale_words, found["scale"]
    if words == 1:
        return scales.contiguous()
    zeros = found.get("zero_point", torch.full_like(scales, weight.zero_point))
    return torch.stack((scales, zeros), dim=-1).flatten(2)


def merged(reads: Sequence[Read], most: int) -> list[Read]:
    """Reads that overlap as one, and neighbours too if that is at most so many bytes."""
    found: list[Read] = []
    for read in sorted(reads):
        last = found[-1] if found else None
        if last is not None and read.shard == last.shard:
            stop = max(read.stop, last.stop)
            if read.start < last.stop or (read.start - last.stop <= MAX_HOLE and stop - last.start <= most):
                found[-1] = Read(last.shard, last.start, stop)
                continue
        found.append(read)
    return found


def _place(reads: Sequence[Read], entry: TensorEntry) -> int:
    """Which of the reads holds a tensor."""
    return next(number for number, read in enumerate(reads) if read.holds(entry))


def _stacks(members: Sequence[Member], reads: Sequence[Read]) -> list[WeightStack]:
    """Weights in as few stacks as they make."""
    growing: dict[Any, WeightStack] = {}
    found: list[WeightStack] = []
    for member in members:
        where = [_place(reads, part.entry) for part in member.weight.parts]
        offsets = [part.entry.offset - reads[at].start for part, at in zip(member.weight.parts, where, strict=True)]
        key = id(member.family), member.span.parameter, member.span.region[1:]
        stack = growing.get(key)
        if stack is None or not stack.takes(member, where, offsets):
            growing[key] = WeightStack(member, where, offsets)
            found.append(growing[key])
    return found
