"""What to do with the page cache of one file: leave what was warm, drop what the load itself brought in."""

from __future__ import annotations

import errno
import os
import random
from collections.abc import Iterator, Sequence
from typing import Protocol

from ..kernels.system_calls import DONTNEED, NORMAL, RANDOM, SEQUENTIAL, WILLNEED
from ..options import PageCache

_MIN_WINDOW = 4 << 20
_MAX_WINDOWS = 64
_SAMPLES = 2
_PAGE = 4096
# The kernel cuts one request off at the device's readahead or largest transfer, of which 128 KiB is the usual least.
_READAHEAD = 128 << 10
# From here on the kernel's own readahead keeps a disk busy, and costs a third of the CPU time: it fills large folios,
# a request only single pages.
_ENOUGH_READAHEAD = 1 << 20
# Filesystems and kernels that cannot say: their files are left alone.
_CANNOT_TELL = (errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL)


class ProbeCalls(Protocol):
    """The two system calls the probe makes."""

    def preadv(self, fd: int, buffers: list[memoryview], offset: int, flags: int = 0) -> int: ...
    def advise(self, fd: int, offset: int, length: int, advice: int) -> None: ...


class CacheWindows:
    """Which windows of a file were cold before it was read; at most 64 windows, each at least 4 MiB.

    `keep` calls every window warm and `drop` every window cold. `auto` asks the kernel with `RWF_NOWAIT`: a window is
    warm when both of its sampled pages answer. The samples are random, because a probe that misses makes the kernel
    read that very page, and the next load must not take it for a warm window. `before` is what `cold` was for somebody
    who asked the kernel earlier, and counts instead: the file may have been brought in since.
    """

    __slots__ = ("_ask_ahead", "_cold", "_size", "_window", "any_cold", "used")

    def __init__(
        self,
        size: int,
        policy: PageCache,
        fd: int,
        calls: ProbeCalls,
        device: int | None = None,
        before: Sequence[bool] | None = None,
    ) -> None:
        self._ask_ahead = kernel_readahead(device) < _ENOUGH_READAHEAD
        self._size = size
        self._window = max(_MIN_WINDOW, -(-size // _MAX_WINDOWS))
        count = -(-size // self._window)
        self._cold = [policy == "drop"] * count
        if policy == "auto" and before is not None:
            self._cold = [*before]
        elif policy == "auto":
            self._probe(fd, calls)
        self.any_cold = any(self._cold)
        self.used = False

    @property
    def cold(self) -> tuple[bool, ...]:
        """Of each window, whether it was cold."""
        return tuple(self._cold)

    def _probe(self, fd: int, calls: ProbeCalls) -> None:
        nowait = getattr(os, "RWF_NOWAIT", 0)
        if not nowait:
            return
        byte = memoryview(bytearray(1))
        # Without this a probe that misses starts a readahead of 128 KiB instead of one page.
        calls.advise(fd, 0, 0, RANDOM)
        try:
            for number in range(len(self._cold)):
                start = number * self._window
                stop = min(start + self._window, self._size)
                for _ in range(_SAMPLES):
                    try:
                        calls.preadv(fd, [byte], random.randrange(start, stop), nowait)
                    except BlockingIOError:
                        self._cold[number] = True
                        break
        except OSError as error:
            if error.errno not in _CANNOT_TELL:
                raise
            self._cold = [False] * len(self._cold)
        finally:
            calls.advise(fd, 0, 0, SEQUENTIAL if self._ask_ahead else NORMAL)

    def cold_ranges(self, offset: int, length: int) -> Iterator[tuple[int, int]]:
        """The (offset, length) parts of a byte range that lie in cold windows, neighbours joined."""
        stop = min(offset + length, self._size)
        start: int | None = None
        while offset < stop:
            number = offset // self._window
            if self._cold[number]:
                start = offset if start is None else start
            elif start is not None:
                yield start, offset - start
                start = None
            offset = (number + 1) * self._window
        if start is not None:
            yield start, stop - start

    def prefetch(self, fd: int, offset: int, length: int, calls: ProbeCalls) -> None:
        """Starts reading the cold parts of a byte range in the background, unless the kernel does so by itself."""
        if not self._ask_ahead:
            return
        for begin, count in self.cold_ranges(offset, length):
            self.used = True
            for start in range(begin, begin + count, _READAHEAD):
                calls.advise(fd, start, min(_READAHEAD, begin + count - start), WILLNEED)

    def release(self, fd: int, offset: int, length: int, calls: ProbeCalls) -> None:
        """Drops the pages of the cold parts of a byte range; a page shared with the next range stays until `sweep`."""
        for begin, count in self.cold_ranges(offset, length):
            self.used = True
            first = begin // _PAGE * _PAGE
            calls.advise(fd, first, begin + count - first, DONTNEED)

    def sweep(self, fd: int, calls: ProbeCalls) -> None:
        """Drops every page of the cold windows, if any of them was read."""
        if self.used:
            for begin, count in self.cold_ranges(0, self._size):
                calls.advise(fd, begin, count, DONTNEED)
        self.used = False


def kernel_readahead(device: int | None) -> int:
    """Bytes the kernel reads ahead on a device (`st_dev`); 0 where it does not say."""
    if device is None or not hasattr(os, "major"):
        return 0
    number = f"{os.major(device)}:{os.minor(device)}"
    for folder in (f"/sys/class/bdi/{number}", f"/sys/dev/block/{number}/queue", f"/sys/dev/block/{number}/../queue"):
        try:
            with open(f"{folder}/read_ahead_kb") as file:
                return int(file.read()) << 10
        except (OSError, ValueError):
            continue
    return 0
