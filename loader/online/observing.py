"""The first pass over matrices whose scales need more than one piece: float32 maxima, held until all was seen."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor

from ..geometry.layout import Block, Index, WeightLayout, extent_of
from ..geometry.regions import Region

Finish = Callable[[int | None, int | None, Tensor], None]
"""Called with an expert, the number of a shard and its maxima, once all of that shard was observed, in the thread that
saw the last piece. Where scales are shared (`scales_are_shared`) the shard is `None`: maxima [layout.maxima_shape] of
all shards, once they, and the other parameters that get their scales with them, were observed."""

Exchange = Callable[["ScaleGroup", int | None, Sequence[Tensor]], None]
"""Called with a group, an expert, and the maxima of that expert in each parameter of the group, to be raised."""


class ScaleGroup:
    """Parameters that get their scales together: each expert's, once all of it was seen in all of them.

    `layouts` are theirs. Where their format has `one_maximum`, the largest counts for all of them and all their shards.
    """

    def __init__(self, layouts: Sequence[WeightLayout]) -> None:
        self.exchange: Exchange | None = None
        """What raises the maxima to those that others saw, where other processes have parts of the matrices."""
        self.numel = sum(layout.rows * layout.columns for layout in layouts)
        """Elements of one expert, in all of them."""
        self._one = layouts[0].format.one_maximum
        # A parameter holds its group: references to it that are not weak would keep the memory of a deleted model.
        self._members: list[weakref.ref[Observation]] = []
        self._left: dict[int | None, int] = {}
        self._lock = threading.Lock()

    def join(self, member: Observation) -> None:
        """The first piece of one of the parameters is observed."""
        with self._lock:
            self._members.append(weakref.ref(member))

    def count(self, expert: int | None, numel: int) -> None:
        """So many elements of an expert were observed; with the last ones all scales of it are made."""
        with self._lock:
            left = self._left.get(expert, self.numel) - numel
            self._left[expert] = left
            if left:
                return
            del self._left[expert]
            members = [member for reference in self._members if (member := reference()) is not None]
        maxima = [member.take(expert) for member in members]
        if self._one:
            largest = torch.stack([each.max() for each in maxima]).max()
            for each in maxima:
                each.copy_(largest)
        if self.exchange is not None:
            self.exchange(self, expert, maxima)
        for member, amax in zip(members, maxima, strict=True):
            member.finish(expert, None, amax)

    def forget(self, expert: int | None) -> None:
        """Nothing was observed of the matrices of an expert."""
        with self._lock:
            self._left.pop(expert, None)
            members = [member for reference in self._members if (member := reference()) is not None]
        for member in members:
            member.drop(expert)

    def forget_all(self) -> None:
        """Nothing was observed: a reload begins."""
        with self._lock:
            self._left.clear()


class Observation:
    """The maxima of one parameter's matrices, from the first piece that is observed to the last; from any thread.

    Shards whose scales are not shared are observed each for itself, so that they may arrive at different times.
    """

    def __init__(self, layout: WeightLayout, device: torch.device, group: ScaleGroup | None, finish: Finish) -> None:
        self._layout, self._device, self.finish = layout, device, finish
        self._shards = tuple(layout.shard_indices())
        self._maxima: dict[tuple[int | None, int | None], Tensor] = {}
        self._left: dict[tuple[int | None, int], int] = {}
        self._lock = threading.Lock()
        self._group: ScaleGroup | None = None
        if scales_are_shared(layout, group):
            self._group = group or ScaleGroup((layout,))
            self._group.join(self)

    def new_maxima(self, index: Index) -> Tensor:
        """Zeros for the maxima of a piece."""
        rows, columns = index
        shape = rows.stop - rows.start, columns.stop - columns.start
        return torch.zeros(shape, dtype=torch.float32, device=self._device)

    def add(self, region: Region, parts: Iterable[tuple[Block, Tensor]]) -> None:
        """A region was observed: `parts` are its blocks, and the maxima of each."""
        complete: list[int] = []
        with self._lock:
            for block, amax in parts:
                part = self._part(region.expert, block)
                torch.maximum(part, amax, out=part)
                if self._group is None and self._is_last(region, block):
                    complete.append(block.shard)
        if self._group is not None:
            self._group.count(region.expert, region.numel)
        for shard in complete:
            self.finish(region.expert, shard, self.take(region.expert, shard))

    def take(self, expert: int | None, shard: int | None = None) -> Tensor:
        """The maxima of an expert, or of a shard of it, which are not held any longer."""
        with self._lock:
            return self._maxima.pop((expert, shard))

    def forget(self, region: Region | None = None) -> None:
        """Nothing was observed: at all, or of the shards that a region is part of and what shares its scales with them.

        A reload of them begins.
        """
        if region is None:
            with self._lock:
                self._maxima.clear()
                self._left.clear()
            if self._group is not None:
                self._group.forget_all()
        elif self._group is not None:
            self._group.forget(region.expert)
        else:
            with self._lock:
                for block in self._layout.blocks(region):
                    self._maxima.pop((region.expert, block.shard), None)
                    self._left.pop((region.expert, block.shard), None)

    def drop(self, expert: int | None) -> None:
        """Hold no maxima of the matrix of an expert, whose shards share their scales."""
        with self._lock:
            self._maxima.pop((expert, None), None)

    def _part(self, expert: int | None, block: Block) -> Tensor:
        """The maxima of a block, a view of those that are held."""
        shard = None if self._group is not None else block.shard
        held = self._maxima.get((expert, shard))
        if held is None:
            shape = self._layout.maxima_shape if shard is None else extent_of(self._shards[shard].maxima)
            held = self._maxima[expert, shard] = torch.zeros(shape, dtype=torch.float32, device=self._device)
        first = 0 if shard is None else self._shards[shard].maxima[0].start
        rows, columns = block.maxima
        return held[rows.start - first : rows.stop - first, columns]

    def _is_last(self, region: Region, block: Block) -> bool:
        """Whether that block was all that was left of its shard."""
        key, columns = (region.expert, block.shard), region.columns
        left = self._left.get(key, self._layout.shards[block.shard][1] * self._layout.columns)
        left -= (block.rows[1] - block.rows[0]) * (columns[1] - columns[0])
        self._left[key] = left
        if left:
            return False
        del self._left[key]
        return True


def scales_are_shared(layout: WeightLayout, group: ScaleGroup | None) -> bool:
    """Whether scales depend on more than their own shard of their own matrix."""
    return group is not None or (layout.format.one_maximum and len(layout.shards) > 1)
