"""One process at a time compiles a kernel, the others wait for what it puts into the disk cache.

A lock only saves work: numba's cache takes what several processes write at once. So nobody waits for long, and where
files cannot be locked, as on some network file systems, everybody compiles.
"""

from __future__ import annotations

import contextlib
import logging
import os
import time
from typing import Self

from ..system_calls import SHARES_LOCKS, lock, open_plain, unlock

logger = logging.getLogger("quantload")
WAIT_SECONDS = 60.0
"""When another process is no longer waited for; it compiles a kernel in one or two, or it was stopped."""
POLL_SECONDS = 0.02
NOTICE_SECONDS = 5.0
"""How long a process waits, for all kernels together, before it says so."""


class _Waiting:
    """How long this process has waited so far; it is said once."""

    def __init__(self) -> None:
        self._seconds, self._said = 0.0, False

    def poll(self) -> None:
        """Wait a little longer."""
        time.sleep(POLL_SECONDS)
        self._seconds += POLL_SECONDS
        if self._seconds > NOTICE_SECONDS and not self._said:
            self._said = True
            logger.info(
                "waiting for another process that compiles CPU kernels; what it does not finish in %.0f s is compiled "
                "without it",
                WAIT_SECONDS,
            )


_waiting = _Waiting()


class CompileLock:
    """A lock on a file of its own, which goes with it; it ends with the process, however that ends."""

    def __init__(self, path: str) -> None:
        self._path = path
        self._fd = -1

    def take(self) -> bool:
        """Whether this process holds it now, or has nothing to wait for; False where another holds it."""
        try:
            os.makedirs(os.path.dirname(self._path), exist_ok=True)
            fd = open_plain(self._path, os.O_RDWR | os.O_CREAT, 0o600, follow=False)
        except OSError:
            return True  # numba says what is wrong with the folder
        try:
            lock(fd)
        except OSError as error:
            os.close(fd)
            return not isinstance(error, BlockingIOError)
        self._fd = fd
        return True

    def wait(self) -> None:
        """Until `take` says yes, or for `WAIT_SECONDS`."""
        end = time.monotonic() + WAIT_SECONDS
        while not self.take() and time.monotonic() < end:
            _waiting.poll()

    def release(self) -> None:
        """Let go of it, where it is held."""
        if self._fd >= 0:
            if SHARES_LOCKS:
                self._remove()
            unlock(self._fd)
            os.close(self._fd)
            self._fd = -1
            if not SHARES_LOCKS:  # open files cannot be removed either
                self._remove()

    def _remove(self) -> None:
        with contextlib.suppress(FileNotFoundError, PermissionError):  # on Windows while others have it open
            os.unlink(self._path)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.release()
