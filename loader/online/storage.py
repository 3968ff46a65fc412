"""Where final tensors live.

On a CPU they are cut one after the other from large anonymous mappings with huge pages: the first write to a fresh
page is the most expensive part of writing, and the allocator's own fragmentation would move the peak by a gigabyte.

A load says beforehand how many tensors of which size there will be (`expect`). They get mappings of exactly their size,
all of them at once: what a limit of the process refuses is refused before a weight is read, and no huge page is taken
for a part of it. Tensors that nobody announced, as an engine asks for them, share mappings that grow.
"""

from __future__ import annotations

import math
import mmap
import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from types import TracebackType
from typing import NamedTuple, Self

import torch

from ..errors import MemoryBudgetError
from ..shortage import give_back, map_anonymous

SLAB_BYTES = 256 << 20
"""The first mapping for tensors that were not announced; each further one is as large as all before it, since pages
nobody wrote to cost nothing, but the last huge page of each costs two mebibytes."""
MAX_SLAB_BYTES = 4 << 30
"""The largest, unless one tensor is larger: memory comes back when all tensors of a mapping are gone."""
ALIGNMENT = 64


@dataclass(slots=True)
class _Slab:
    mapping: mmap.mmap
    used: int = 0

    def fits(self, nbytes: int) -> bool:
        return self.used + nbytes <= len(self.mapping)


@dataclass(slots=True)
class _Places:
    """Room for `count` tensors of one size, one behind the other from `offset` on."""

    slab: int
    offset: int
    count: int


class FinalStorage:
    """Hands out uninitialized tensors that stay for the life of the model."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.bytes = 0
        self._slabs: list[_Slab] = []
        self._expected: list[mmap.mmap] = []
        self._places: dict[int, list[_Places]] = {}
        self._lock = threading.Lock()

    def expect(self, sizes: Mapping[int, int]) -> None:
        """Map the memory of so many tensors of each size in bytes; once, before the first of them is asked for.

        Raises `MemoryBudgetError` where the system does not give it. On a GPU there is nothing to do.
        """
        if self.device.type != "cpu":
            return
        lengths, places = _arranged(sizes)
        try:
            for number, length in enumerate(lengths, 1):
                what = f"the tensors of the model, part {number} of {len(lengths)}"
                self._expected.append(map_anonymous(length, what))
        except MemoryBudgetError:
            self._expected.clear()
            raise
        self._places = places

    def empty(self, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        """A contiguous tensor on the device, 64-byte aligned; its contents are undefined (zero on a fresh mapping)."""
        nbytes = math.prod(shape) * dtype.itemsize
        with self._lock:
            self.bytes += nbytes
            if self.device.type != "cpu":
                return torch.empty(shape, dtype=dtype, device=self.device)
            if nbytes == 0:
                return torch.empty(shape, dtype=dtype)
            mapping, offset = self._place(nbytes)
            # A storage of its own: what saves or compares models must not see one big shared tensor.
            cut = torch.frombuffer(mapping, dtype=torch.uint8, count=nbytes, offset=offset)
        return cut.view(dtype).view(shape)

    def _place(self, nbytes: int) -> _Place:
        """Where there is room for so many bytes, which is then taken."""
        places = self._places.get(nbytes)
        if places is None:
            slab = next((slab for slab in self._slabs if slab.fits(nbytes)), None) or self._grow(nbytes)
            place = _Place(slab.mapping, slab.used)
            slab.used += _aligned(nbytes)
            return place
        first = places[-1]
        place = _Place(self._expected[first.slab], first.offset)
        first.offset += _aligned(nbytes)
        first.count -= 1
        if not first.count:
            places.pop()
            if not places:
                del self._places[nbytes]
        return place

    def _grow(self, nbytes: int) -> _Slab:
        so_far = sum(len(slab.mapping) for slab in self._slabs)
        wanted = max(SLAB_BYTES, min(so_far, MAX_SLAB_BYTES), nbytes)
        try:
            mapping = map_anonymous(wanted, "tensors of the model")
        except MemoryBudgetError:
            if wanted == nbytes:
                raise
            mapping = map_anonymous(nbytes, "a tensor of the model")  # there may be room for no more than that
        self._slabs.append(_Slab(mapping))
        return self._slabs[-1]

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is not None:
            self.discard()

    def discard(self) -> None:
        """Give the pages back although tensors may still refer to them: the load failed and nobody may use those.

        An exception keeps the frames it went through alive, and with them the half-loaded model.
        """
        for mapping in (*self._expected, *(slab.mapping for slab in self._slabs)):
            give_back(mapping)
        self._slabs.clear()
        self._expected.clear()
        self._places.clear()


class _Place(NamedTuple):
    mapping: mmap.mmap
    offset: int


def _aligned(nbytes: int) -> int:
    return -(-nbytes // ALIGNMENT) * ALIGNMENT


def _arranged(sizes: Mapping[int, int]) -> tuple[list[int], dict[int, list[_Places]]]:
    """The lengths of mappings that hold so many tensors of each size, and where in them those of each size are."""
    lengths, places = [0], dict[int, list[_Places]]()
    for size, count in _largest_first(sizes):
        step, runs = _aligned(size), places.setdefault(size, [])
        while count:
            room = max(MAX_SLAB_BYTES - lengths[-1], 0) // step
            if not room and lengths[-1]:
                lengths.append(0)
                continue
            fitting = min(count, max(room, 1))
            runs.append(_Places(len(lengths) - 1, lengths[-1], fitting))
            lengths[-1] += fitting * step
            count -= fitting
        runs.reverse()  # they are taken from the end
    return [length for length in lengths if length], places


def _largest_first(sizes: Mapping[int, int]) -> Iterator[tuple[int, int]]:
    """Sizes and counts; a tensor without elements takes no room."""
    return ((size, sizes[size]) for size in sorted(sizes, reverse=True) if size and sizes[size])
