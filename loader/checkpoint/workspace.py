"""The memory a worker reads pieces into, and where `deliver` sees them."""

from __future__ import annotations

from typing import Protocol, Self

from torch import Tensor

from .arena import Arena, Slot, rounded_slot

ALIGNMENT = 16


class Workspace(Protocol):
    """One worker's buffers. What `deliver` sees is `buffer` and `scratch`; the rest is for the reader."""

    buffer: Tensor
    """uint8 [bytes of the piece], 16-byte aligned, on the device where the piece is worked on.

    Both it and what `scratch` returns are overwritten after `deliver` returns: copy what must stay.
    """

    def scratch(self, nbytes: int) -> Tensor:
        """A second uint8 tensor of `nbytes` bytes, at most one slot, beside `buffer`; its content is undefined.

        Raises `ValueError` for more bytes.
        """

    def next_slot(self) -> Slot:
        """A buffer on the host that may be overwritten."""

    def landed(self, nbytes: int) -> Tensor:
        """The first bytes of the last slot, where they are worked on."""

    def aligned(self, part: Tensor) -> Tensor:
        """An aligned copy of a part of what `landed` returned, of at most half a slot."""

    def write(self, target: Tensor, nbytes: int) -> None:
        """Copy the first bytes of the last slot to a final tensor of as many bytes on the device."""

    def delivered(self) -> None:
        """All work on `buffer` has been asked for."""

    def __enter__(self) -> Self:
        """From now on this thread works on pieces."""

    def __exit__(self, *exc_info: object) -> None:
        """Give all buffers back, once nothing reads them any more."""


class WorkingMemory(Protocol):
    """The memory of all workers of a run."""

    slot_bytes: int

    def __enter__(self) -> Self: ...
    def __exit__(self, *exc_info: object) -> None: ...

    @property
    def peak_bytes(self) -> int:
        """Bytes that were ever touched, on the device where pieces are worked on."""

    def workspace(self) -> Workspace:
        """Buffers for one more worker."""


class HostMemory:
    """Pieces are worked on where they are read to: in the arena."""

    slots_per_worker = 2

    def __init__(self, workers: int, slot_bytes: int) -> None:
        self._arena = Arena(workers * self.slots_per_worker * rounded_slot(slot_bytes), slot_bytes)
        self.slot_bytes = self._arena.slot_bytes

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._arena.close()

    @property
    def peak_bytes(self) -> int:
        return self._arena.peak_bytes

    def workspace(self) -> HostWorkspace:
        return HostWorkspace(self._arena)


class HostWorkspace:
    """A slot to read into and work on, and one more where a piece must be rearranged."""

    __slots__ = ("_arena", "_scratch", "_slot", "buffer")

    def __init__(self, arena: Arena) -> None:
        self._arena = arena
        self._scratch: Slot | None = None
        self._slot = arena.acquire()
        self.buffer: Tensor = self._slot.tensor[:0]

    def scratch(self, nbytes: int) -> Tensor:
        if nbytes > self._arena.slot_bytes:
            raise ValueError(f"scratch of {nbytes} bytes asked for; a buffer of the arena has {self._arena.slot_bytes}")
        if self._scratch is None:
            self._scratch = self._arena.acquire()
        return self._scratch.first(nbytes)

    def next_slot(self) -> Slot:
        return self._slot

    def landed(self, nbytes: int) -> Tensor:
        return self._slot.first(nbytes)

    def aligned(self, part: Tensor) -> Tensor:
        half = self._arena.slot_bytes // 2
        return self._slot.first(half + part.numel())[half:].copy_(part)

    def write(self, target: Tensor, nbytes: int) -> None:
        target.copy_(self._slot.first(nbytes))

    def delivered(self) -> None:
        """Nothing on the host is left for later."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.buffer = self._slot.tensor[:0]
        self._arena.release(self._slot)
        if self._scratch is not None:
            self._arena.release(self._scratch)
            self._scratch = None
