"""The closures of a conversion: codes and scales go to files instead of a model, from small buffers used again."""

from __future__ import annotations

import functools
import math
import threading
import weakref
from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from ..checkpoint.headers import TensorEntry
from ..checkpoint.working_memory import CPU
from ..checkpoint.writer import ShardWriter
from ..errors import NonFiniteWeightError
from ..geometry.layout import Block, WeightLayout, extent_of
from ..geometry.regions import Interval, Region, RegionTracker
from ..kernels.formats import Tensors
from ..online.observing import Observation, ScaleGroup, scales_are_shared
from ..online.quantizing import StatisticsSum, non_finite_error, rows_below_each_other
from ..online.sink import InPlace, Sink
from ..schemes.base import NonFiniteError
from ..schemes.exported.weights import ExportedTensor
from .tensors import QuantizedTensor


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


class WritingLoader(Sink, ABC):
    """What pieces of a conversion are handed to: the memory they go to is not the model's."""

    values_dtype = None
    align = 1, 1
    whole_rows = False
    maxima_bytes = 0

    def in_place(self, dtype: torch.dtype, region: Region) -> InPlace | None:
        """Never: what arrives goes to a file."""
        return None

    @abstractmethod
    def finish(self) -> None:
        """The last piece is written."""


class CopyingLoader(WritingLoader):
    """Takes the bytes of a checkpoint tensor that is kept, as one row, and writes them as they are."""

    def __init__(
        self, entry: TensorEntry, shard: ShardWriter, finish: Callable[[], None], look: Callable[[Tensor, int], None]
    ) -> None:
        """`look(values [1, n], flat index of the first)` sees the values of a floating type."""
        name, nbytes = entry.name, entry.nbytes
        self._dtype, self._look = entry.dtype, look
        self.align = 1, entry.dtype.itemsize
        self._tracker = RegionTracker(name, None, 1, nbytes)
        self._shard, self._finish = shard, finish

    @property
    def name(self) -> str:
        return self._tracker.name

    def load_region(self, loaded_weight: Tensor, region: Region) -> None:
        """`loaded_weight` uint8 [1, bytes]."""
        name = self._tracker.name
        self._tracker.claim(region)
        if self._dtype.is_floating_point:
            size = self._dtype.itemsize
            aligned = loaded_weight if loaded_weight.storage_offset() % size == 0 else loaded_weight.clone()
            self._look(aligned.view(self._dtype), region.columns[0] // size)
        self._shard.write(self._shard.plan.offsets[name] + region.columns[0], loaded_weight, region.numel)
        if self._tracker.commit(region.numel):
            self.finish()

    def load_experts(self, weights: Tensor, experts: Sequence[int | None], rows: Interval, columns: Interval) -> None:
        """There is one row of bytes, and it is nobody's expert."""
        for weight, expert in zip(weights, experts, strict=True):
            self.load_region(weight, Region(expert, rows, columns))

    def scales_are_local(self, region: Region) -> bool:
        """Every byte is written for itself."""
        return True

    def scale_group(self, expert: int | None) -> Hashable:
        return self.name, expert

    def observe(self, loaded_weight: Tensor, region: Region) -> None:
        """There are no scales."""

    def missing(self) -> Iterator[str]:
        return self._tracker.described_gaps()

    def finish(self) -> None:
        self._finish()


class ExportingLoader(WritingLoader):
    """Takes pieces of checkpoint tensors, quantizes them and writes the tensors a checkpoint format makes of them.

    Several `tensors` are alike but for their names, and in the coordinates of a piece they are experts, in their order;
    `on_written(statistics)` runs when all of them are. Where scales span several pieces, the maxima of a matrix,
    and then its scales, are held until all is written.
    """

    def __init__(
        self,
        tensors: Sequence[QuantizedTensor],
        shard: ShardWriter,
        buffers: Buffers,
        on_written: Callable[[Tensor], None],
    ) -> None:
        first, layout = tensors[0], tensors[0].layout
        self.layout = layout if len(tensors) == 1 else replace(layout, experts=len(tensors))
        self._names, self._module = [tensor.entry.name for tensor in tensors], first.assignment.name
        self._stems = [tensor.stem for tensor in tensors]
        self._quantizer, self._weight = first.scheme.quantizer, first.weight
        self._shard, self._buffers, self._on_written = shard, buffers, on_written
        self._parts = [_WrittenTensor(part, layout, self._stems, shard) for part in first.weight.parts]
        self._tracker = RegionTracker(first.entry.name, self.layout.experts, layout.rows, layout.columns)
        self._observation: Observation | None = None
        self._scales: dict[int | None, Tensors] = {}
        self.group: ScaleGroup | None = None
        """What gets its scales together with these tensors, if anything does."""
        self._statistics = StatisticsSum()
        self._lock = threading.Lock()

        block_rows, block_columns = self.layout.align
        self.align = math.lcm(block_rows, self._weight.row_align), block_columns
        self.whole_rows, self.maxima_bytes = self.layout.format.whole_rows, self.layout.maxima_bytes

    @property
    def name(self) -> str:
        return self._tracker.name

    def scales_are_local(self, region: Region) -> bool:
        return self.layout.whole(region) and not scales_are_shared(self.layout, self.group)

    def scale_group(self, expert: int | None) -> Hashable:
        return self._names[0] if self.group is None else id(self.group), expert

    def missing(self) -> Iterator[str]:
        for region in () if self._tracker.complete else self._tracker.missing():
            inside = region if len(self._names) == 1 else region._replace(expert=None)
            yield f"{self._name(region.expert)} {inside}"

    def load_region(self, loaded_weight: Tensor, region: Region) -> None:
        """Quantize and write `loaded_weight` [rows, columns of the region]."""
        self.load_experts(loaded_weight.unsqueeze(0), (region.expert,), region.rows, region.columns)

    def load_experts(self, weights: Tensor, experts: Sequence[int | None], rows: Interval, columns: Interval) -> None:
        """Quantize and write the same rows and columns of several experts: `weights` [experts, rows, columns]."""
        region, fmt = Region(experts[0], rows, columns), self.layout.format
        (block,) = self.layout.blocks(region)
        known, count = self._scales.get(experts[0]), len(experts)
        tensors = [
            self._buffers.take(tensor.suffix, (count, *extent_of(index)), tensor.dtype)
            for tensor, index in zip(
                fmt.tensors, block.index if known is None else block.index[:1], strict=known is None
            )
        ]
        if known is not None:  # only what is no whole matrix has any, and that comes alone
            tensors += [scale[index].unsqueeze(0) for scale, index in zip(known, block.index[1:], strict=True)]
        self._quantize(weights, tuple(tensors), experts, scales_known=known is not None)
        self._tracker.claim_each(experts, rows, columns)
        for part in self._parts:
            part.write(self._shard, block, experts, tensors[part.number])
        if self._tracker.commit(count * region.numel):
            self.finish()

    def observe(self, loaded_weight: Tensor, region: Region) -> None:
        """First pass over a piece of a matrix whose scales span several pieces."""
        (block,) = self.layout.blocks(region)
        with self._lock:
            if self._observation is None:
                finish = functools.partial(_finish_scales, weakref.ref(self))
                self._observation = Observation(self.layout, CPU, self.group, finish)
        amax = self._observation.new_maxima(block.maxima)
        try:
            self._quantizer.observe(loaded_weight, amax)
        except NonFiniteError:
            raise self._not_finite(loaded_weight, region.expert) from None
        self._observation.add(region, [(block, amax)])

    def finish_scales(self, expert: int | None, maxima: Tensor) -> None:
        """All of a matrix, which is one shard, was observed, and of those that get their scales with it."""
        pairs = zip(self.layout.shapes[1:], self.layout.format.scales, strict=True)
        scales = tuple(torch.empty(shape[-2:], dtype=scale.dtype) for shape, scale in pairs)
        self._quantizer.finish_scales(maxima, scales)
        self._scales[expert] = scales

    def _name(self, expert: int | None) -> str:
        """The tensor that stands for an expert; all experts may be in one."""
        return self._names[0 if len(self._names) == 1 else expert or 0]

    def _quantize(
        self, weights: Tensor, tensors: Tensors, experts: Sequence[int | None], *, scales_known: bool
    ) -> None:
        """Quantize several matrices in as few calls as their format allows."""
        joined = rows_below_each_other(self.layout.format, weights, *tensors)
        for weight, *own in zip(weights, *tensors, strict=True) if joined is None else (joined,):
            try:
                stats = self._quantizer.quantize(weight, tuple(own), scales_known=scales_known)
            except NonFiniteError:
                raise self._first_not_finite(weights, experts) from None
            with self._lock:
                self._statistics.add(stats.values)

    def _first_not_finite(self, weights: Tensor, experts: Sequence[int | None]) -> NonFiniteWeightError:
        """The error for the first matrix that is not finite."""
        pairs = zip(weights, experts, strict=True)
        weight, expert = next((weight, expert) for weight, expert in pairs if not torch.isfinite(weight).all())
        return self._not_finite(weight, expert)

    def _not_finite(self, weight: Tensor, expert: int | None) -> NonFiniteWeightError:
        """The error for a matrix; what can be left as stored is the module that it is of."""
        error = non_finite_error(self._name(expert), weight)
        error.advice = NonFiniteWeightError.leave_module(self._module)
        return error

    def finish(self) -> None:
        for constant in self._weight.constants:
            value = constant.make(self.layout.rows, self.layout.columns).view(1, -1).view(torch.uint8)
            offsets = [self._shard.plan.offsets[stem + constant.name] for stem in self._stems]
            self._shard.write_each(offsets, value.repeat(len(offsets), 1, 1), value.numel())
        self._scales.clear()
        self._on_written(self._statistics.total())


def _finish_scales(reference: weakref.ref[ExportingLoader], expert: int | None, _: int | None, maxima: Tensor) -> None:
    loader = reference()  # weak, as a closure that held it would hold itself
    if loader is None:
        raise ReferenceError("the conversion was given up while it was running")
    loader.finish_scales(expert, maxima)


class _WrittenTensor:
    """One of the tensors that a weight becomes, and where it lies in a shard for each expert."""

    def __init__(self, part: ExportedTensor, layout: WeightLayout, stems: Sequence[str], shard: ShardWriter) -> None:
        self._part, self._pitch = part, part.pitch(layout)
        matrix = part.rows(layout) * self._pitch
        begins = [shard.plan.offsets[stem + part.name] for stem in stems]
        self._begins = [begin + expert * matrix for begin in begins for expert in range(layout.experts or 1)]

    @property
    def number(self) -> int:
        """Which tensor of the format it is made of."""
        return self._part.number

    def write(self, shard: ShardWriter, block: Block, experts: Sequence[int | None], source: Tensor) -> None:
        """Write what is made of the codes or scales [experts, rows, columns] of a block."""
        rows, columns = block.index[self.number]
        data = self._converted(source)
        column = int(columns.start * source.dtype.itemsize * self._part.width)
        begin = rows.start // self._part.block * self._pitch + column
        # A tensor of one element is contiguous to torch with any stride, but then cannot be viewed as bytes.
        _, lines, width = data.shape
        rows_of_bytes = data.contiguous().as_strided(data.shape, (lines * width, width, 1)).view(torch.uint8)
        offsets = [self._begins[expert or 0] + begin for expert in experts]
        shard.write_each(offsets, rows_of_bytes[..., : self._pitch - column].contiguous(), self._pitch)

    def _converted(self, source: Tensor) -> Tensor:
        """What is made of the matrices of a stack, all at once where no row of it is made of rows of two of them."""
        convert, count = self._part.convert, len(source)
        if convert is None:
            return source
        if count == 1 or source.shape[1] % self._part.block == 0:
            together = convert(source.flatten(0, 1))
            return together.view(count, -1, together.shape[1])
        return torch.stack([convert(each) for each in source])
