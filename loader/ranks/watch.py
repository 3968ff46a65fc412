"""How ranks notice that one of them failed: through the store that they met in, while each goes on with its load."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import threading
import time
from collections import Counter
from collections.abc import Iterator
from types import TracebackType
from typing import Any, Self

import psutil
from torch.distributed.distributed_c10d import Store

from ..checkpoint.crew import leave_if_stopping
from ..errors import LoadCancelledError, RankError
from ..shortage import start

POLL_SECONDS = 0.2
_WAIT_SECONDS = 0.02
_SHORT_WAIT_SECONDS = 5e-4
_UNREACHABLE = "the ranks can no longer reach each other"
_GONE_SECONDS = 1.0
REASON_SECONDS = 5.0
"""How long a rank that lost another one waits to learn why."""


class Watch:
    """One load of all ranks: inside, what fails on one of them cancels it on all.

    `cancel` is set then, and `trouble` says what happened. Ranks of the same machine also notice one that was killed.
    """

    def __init__(self, store: Store, rank: int, ranks: int) -> None:
        self._store, self._rank, self._ranks = store, rank, ranks
        self._said: Counter[str] = Counter()
        self._gathered: list[str] = []
        self.cancel = threading.Event()
        self.trouble: str | None = None
        self._others: dict[int, int] = {}
        self.local_ranks: list[int] = [rank]
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._look, name="quantload-ranks", daemon=True)

    def __enter__(self) -> Self:
        start(self._thread, "the thread that watches the other ranks")
        try:
            places = self.gather("places", [socket.gethostname(), os.getpid()])
        except BaseException:
            self._end()
            raise
        here = places[self._rank][0]
        self.local_ranks = [rank for rank, (host, _) in enumerate(places) if host == here]
        self._others = {rank: places[rank][1] for rank in self.local_ranks if rank != self._rank}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if isinstance(error, RankError):
            self._wait_for_reason()  # while somebody still looks for it
        self._end()  # before anything is said: what fails here is no other rank's trouble
        if error is None:
            self._leave()
        elif self.trouble is None:
            with contextlib.suppress(RuntimeError):  # the store may be what has gone
                self._store.set("failed", f"rank {self._rank} failed: {error or type(error).__name__}")

    def _leave(self) -> None:
        """Let the first rank go last: the store may be its own, and another may not have looked yet."""
        keys = [f"left/{rank}" for rank in range(self._ranks)]
        try:
            self._store.set(keys[self._rank], "")
            if self._rank > 0:
                return
            while not self._store.check(keys):
                if self._find() is not None:
                    return
                time.sleep(_WAIT_SECONDS)
            for key in (*keys, *(f"{key}/{rank}" for key in self._gathered for rank in range(self._ranks))):
                self._store.delete_key(key)  # a server reloads for months
        except RuntimeError as error:
            raise RankError(f"{_UNREACHABLE}: {error}") from error

    def gather(self, key: str, value: Any) -> list[Any]:
        """What each rank has to say; waits for all, and raises `RankError` if one fails meanwhile."""
        self._said[key] += 1
        key = f"{key}/{self._said[key]}"
        self._gathered.append(key)
        try:
            self._store.set(f"{key}/{self._rank}", json.dumps(value))
            keys = [f"{key}/{rank}" for rank in range(self._ranks)]
            while not self._store.check(keys):
                self.raise_trouble()
                time.sleep(_WAIT_SECONDS)
            return [json.loads(self._store.get(each)) for each in keys]
        except RuntimeError as error:
            raise RankError(f"{_UNREACHABLE}: {error}") from error

    def exchange(self, key: str, value: bytes) -> list[bytes]:
        """What the other ranks have to say under a key of which the store keeps nothing afterwards; waits for all.

        Raises `RankError` if one fails meanwhile.
        """
        keys = [f"{key}/{rank}" for rank in range(self._ranks)]
        others = keys[: self._rank] + keys[self._rank + 1 :]
        try:
            self._store.set(keys[self._rank], value)  # type: ignore[arg-type]  # bytes are taken, too
            while not self._store.check(others):
                self.raise_trouble()
                leave_if_stopping()
                time.sleep(_SHORT_WAIT_SECONDS)
            found = [self._store.get(each) for each in others]
            if self._store.add(f"{key}/read", 1) == self._ranks:
                for each in (*keys, f"{key}/read"):
                    self._store.delete_key(each)
        except RuntimeError as error:
            raise RankError(f"{_UNREACHABLE}: {error}") from error
        return found

    def raise_trouble(self) -> None:
        """Raise `RankError` if another rank failed."""
        if self.trouble is not None:
            raise RankError(self.trouble)

    @contextlib.contextmanager
    def explaining(self) -> Iterator[None]:
        """What ends inside because of another rank is a `RankError` that says what happened there.

        An error of this rank's own stays what it is, whatever happened elsewhere at the same time.
        """
        try:
            yield
        except (RankError, LoadCancelledError) as error:
            if self.trouble is None:
                raise
            raise RankError(self.trouble) from error

    def _wait_for_reason(self) -> None:
        """Give the other rank the time to say why it is gone."""
        end = time.monotonic() + REASON_SECONDS
        while self.trouble is None and time.monotonic() < end:
            time.sleep(_WAIT_SECONDS)

    def _look(self) -> None:
        while not self._ended.wait(POLL_SECONDS):
            found = self._find()
            if found is not None:
                self.trouble = found
                self.cancel.set()
                return

    def _find(self) -> str | None:
        """What happened to another rank, if anything did."""
        try:
            if self._store.check(["failed"]):
                return str(self._store.get("failed"), "utf-8")
        except RuntimeError as error:
            return self._find_dead(_GONE_SECONDS) or f"{_UNREACHABLE}: {error}"
        return self._find_dead()

    def _find_dead(self, seconds: float = 0.0) -> str | None:
        """Which rank of this machine is no more; the connections of one may be gone that long before it is."""
        end = time.monotonic() + seconds
        while True:
            for rank, process in self._others.items():
                if not _runs(process):
                    return f"rank {rank} (process {process}) was killed, or ended, before the load was done"
            if time.monotonic() >= end or self._ended.wait(_WAIT_SECONDS):
                return None

    def _end(self) -> None:
        self._ended.set()
        self._thread.join()


def _runs(process: int) -> bool:
    """Whether a process runs; one that ended and that nobody has asked for does not."""
    try:
        return psutil.Process(process).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
