"""How many requests for generations may be under way: those beyond are told at once to come back later."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from .api_errors import ApiError

MAX_QUEUE = 256
LEAST_SECONDS, MOST_SECONDS = 1, 60
_NEWEST = 0.2
"""Weight of the latest request in the mean time that requests take."""


class Admission:
    """Counts the requests under way: one that is answered (a batch may answer more) and `max_queue` that wait.

    Used by one event loop only.
    """

    def __init__(self, max_queue: int = MAX_QUEUE) -> None:
        if max_queue < 0:
            raise ValueError(f"a queue cannot have {max_queue} places")
        self.most = max_queue + 1
        self.under_way = 0
        self._seconds = 1.0
        self._waiting = 0
        self._closed = False
        self._changed = asyncio.Event()

    def enter(self) -> Place:
        """A place for one more request. Raises `ApiError` (429 with `Retry-After`) where all are taken."""
        if self.under_way >= self.most:
            wait = round(self._seconds * self.under_way)
            raise ApiError(
                429,
                f"{self.under_way} requests are under way, and this server takes no more at once; try again later",
                code="queue_full",
                headers={"Retry-After": str(max(LEAST_SECONDS, min(MOST_SECONDS, wait)))},
            )
        self.under_way += 1
        return Place(self)

    async def opened(self) -> None:
        """Wait where the weights are being exchanged. Raises `ApiError` (429) where too many wait already."""
        if not self._closed:
            return
        if self._waiting >= self.most:
            raise ApiError(
                429,
                f"the weights are being exchanged, and {self._waiting} requests wait for it; try again later",
                code="queue_full",
                headers={"Retry-After": "5"},
            )
        self._waiting += 1
        try:
            while self._closed:
                await self._next_change()
        finally:
            self._waiting -= 1

    @asynccontextmanager
    async def drained(self) -> AsyncIterator[None]:
        """Inside, no request is under way: those that are have been answered, others wait until the end.

        Raises `ApiError` (409) inside of another.
        """
        if self._closed:
            raise ApiError(409, "the weights are being exchanged already; wait until that is finished", code="busy")
        self._closed = True
        try:
            while self.under_way:
                await self._next_change()
            yield
        finally:
            self._closed = False
            self._change()

    async def _next_change(self) -> None:
        await self._changed.wait()

    def _change(self) -> None:
        self._changed.set()
        self._changed = asyncio.Event()

    def left(self, seconds: float) -> None:
        """A request that took so long, since the one before it or its own beginning, is no longer under way."""
        self.under_way -= 1
        self._change()
        self._seconds += _NEWEST * (seconds - self._seconds)


class Place:
    """The place of one request; leaving it twice is leaving it once."""

    def __init__(self, admission: Admission) -> None:
        self._admission: Admission | None = admission
        self._ahead = admission.under_way
        self._since = time.monotonic()

    def leave(self) -> None:
        """The request was answered, refused, or its client left."""
        if self._admission is not None:
            # Those ahead of it were answered in that time, too.
            self._admission.left((time.monotonic() - self._since) / self._ahead)
            self._admission = None
