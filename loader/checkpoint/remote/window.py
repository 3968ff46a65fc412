"""What is fetched ahead of a run: blocks in buffers of its own, by threads that have one request each in flight."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import NamedTuple

from ...options import LoadOptions
from ...shortage import starting
from ..arena import Arena, Slot, rounded_slot
from ..crew import Stopped
from .blocks import REQUEST_BYTES, Blocks, Schedule
from .requests import Requests

CONNECTIONS = 8
"""Requests in flight; bench/remote.py measures what more of them bring."""
LEAST_REQUEST = 256 << 10
_TICK = 0.1
_LEAVE_SECONDS = 0.5


class Sizes(NamedTuple):
    """How many requests of how many bytes are in flight, and how many buffers there are for them and for what came."""

    connections: int
    request_bytes: int
    buffers: int

    @property
    def nbytes(self) -> int:
        """Bytes of all buffers."""
        return self.buffers * rounded_slot(self.request_bytes)


def choose_sizes(options: LoadOptions, total_bytes: int) -> Sizes:
    """What a run over `total_bytes` bytes needs; with a limit on staging, half of it.

    One more buffer than there are connections, for what is being read out while its successor is on its way, and
    another for a block that is held for its next use.
    """
    connections, request_bytes = options.connections or CONNECTIONS, REQUEST_BYTES
    if options.staging_bytes is not None:
        half = options.staging_bytes // 2
        request_bytes = max(min(request_bytes, rounded_slot(half // (connections + 2) - 4095)), LEAST_REQUEST)
        connections = max(min(connections, half // rounded_slot(request_bytes) - 2), 1)
    request_bytes = min(request_bytes, max(rounded_slot(total_bytes), LEAST_REQUEST))
    buffers = min(connections + 2, -(-total_bytes // request_bytes) + 2)
    return Sizes(min(connections, buffers), request_bytes, buffers)


class _Held:
    """A stay that was asked for: the buffer it is in, and how many of its uses are still to come."""

    __slots__ = ("ready", "slot", "uses")

    def __init__(self, slot: Slot, uses: int) -> None:
        self.slot, self.uses, self.ready = slot, uses, False


class Window:
    """Fetches the stays of a schedule in order, as far ahead as there are buffers, and hands them to readers.

    Use it as a context manager; at its end nothing is fetched any more. A thread that waits for a server that says
    nothing ends when that time is up, and touches nothing.
    """

    def __init__(
        self, requests: Requests, blocks: Blocks, plan: Schedule, sizes: Sizes, stopping: Callable[[], bool]
    ) -> None:
        self._requests, self._blocks, self._plan = requests, blocks, plan
        self._stopping = stopping
        self._arena = Arena(sizes.nbytes, rounded_slot(sizes.request_bytes))
        self._free = sizes.buffers
        self._held: dict[int, _Held] = {}
        self._next = 0
        self._left = False
        self._error: BaseException | None = None
        self._changed = threading.Condition()
        count = min(sizes.connections, len(plan.stays))
        self._threads = [
            threading.Thread(target=self._fetch, name=f"quantload-fetcher-{number}", daemon=True)
            for number in range(count)
        ]
        requests.counters.connections = count

    def start(self) -> None:
        """Begin to fetch."""
        with starting(f"the {len(self._threads)} threads that fetch"):
            for thread in self._threads:
                thread.start()

    @property
    def peak_bytes(self) -> int:
        """The most bytes of the buffers that were ever in use."""
        return self._arena.peak_bytes

    def close(self) -> None:
        """Fetch nothing more, and give the buffers back."""
        with self._changed:
            self._left = True
            self._changed.notify_all()
        for thread in self._threads:
            if thread.ident is not None:
                thread.join(_LEAVE_SECONDS / max(len(self._threads), 1))
        self._arena.close()

    def block_of(self, stay: int) -> int:
        """The block that a stay is of."""
        return self._plan.stays[stay].block

    def wait(self, stay: int) -> memoryview:
        """The bytes of a stay, once they are there; raises what kept them from coming, or `Stopped`."""
        with self._changed:
            while True:
                held = self._held.get(stay)
                if held is not None and held.ready:
                    return held.slot.memory
                if self._error is not None:
                    error, self._error = self._error, Stopped()  # one reader says it, the others only leave
                    try:
                        raise error
                    finally:
                        del error
                if self._left or self._stopping():
                    raise Stopped
                self._changed.wait(_TICK)

    def used(self, stay: int) -> None:
        """One use of a stay is over; after the last one its buffer is free."""
        with self._changed:
            held = self._held[stay]
            held.uses -= 1
            if held.uses == 0:
                del self._held[stay]
                self._arena.release(held.slot)
                self._free += 1
                self._changed.notify_all()

    def _fetch(self) -> None:
        try:
            while (stay := self._take()) is not None:
                block = self._plan.stays[stay].block
                held = self._held[stay]
                nbytes = self._blocks.nbytes(block)
                held.slot.first(nbytes)
                self._requests.fill(
                    self._blocks.paths[block], self._blocks.starts[block], held.slot.memory[:nbytes], self._is_over
                )
                with self._changed:
                    held.ready = True
                    self._changed.notify_all()
        except Stopped:
            pass
        except BaseException as error:
            with self._changed:
                if self._error is None and not self._left:
                    self._error = error
                self._changed.notify_all()

    def _take(self) -> int | None:
        """The next stay to fetch, with a buffer for it; None when there is nothing more to do."""
        with self._changed:
            while not self._is_over() and self._next < len(self._plan.stays):
                if self._free:
                    stay, self._next = self._next, self._next + 1
                    self._free -= 1
                    self._held[stay] = _Held(self._arena.acquire(), self._plan.stays[stay].uses)
                    return stay
                self._changed.wait(_TICK)
            return None

    def _is_over(self) -> bool:
        return self._left or self._error is not None or self._stopping()
