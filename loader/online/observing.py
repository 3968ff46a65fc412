"""The first pass over matrices whose scales need more than one piece: float32 maxima, held until all was seen."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from ..geometry.layout import Index, WeightLayout
from ..geometry.regions import Region

Finish = Callable[[int | None, Tensor], None]
"""Called with an expert and its maxima [layout.maxima_shape] once all of the matrix, or of those it shares scales with,
was observed; in the thread that saw the last piece."""


class ScaleGroup:
    """Parameters that get their scales together: each expert's, once all of it was seen in all of them.

    `one` says that one maximum counts for all of an expert's matrices, and all their shards, as engines that multiply
    them at once need it; otherwise each keeps its own.
    """

    def __init__(self, *, one: bool) -> None:
        self.one = one
        # A parameter holds its group: references to it that are not weak would keep the memory of a deleted model.
        self._members: list[weakref.ref[Observation]] = []
        self._left: dict[int | None, int] = {}
        self._lock = threading.Lock()

    @property
    def is_shared(self) -> bool:
        """Whether scales of one matrix depend on another one."""
        return len(self._members) > 1 or any(len(member.layout.shards) > 1 for member in self._alive() if self.one)

    def join(self, member: Observation) -> None:
        """Add a parameter."""
        self._members.append(weakref.ref(member))

    def begin(self, expert: int | None) -> None:
        """A piece of an expert is observed; unless it is the first one, nothing happens."""
        with self._lock:
            if expert not in self._left:
                self._left[expert] = sum(member.layout.rows * member.layout.columns for member in self._alive())

    def count(self, expert: int | None, numel: int) -> None:
        """So many elements of an expert were observed; with the last ones all scales of it are made."""
        with self._lock:
            self._left[expert] -= numel
            if self._left[expert]:
                return
            del self._left[expert]
        members = list(self._alive())
        maxima = [member.take(expert) for member in members]
        if self.one:
            largest = torch.stack([each.max() for each in maxima]).max()
            for each in maxima:
                each.copy_(largest)
        for member, amax in zip(members, maxima, strict=True):
            member.finish(expert, amax)

    def forget(self) -> None:
        """Nothing was observed: a reload begins."""
        with self._lock:
            self._left.clear()

    def _alive(self) -> Iterable[Observation]:
        return [member for reference in self._members if (member := reference()) is not None]


class Observation:
    """The maxima of one parameter's matrices, from the first piece that is observed to the last; from any thread."""

    def __init__(self, layout: WeightLayout, device: torch.device, finish: Finish) -> None:
        self.layout, self.finish = layout, finish
        self._device = device
        self._maxima: dict[int | None, Tensor] = {}
        self._lock = threading.Lock()
        self.group = ScaleGroup(one=layout.format.one_scale)
        self.group.join(self)

    def add(self, region: Region, parts: Iterable[tuple[Index, Tensor]]) -> None:
        """A region was observed: `parts` are its maxima, and where each of them belongs among those of the matrix."""
        self.group.begin(region.expert)
        with self._lock:
            maxima = self._maxima.get(region.expert)
            if maxima is None:
                maxima = torch.zeros(self.layout.maxima_shape, dtype=torch.float32, device=self._device)
                self._maxima[region.expert] = maxima
            for index, amax in parts:
                part = maxima[index]
                torch.maximum(part, amax, out=part)
        self.group.count(region.expert, region.numel)

    def take(self, expert: int | None) -> Tensor:
        """The maxima of an expert, which are not held any longer."""
        with self._lock:
            return self._maxima.pop(expert)

    def forget(self) -> None:
        """Nothing was observed: a reload begins."""
        with self._lock:
            self._maxima.clear()
        self.group.forget()


def observe_together(observations: Iterable[Observation]) -> None:
    """Let parameters of the same format get their scales together."""
    first, *others = observations
    for other in others:
        other.group = first.group
        first.group.join(other)
