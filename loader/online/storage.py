"""Where final tensors live.

On a CPU they are cut one after the other from large anonymous mappings with huge pages: the first write to a fresh
page is the most expensive part of writing, and the allocator's own fragmentation would move the peak by a gigabyte.
Pages nobody wrote to cost nothing, so a mapping may be larger than what is cut from it. Its last huge page costs two
mebibytes however little of it is used; so there are few mappings, each as large as all before it, and what is left in
one is for smaller tensors.
"""

from __future__ import annotations

import math
import mmap
import threading
from dataclasses import dataclass
from types import TracebackType
from typing import Self

import torch

SLAB_BYTES = 256 << 20
"""The first mapping."""
MAX_SLAB_BYTES = 4 << 30
"""The largest, unless one tensor is larger: memory comes back when all tensors of a mapping are gone."""
ALIGNMENT = 64


@dataclass(slots=True)
class _Slab:
    mapping: mmap.mmap
    used: int = 0

    def fits(self, nbytes: int) -> bool:
        return self.used + nbytes <= len(self.mapping)


class FinalStorage:
    """Hands out uninitialized tensors that stay for the life of the model."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.bytes = 0
        self._slabs: list[_Slab] = []
        self._lock = threading.Lock()

    def empty(self, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        """A contiguous tensor on the device, 64-byte aligned; its contents are undefined (zero on a fresh mapping)."""
        nbytes = math.prod(shape) * dtype.itemsize
        with self._lock:
            self.bytes += nbytes
            if self.device.type != "cpu":
                return torch.empty(shape, dtype=dtype, device=self.device)
            if nbytes == 0:
                return torch.empty(shape, dtype=dtype)
            slab = next((slab for slab in self._slabs if slab.fits(nbytes)), None) or self._grow(nbytes)
            # A storage of its own: what saves or compares models must not see one big shared tensor.
            cut = torch.frombuffer(slab.mapping, dtype=torch.uint8, count=nbytes, offset=slab.used)
            slab.used += -(-nbytes // ALIGNMENT) * ALIGNMENT
        return cut.view(dtype).view(shape)

    def _grow(self, nbytes: int) -> _Slab:
        so_far = sum(len(slab.mapping) for slab in self._slabs)
        self._slabs.append(_Slab(_map(max(SLAB_BYTES, min(so_far, MAX_SLAB_BYTES), nbytes))))
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
        for slab in self._slabs:
            slab.mapping.madvise(mmap.MADV_DONTNEED)
        self._slabs.clear()


def _map(nbytes: int) -> mmap.mmap:
    mapping = mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        mapping.madvise(mmap.MADV_HUGEPAGE)
    return mapping
