"""How pieces get onto a GPU: pinned buffers that are read into, a stream that copies, a stream that computes.

Each worker has `SLOTS` pairs of buffers, one pinned on the host and one on the device. While a piece is quantized on
the device, the next one is read and copied; events keep either side from overwriting what the other still reads. The
host never holds more than the arena, the device never more than the final tensors and these buffers.
"""

from __future__ import annotations

import contextlib
import itertools
import threading
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any, Protocol, Self

import torch
from torch import Tensor

from ..shortage import Shortage
from .arena import Arena, Slot, rounded_slot

SLOTS = 2
"""Pairs of buffers a worker takes turns with."""


Event = Any
"""A point in a queue, such as torch.cuda.Event: `synchronize()` blocks this thread until the queue has passed it."""


class Streams(Protocol):
    """Two queues on the device that all workers share: copies, and kernels."""

    def upload(self, target: Tensor, source: Tensor, after: Event | None) -> Event:
        """Queue a copy of pinned `source` to `target` on the device, behind `after`; passed when it is there."""

    def compute_after(self, event: Event) -> None:
        """Kernels launched from now on wait for `event`."""

    def computed(self) -> Event:
        """Passed when the kernels launched so far are done."""

    def computing(self) -> AbstractContextManager[None]:
        """Kernels that this thread launches inside go to the queue."""

    def synchronize(self) -> None:
        """Wait for everything queued."""


class CudaStreams:
    """The queues of a CUDA or ROCm device: all kernels in one, so that what two workers write to has one order."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._copies = torch.cuda.Stream(device)
        self._kernels = torch.cuda.Stream(device)

    def upload(self, target: Tensor, source: Tensor, after: Event | None) -> Event:
        with torch.cuda.stream(self._copies):
            if after is not None:
                self._copies.wait_event(after)
            target.copy_(source, non_blocking=True)
            return self._copies.record_event()

    def compute_after(self, event: Event) -> None:
        self._kernels.wait_event(event)

    def computed(self) -> Event:
        return self._kernels.record_event()

    @contextmanager
    def computing(self) -> Iterator[None]:
        with torch.cuda.device(self._device), torch.cuda.stream(self._kernels):
            yield

    def synchronize(self) -> None:
        self._copies.synchronize()
        self._kernels.synchronize()


class DeviceMemory:
    """The pinned arena on the host, its counterpart on the device, and the queues between them."""

    slots_per_worker = SLOTS + 1

    def __init__(self, workers: int, slot_bytes: int, device: torch.device, streams: Streams | None = None) -> None:
        self.slot_bytes = rounded_slot(slot_bytes)
        with contextlib.ExitStack() as stack:
            self._host = stack.enter_context(Arena(workers * SLOTS * self.slot_bytes, slot_bytes))
            if device.type == "cuda":
                pin(self._host.tensor)
                stack.callback(unpin, self._host.tensor)
            self.streams = streams or CudaStreams(device)
            nbytes = workers * self.slots_per_worker * self.slot_bytes
            self._device = torch.empty(nbytes, dtype=torch.uint8, device=device)
            self._open = stack.pop_all()
        self._free = list(torch.split(self._device, self.slot_bytes))
        self._lock = threading.Lock()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._free, self._device = [], torch.empty(0, dtype=torch.uint8)
        self._open.close()

    @property
    def peak_bytes(self) -> int:
        return self._device.numel()

    def workspace(self) -> DeviceWorkspace:
        with self._lock:
            parts = [self._free.pop() for _ in range(self.slots_per_worker)]
        slots = [DeviceSlot(self._host.acquire(), part) for part in parts[:SLOTS]]
        return DeviceWorkspace(self.streams, slots, parts[SLOTS])


class DeviceSlot:
    """A pinned buffer, its twin on the device, and when each may be overwritten."""

    def __init__(self, host: Slot, device: Tensor) -> None:
        self.host, self.device = host, device
        self.copied: Event | None = None
        self.worked_on: Event | None = None


class DeviceWorkspace:
    """Pairs of buffers that take turns, and a scratch buffer on the device."""

    def __init__(self, streams: Streams, slots: list[DeviceSlot], scratch: Tensor) -> None:
        self._streams = streams
        self._turns = itertools.cycle(slots)
        self._slot = slots[-1]
        self._scratch = scratch
        self._computing = contextlib.ExitStack()
        self.buffer: Tensor = scratch[:0]

    def scratch(self, nbytes: int) -> Tensor:
        if nbytes > self._scratch.numel():
            raise ValueError(f"scratch of {nbytes} bytes asked for; a buffer of the arena has {self._scratch.numel()}")
        return self._scratch[:nbytes]

    def next_slot(self) -> Slot:
        self._slot = next(self._turns)
        if self._slot.copied is not None:
            self._slot.copied.synchronize()
        return self._slot.host

    def landed(self, nbytes: int) -> Tensor:
        slot, target = self._slot, self._slot.device[:nbytes]
        slot.copied = self._streams.upload(target, slot.host.first(nbytes), slot.worked_on)
        self._streams.compute_after(slot.copied)
        return target

    def aligned(self, part: Tensor) -> Tensor:
        half = self._scratch.numel() // 2
        return self._slot.device[half : half + part.numel()].copy_(part)

    def write(self, target: Tensor, nbytes: int) -> None:
        # The target's memory may have been another tensor's, which a kernel still reads.
        self._slot.copied = self._streams.upload(target, self._slot.host.first(nbytes), self._streams.computed())
        self._streams.compute_after(self._slot.copied)

    def delivered(self) -> None:
        self._slot.worked_on = self._streams.computed()

    def __enter__(self) -> Self:
        self._computing.enter_context(self._streams.computing())
        return self

    def __exit__(self, *exc_info: object) -> None:
        # The pinned memory goes back to the system next: nothing may read it any more, whatever went wrong.
        self._streams.synchronize()
        self.buffer = self._scratch[:0]
        self._computing.close()


def pin(memory: Tensor) -> None:
    """Lock pages in memory and tell the driver, so that copies from them run beside everything else.

    Raises `Shortage` where the system does not allow so much locked memory.
    """
    error = torch.cuda.cudart().cudaHostRegister(memory.data_ptr(), memory.numel(), 0)
    if int(error):
        raise Shortage(
            f"{memory.numel()} bytes of staging could not be pinned for the GPU (driver error {int(error)}); "
            f"allow more locked memory (ulimit -l), or give a smaller staging or chunk"
        )


def unpin(memory: Tensor) -> None:
    """Undo `pin`; raises `RuntimeError` where the driver refuses."""
    error = torch.cuda.cudart().cudaHostUnregister(memory.data_ptr())
    if int(error):
        raise RuntimeError(f"the driver did not let go of {memory.numel()} pinned bytes (error {int(error)})")
