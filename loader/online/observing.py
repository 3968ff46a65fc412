"""The first pass over matrices whose scales need more than one piece: float32 maxima, held until all was seen."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor

from ..geometry.layout import Index, WeightLayout
from ..geometry.regions import Region

Finish = Callable[[int | None, Tensor], None]
"""Called with an expert and its maxima [layout.maxima_shape] once all of its matrix, and of those that get their scales
with it, was observed; in the thread that saw the last piece."""


class ScaleGroup:
    """Parameters that get their scales together: each expert's, once all of it was seen in all of them.

    `layouts` are theirs. Where their format has `one_maximum`, the largest counts for all of them and all their shards.
    """

    def __init__(self, layouts: Sequence[WeightLayout]) -> None:
        self._numel = sum(layout.rows * layout.columns for layout in layouts)
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
            left = self._left.get(expert, self._numel) - numel
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
        for member, amax in zip(members, maxima, strict=True):
            member.finish(expert, amax)

    def forget(self) -> None:
        """Nothing was observed: a reload begins."""
        with self._lock:
            self._left.clear()


class Observation:
    """The maxima of one parameter's matrices, from the first piece that is observed to the last; from any thread."""

    def __init__(self, layout: WeightLayout, device: torch.device, group: ScaleGroup | None, finish: Finish) -> None:
        self._layout, self._device, self.finish = layout, device, finish
        self._maxima: dict[int | None, Tensor] = {}
        self._lock = threading.Lock()
        self._group = group or ScaleGroup((layout,))
        self._group.join(self)

    def new_maxima(self, index: Index) -> Tensor:
        """Zeros for the maxima of a piece."""
        rows, columns = index
        return torch.zeros(rows.stop - rows.start, columns.stop - columns.start, device=self._device)

    def add(self, region: Region, parts: Iterable[tuple[Index, Tensor]]) -> None:
        """A region was observed: `parts` are its maxima, and where each of them belongs among those of the matrix."""
        with self._lock:
            maxima = self._maxima.get(region.expert)
            if maxima is None:
                maxima = torch.zeros(self._layout.maxima_shape, dtype=torch.float32, device=self._device)
                self._maxima[region.expert] = maxima
            for index, amax in parts:
                part = maxima[index]
                torch.maximum(part, amax, out=part)
        self._group.count(region.expert, region.numel)

    def take(self, expert: int | None) -> Tensor:
        """The maxima of an expert, which are not held any longer."""
        with self._lock:
            return self._maxima.pop(expert)

    def forget(self) -> None:
        """Nothing was observed: a reload begins."""
        with self._lock:
            self._maxima.clear()
        self._group.forget()


def scales_are_shared(layout: WeightLayout, group: ScaleGroup | None) -> bool:
    """Whether scales depend on more than their own shard of their own matrix."""
    return group is not None or (layout.format.one_maximum and len(layout.shards) > 1)
