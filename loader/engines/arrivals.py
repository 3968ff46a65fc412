"""Lazy tensors of tensors in memory: what an engine's own reader brought, or what an operation made.

They go to closures in chunks of rows. Where a scale is decided by more than one tensor, such as those of q, k and v,
the first ones are kept until the last has come.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Hashable, Iterable, Iterator, Sequence

import torch
from torch import Tensor

from ..errors import MissingWeightsError
from ..geometry.regions import Region
from ..geometry.spans import Span
from ..model.leftovers import some
from ..online.weight_loader import OnlineWeightLoader
from ..options import MIB
from .lazy import EngineSink, LazyTensor, shape_of

Parts = Sequence[tuple[Region, Tensor]]
"""Chunks of rows of a region, and where they belong."""


class Arrivals:
    """Tensors in memory, and those of them that are kept because the scales of others are decided with theirs."""

    def __init__(self, chunk_bytes: int = 8 * MIB) -> None:
        self.chunk_bytes = chunk_bytes
        self._kept: dict[Hashable, list[tuple[OnlineWeightLoader, Parts]]] = defaultdict(list)

    def wrap(self, tensor: Tensor) -> LazyTensor:
        """A lazy tensor that stands for one in memory, which must not change until `flush`."""
        tensor = tensor.detach()
        return LazyTensor.of_source(
            _Arrived(self, tensor), 0, tuple(tensor.shape), tensor.dtype, self.wrap, tuple(tensor.stride())
        )

    def take(self, sink: OnlineWeightLoader, parts: Parts) -> None:
        """Hand the parts of a region over, at once or with the last of those that its scales are decided with."""
        if all(sink.scales_are_local(region) for region, _ in parts):
            _hand_over(sink, parts)
            return
        for region, piece in parts:
            sink.observe(piece, region)
        group = sink.scale_group(parts[0][0].expert)
        kept = [*self._kept.pop(group, []), (sink, parts)]
        for each, theirs in kept:
            if all(each.parameter.scales_are_known(region) for region, _ in theirs):
                _hand_over(each, theirs)
            else:
                self._kept[group].append((each, theirs))

    def flush(self) -> None:
        """Raise `MissingWeightsError` where tensors are kept for others that never came; they are let go."""
        kept, self._kept = self._kept, defaultdict(list)
        names = {sink.name for members in kept.values() for sink, _ in members}
        if names:
            raise incomplete(names)


class _Arrived:
    """The origin of one tensor in memory."""

    def __init__(self, arrivals: Arrivals, tensor: Tensor) -> None:
        self._arrivals, self._tensor = arrivals, tensor

    def deliver(self, source: int, span: Span, sink: EngineSink) -> None:
        """Bring a span to a closure, a chunk of rows after the other."""
        assert isinstance(sink, OnlineWeightLoader)  # values go to no layer that stays as stored
        self._arrivals.take(sink, list(self._parts(span, sink.align[0])))

    def write(self, target: Tensor, source: LazyTensor) -> None:
        for box in source.boxes:
            where = tuple([slice(start, start + length) for start, length in zip(box.start, box.shape, strict=True)])
            target[where] = self._cut(box.shape, box.strides, box.offset)

    def read(self, source: LazyTensor, why: str) -> Tensor:
        tensor = torch.empty(shape_of(source), dtype=source.dtype, device=self._tensor.device)
        self.write(tensor, source)
        return tensor

    def _parts(self, span: Span, align: int) -> Iterator[tuple[Region, Tensor]]:
        """Chunks of whole scale blocks of a span, with contiguous rows."""
        region = span.region
        columns = region.columns[1] - region.columns[0]
        step = self._arrivals.chunk_bytes // max(columns * self._tensor.itemsize, 1)
        step = max(step // align, 1) * align
        for low in range(*region.rows, step):
            high = min(low + step, region.rows[1])
            offset = span.offset + (low - region.rows[0]) * span.row_stride
            piece = self._cut((high - low, columns), (span.row_stride, span.column_stride), offset)
            yield region._replace(rows=(low, high)), piece

    def _cut(self, shape: Sequence[int], strides: Sequence[int], offset: int) -> Tensor:
        return self._tensor.as_strided(shape, strides, self._tensor.storage_offset() + offset)


def _hand_over(sink: OnlineWeightLoader, parts: Parts) -> None:
    for region, piece in parts:
        sink.load_region(piece if piece.stride(-1) == 1 else piece.contiguous(), region)


def incomplete(names: Iterable[str]) -> MissingWeightsError:
    """The error for parameters whose scales are decided by tensors that never came."""
    return MissingWeightsError(f"parts of {some(names)} never arrived, and what decides the scales of the rest")
