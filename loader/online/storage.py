"""Where final tensors live.

On a CPU they are cut one after the other from large anonymous mappings with huge pages: the first write to a fresh
page is the most expensive part of writing, and the allocator's own fragmentation would move the peak by a gigabyte.
Pages nobody wrote to cost nothing, so a mapping may be larger than what is cut from it.
"""

from __future__ import annotations

import math
import mmap
import threading
from types import TracebackType
from typing import Self

import torch

SLAB_BYTES = 256 << 20
ALIGNMENT = 64


class FinalStorage:
    """Hands out uninitialized tensors that stay for the life of the model."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.bytes = 0
        self._slabs: list[mmap.mmap] = []
        self._used = 0
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
            if not self._slabs or self._used + nbytes > len(self._slabs[-1]):
                self._slabs.append(_map(max(SLAB_BYTES, nbytes)))
                self._used = 0
            # A storage of its own: what saves or compares models must not see one big shared tensor.
            cut = torch.frombuffer(self._slabs[-1], dtype=torch.uint8, count=nbytes, offset=self._used)
            self._used += -(-nbytes // ALIGNMENT) * ALIGNMENT
        return cut.view(dtype).view(shape)

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
            slab.madvise(mmap.MADV_DONTNEED)
        self._slabs.clear()


def _map(nbytes: int) -> mmap.mmap:
    mapping = mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        mapping.madvise(mmap.MADV_HUGEPAGE)
    return mapping
