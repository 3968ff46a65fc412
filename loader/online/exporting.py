"""The closures of a conversion: codes and scales go to files instead of a model, from small buffers used again."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from ..checkpoint.writer import ShardWriter
from ..kernels.statistics import merge
from ..schemes.base import NonFiniteError
from ..schemes.exported.tensors import QuantizedTensor
from ..schemes.exported.weights import ExportedPart
from ..schemes.layout import Block
from .quantizing import non_finite_error
from .regions import Interval, Region, RegionTracker


class Buffers(threading.local):
    """A buffer for each purpose and thread; what was taken is overwritten by what is taken for the same purpose."""

    def __init__(self) -> None:
        self._held: dict[str, Tensor] = {}

    def take(self, purpose: str, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """An uninitialized tensor."""
        nbytes = math.prod(shape) * dtype.itemsize
        held = self._held.get(purpose)
        if held is None or held.numel() < nbytes:
            held = self._held[purpose] = torch.empty(nbytes, dtype=torch.uint8)
        return held[:nbytes].view(dtype).view(shape)


class CopyingLoader:
    """Takes the bytes of a checkpoint tensor that is kept, as one row, and writes them as they are."""

    align = 1, 1

    def __init__(self, name: str, nbytes: int, shard: ShardWriter, finish: Callable[[], None]) -> None:
        self._tracker = RegionTracker(name, None, 1, nbytes)
        self._shard, self.finish = shard, finish

    def __call__(self, param: Tensor, loaded_weight: Tensor, *, region: Region, **_: Any) -> None:
        """`loaded_weight` uint8 [1, bytes]."""
        name = self._tracker.name
        self._tracker.claim(region)
        self._shard.write(self._shard.plan.offsets[name] + region.columns[0], loaded_weight, region.numel)
        if self._tracker.commit(region.numel):
            self.finish()

    def whole(self, region: Region) -> bool:
        """Every byte is written for itself."""
        return True

    def missing(self) -> Iterator[str]:
        """What has not arrived."""
        return self._tracker.described_gaps()


class ExportingLoader:
    """Takes pieces of a checkpoint tensor, quantizes them and writes the tensors a checkpoint format makes of them.

    Where scales span several pieces, the maxima of a matrix are held until all of it is written.
    """

    def __init__(
        self,
        tensor: QuantizedTensor,
        shard: ShardWriter,
        buffers: Buffers,
        on_written: Callable[[Tensor | None], None],
    ) -> None:
        layout = tensor.layout
        self._layout, self._quantizer, self._weight = layout, tensor.scheme.quantizer, tensor.weight
        self._stem, self._shard, self._buffers, self._on_written = tensor.stem, shard, buffers, on_written
        self._tracker = RegionTracker(tensor.entry.name, layout.experts, layout.rows, layout.columns)
        self._maxima: dict[int | None, Tensor] = {}
        self._unobserved: dict[int | None, int] = {}
        self._statistics: Tensor | None = None
        self._lock = threading.Lock()

    @property
    def align(self) -> tuple[int, int]:
        """Rows and columns of whole scale blocks, and of whole rows of every tensor."""
        rows, columns = self._layout.align
        return math.lcm(rows, self._weight.row_align), columns

    @property
    def whole_rows(self) -> bool:
        """Whether scales can be told from whole rows only."""
        return self._layout.format.whole_rows

    def whole(self, region: Region) -> bool:
        """Whether the scales of a region depend on nothing outside of it."""
        return self._layout.whole(region)

    def missing(self) -> Iterator[str]:
        """What has not arrived."""
        return self._tracker.described_gaps()

    def __call__(self, param: Tensor, loaded_weight: Tensor, *, region: Region, **_: Any) -> None:
        """Quantize and write `loaded_weight` [rows, columns of the region]."""
        (block,) = self._layout.blocks(region)
        maxima, fmt = self._maxima.get(region.expert), self._layout.format
        codes = self._buffers.take("codes", _extent(block.code_index), fmt.code_dtype)
        if maxima is None:
            scales = self._buffers.take("scales", _extent(block.scale_index), fmt.scale_dtype)
        else:
            scales = maxima[block.scale_index]
        try:
            stats = self._quantizer.quantize(loaded_weight, codes, scales, scales_known=maxima is not None)
        except NonFiniteError:
            raise non_finite_error(self._tracker.name, loaded_weight) from None
        self._tracker.claim(region)
        for part in self._weight.parts:
            self._write(part, block, region.expert, codes if part.source == "codes" else scales)
        self._add(stats.values)
        if self._tracker.commit(region.numel):
            self.finish()

    def load_experts(self, weights: Tensor, experts: range, rows: Interval, columns: Interval) -> None:
        """Take the same rows and columns of several experts: `weights` [experts, rows, columns]."""
        for weight, expert in zip(weights, experts, strict=True):
            self(weight, weight, region=Region(expert, rows, columns))

    def observe(self, loaded_weight: Tensor, region: Region) -> None:
        """First pass over a piece of a matrix whose scales span several pieces."""
        (block,) = self._layout.blocks(region)
        amax = torch.zeros(_extent(block.scale_index))
        try:
            self._quantizer.observe(loaded_weight, amax)
        except NonFiniteError:
            raise non_finite_error(self._tracker.name, loaded_weight) from None
        with self._lock:
            if region.expert not in self._maxima:
                self._maxima[region.expert] = torch.zeros(self._layout.scale_shape[-2:])
                self._unobserved[region.expert] = self._layout.rows * self._layout.columns
            maxima = self._maxima[region.expert]
            part = maxima[block.scale_index]
            torch.maximum(part, amax, out=part)
            self._unobserved[region.expert] -= region.numel
            last = self._unobserved[region.expert] == 0
        if last:
            self._quantizer.finish_scales(maxima)

    def _write(self, part: ExportedPart, block: Block, expert: int | None, source: Tensor) -> None:
        rows, columns = block.code_index if part.source == "codes" else block.scale_index
        data = source if part.convert is None else part.convert(source)
        pitch = part.pitch(self._layout)
        row = rows.start // part.block + (expert or 0) * part.rows(self._layout)
        column = int(columns.start * source.dtype.itemsize * part.width)
        offset = self._shard.plan.offsets[self._stem + part.name] + row * pitch + column
        # A tensor of one element is contiguous to torch with any stride, but then cannot be viewed as bytes.
        rows_of_bytes = data.contiguous().as_strided(data.shape, (data.shape[1], 1)).view(torch.uint8)
        self._shard.write(offset, rows_of_bytes[:, : pitch - column].contiguous(), pitch)

    def _add(self, statistics: Tensor | None) -> None:
        if statistics is None:
            return
        with self._lock:
            if self._statistics is None:
                self._statistics = statistics
            else:
                merge(self._statistics, statistics)

    def finish(self) -> None:
        """The last piece is written."""
        for constant in self._weight.constants:
            value = constant.make(self._layout.rows, self._layout.columns).view(1, -1).view(torch.uint8)
            self._shard.write(self._shard.plan.offsets[self._stem + constant.name], value, value.numel())
        self._maxima.clear()
        self._on_written(self._statistics)


def _extent(index: tuple[slice, slice]) -> tuple[int, int]:
    rows, columns = index
    return rows.stop - rows.start, columns.stop - columns.start
