"""The staging arena: one anonymous mapping, carved into equal slots that are used again and again."""

from __future__ import annotations

import mmap
import threading
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from ..errors import PolicyError
from ..shortage import HUGE_PAGE, advise, give_back, map_anonymous


@dataclass(slots=True)
class Slot:
    """One buffer of the arena, as uint8 tensor and as memoryview of the same bytes."""

    tensor: Tensor
    memory: memoryview
    used: int = 0

    def first(self, nbytes: int) -> Tensor:
        """The first `nbytes` bytes, counted into the peak."""
        self.used = max(self.used, nbytes)
        return self.tensor[:nbytes]


class Arena:
    """`staging_bytes // slot size` slots of at least `slot_bytes` bytes; pages are taken when first touched.

    A view of a slot must not outlive the arena: after `close` its bytes read as zeros. Raises `PolicyError` when not
    one slot fits.
    """

    def __init__(self, staging_bytes: int, slot_bytes: int) -> None:
        self.slot_bytes = rounded_slot(slot_bytes)
        count = staging_bytes // self.slot_bytes
        if count < 1:
            raise PolicyError(f"staging_bytes is {staging_bytes}; one buffer takes {self.slot_bytes}")
        huge = self.slot_bytes % HUGE_PAGE == 0
        nbytes = count * self.slot_bytes + (HUGE_PAGE if huge else 0)
        what = f"the staging arena, {count} buffers of {self.slot_bytes} bytes"
        self._map: mmap.mmap | None = map_anonymous(nbytes, what, huge=False)
        huge = huge and hasattr(mmap, "MADV_HUGEPAGE") and advise(self._map, mmap.MADV_HUGEPAGE)
        self._granule = HUGE_PAGE if huge else mmap.PAGESIZE
        self._memory: memoryview | None = memoryview(self._map)
        base = torch.frombuffer(self._map, dtype=torch.uint8)
        start = -base.data_ptr() % self._granule
        slots = range(start, start + count * self.slot_bytes, self.slot_bytes)
        self.tensor = base[start : start + count * self.slot_bytes]
        """All slots, as uint8."""
        self._slots = [Slot(base[at : at + self.slot_bytes], self._memory[at : at + self.slot_bytes]) for at in slots]
        self._free = self._slots[::-1]
        self._lock = threading.Lock()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def acquire(self) -> Slot:
        """A free slot; raises `PolicyError` when all are taken."""
        with self._lock:
            if not self._free:
                raise PolicyError(f"all {len(self._slots)} buffers of the arena are in use; give more staging_bytes")
            return self._free.pop()

    def release(self, slot: Slot) -> None:
        """Takes a slot back; the caller keeps no view of it."""
        with self._lock:
            self._free.append(slot)

    @property
    def peak_bytes(self) -> int:
        """Bytes of the arena that were ever touched, in whole pages."""
        return sum(-(-slot.used // self._granule) * self._granule for slot in self._slots)

    def close(self) -> None:
        """Gives the memory back to the system, even where a view of it is still referenced."""
        if self._map is None or self._memory is None:
            return
        # Not unmapped by force: torch would read from where nothing is. The mapping goes with the last view of it,
        # which a traceback may hold; its pages go now.
        give_back(self._map)
        for slot in self._slots:
            slot.memory.release()
            slot.tensor = torch.empty(0, dtype=torch.uint8)
        self.tensor = torch.empty(0, dtype=torch.uint8)
        self._memory.release()
        self._map = self._memory = None


def rounded_slot(nbytes: int) -> int:
    """Size of a slot for `nbytes` bytes: whole pages."""
    return -(-nbytes // mmap.PAGESIZE) * mmap.PAGESIZE
