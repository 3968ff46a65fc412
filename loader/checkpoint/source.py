"""Where checkpoint bytes come from: the `Source` protocol, and files read with preadv, never mapped."""

from __future__ import annotations

import contextlib
import errno
import os
import stat
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, Protocol, Self

from ..errors import CheckpointError, MissingShardError, TruncatedShardError
from ..kernels import system_calls
from ..options import PageCache
from .identity import FileIdentities, FileIdentity
from .pagecache import CacheWindows
from .paths import locate
from .retry import RETRIES, may_retry

_OUT_OF_FDS = (errno.EMFILE, errno.ENFILE)


Reads = tuple[str, Sequence[tuple[int, int]]]
"""What is read for one batch of a run: a file, and (offset, length) in bytes in the order they are read."""


class Turn:
    """One batch of a run, while it is read."""

    __slots__ = ("read_into",)

    def __init__(self, read_into: Callable[[str, int, memoryview], int]) -> None:
        self.read_into = read_into
        """As that of the source; nothing but what was announced for the batch, in that order."""

    def done(self) -> None:
        """The batch is read."""


class Source(Protocol):
    """Checkpoint files by name relative to the checkpoint, such as `model-00001-of-00002.safetensors`.

    All methods may be called from several threads at once. `read_bytes` is the most one `read_into` should be asked
    for: between two of them a load can be cancelled. A class of your own inherits from this one and so need not have
    `expect` and `turn`, which are for sources that ask for what will be read long before.
    """

    read_bytes: int

    @property
    def staging_peak_bytes(self) -> int:
        """The most bytes that the source held at once of what it had read ahead, until now."""
        return 0

    def look_ahead(self, paths: Sequence[str]) -> None:
        """Says whose beginnings will be read next, in any order; those that are missing are no error here."""
        return

    def expect(self, batches: Iterable[Reads], stopping: Callable[[], bool]) -> None:
        """Says what a run will read, until `close`; reads give up with `Stopped` once `stopping()` is true."""
        return

    def turn(self, number: int) -> Turn:
        """To read batch `number` of those that are expected; a thread asks for them in that order."""
        return Turn(self.read_into)

    def size(self, path: str) -> int:
        """Size of the file in bytes; raises `MissingShardError` when there is none."""

    def read_into(self, path: str, offset: int, buffer: memoryview) -> int:
        """Fills `buffer` from byte `offset` on and returns its length; raises `TruncatedShardError` at the end."""

    def prefetch(self, path: str, offset: int, length: int) -> None:
        """Says that a byte range will be read soon."""

    def release(self, path: str, offset: int, length: int) -> None:
        """Says that a byte range will not be read again."""

    def close(self) -> None:
        """Gives back what is open; a later read opens it again."""


def read_bytes(source: Source, path: str, offset: int, length: int) -> bytearray:
    """`length` bytes of a file from `offset` on, for headers and the index."""
    data = bytearray(length)
    with memoryview(data) as view:
        source.read_into(path, offset, view)
    return data


class FileCalls:
    """The system calls `FileSource` makes; a test passes its own to make one fail."""

    def open(self, path: str) -> int:
        # Non-blocking, so that a FIFO in the folder cannot hang the load; regular files ignore it.
        return system_calls.open_plain(path, os.O_RDONLY)

    def replace(self, fd: int, fresh: int) -> None:
        """Makes `fd` a handle of the file `fresh` is open on, while other threads may be reading from it."""
        os.dup2(fresh, fd, inheritable=False)

    def close(self, fd: int) -> None:
        os.close(fd)

    def stat(self, fd: int) -> os.stat_result:
        return os.fstat(fd)

    def preadv(self, fd: int, buffers: list[memoryview], offset: int, flags: int = 0) -> int:
        return system_calls.preadv(fd, buffers, offset, flags)

    def advise(self, fd: int, offset: int, length: int, advice: int) -> None:
        system_calls.advise(fd, offset, length, advice)


class ColdBefore(NamedTuple):
    """Which windows of a file were cold when somebody looked, and which file that was."""

    file: FileIdentity
    windows: tuple[bool, ...]


@dataclass(slots=True)
class _File:
    path: str
    location: str
    size: int = 0
    fd: int = -1
    users: int = 0
    cache: CacheWindows | None = None


class FileSource(Source):
    """Files below the folder `root`.

    Read errors that may pass (EIO, ESTALE, ETIMEDOUT, EINTR) are tried again `retries` (4) times with growing pauses,
    from 10 ms on; then `CheckpointError`. A file that is not the one it was when it was first opened, by this source or
    another one with the same `identities`, is a `ChangedFileError`. At most `max_open` files stay open. `page_cache`:
    `auto` leaves what was in the page cache before and drops the rest behind the reader, `keep` drops nothing, `drop`
    everything. What was in the page cache is what `cold_before` says of files that somebody looked at earlier.
    """

    read_bytes = 2 << 20

    def __init__(
        self,
        root: Path | str,
        *,
        page_cache: PageCache = "auto",
        retries: int | None = None,
        max_open: int = 64,
        calls: FileCalls | None = None,
        identities: FileIdentities | None = None,
        cold_before: Mapping[str, ColdBefore] | None = None,
    ) -> None:
        self._root = Path(root)
        self._policy: PageCache = page_cache
        self._retries = RETRIES if retries is None else retries
        self._max_open = max_open
        self._calls = calls or FileCalls()
        self._identities = identities or FileIdentities(self._root)
        self._cold_before = cold_before or {}
        self._files: dict[str, _File] = {}
        self._lock = threading.Lock()
        self._keeps = False

    @contextlib.contextmanager
    def keeping(self) -> Iterator[None]:
        """Inside nothing is dropped from the page cache, for others who read the same; at the end what was cold is."""
        self._keeps = True
        try:
            yield
        finally:
            self._keeps = False
        for path, file in self._files.items():
            if file.cache is not None and file.cache.any_cold:
                self._give_back(self._acquire(path))
                file.cache.used = True
        self.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def size(self, path: str) -> int:
        """Size of the file in bytes; raises `MissingShardError` when there is none."""
        file = self._acquire(path)
        self._give_back(file)
        return self._identities[path].size

    def read_into(self, path: str, offset: int, buffer: memoryview) -> int:
        """Fills `buffer` from byte `offset` on and returns its length.

        Raises `TruncatedShardError` when the file ends before, `CheckpointError` when it cannot be read.
        """
        file = self._acquire(path)
        try:
            done, failures, total = 0, 0, len(buffer)
            while done < total:
                try:
                    count = self._calls.preadv(file.fd, [buffer[done:] if done else buffer], offset + done)
                except OSError as error:
                    failures += 1
                    self._pause_before_retry(file, offset + done, error, failures)
                    continue
                if count == 0:
                    raise TruncatedShardError(
                        f"{path}: ended at byte {offset + done:,} while bytes up to {offset + total:,} were expected; "
                        "it shrank while it was read, or was never complete: copy or download it again"
                    )
                done += count
            return total
        finally:
            self._give_back(file)

    def prefetch(self, path: str, offset: int, length: int) -> None:
        """Starts reading a byte range in the background where it was cold."""
        self._advise(path, offset, length, drop=False)

    def release(self, path: str, offset: int, length: int) -> None:
        """Drops a byte range from the page cache where it was cold."""
        self._advise(path, offset, length, drop=True)

    def close(self) -> None:
        """Closes every file and drops what is left of the cold ones; a later read opens them again."""
        with self._lock:
            for file in self._files.values():
                if file.fd >= 0:
                    self._close(file)

    def _advise(self, path: str, offset: int, length: int, drop: bool) -> None:
        known = self._files.get(path)
        if drop and self._keeps:
            return
        if known is not None and known.cache is not None and not known.cache.any_cold:
            return
        file = self._acquire(path)
        try:
            if file.cache is not None and file.cache.any_cold:
                act = file.cache.release if drop else file.cache.prefetch
                act(file.fd, offset, length, self._calls)
        finally:
            self._give_back(file)

    def _acquire(self, path: str) -> _File:
        with self._lock:
            file = self._files.get(path)
            if file is None:
                file = self._files[path] = _File(path, str(locate(self._root, path)))
            if file.fd < 0:
                self._close_idle(self._max_open - 1)
                self._open(file)
            file.users += 1
            return file

    def _give_back(self, file: _File) -> None:
        with self._lock:
            file.users -= 1

    def _open(self, file: _File) -> None:
        failures = 0
        while file.fd < 0:
            try:
                self._open_once(file)
            except (FileNotFoundError, NotADirectoryError):
                raise MissingShardError(
                    f"{file.path}: no such file in {self._root}; copy or download it again"
                ) from None
            except OSError as error:
                failures += 1
                if not may_retry(error, failures, self._retries):
                    raise CheckpointError(
                        f"{file.path}: cannot be opened{_after(failures)}: {error.strerror} ({file.location})"
                    ) from error

    def _open_once(self, file: _File) -> None:
        try:
            fd = self._calls.open(file.location)
        except OSError as error:
            if error.errno not in _OUT_OF_FDS or not self._close_idle(0):
                raise
            fd = self._calls.open(file.location)
        try:
            status = self._calls.stat(fd)
            if not stat.S_ISREG(status.st_mode):
                raise CheckpointError(f"{file.path}: not a regular file ({file.location}); give the file itself")
            self._identities.compare(file.path, status)
            if file.cache is None:
                # Here, because after the first read nobody can tell what was warm before.
                known = self._cold_before.get(file.path)
                before = known.windows if known is not None and known.file == FileIdentity.of(status) else None
                file.cache = CacheWindows(status.st_size, self._policy, fd, self._calls, status.st_dev, before)
        except BaseException:
            self._calls.close(fd)
            raise
        file.fd = fd

    def _close_idle(self, allowed: int) -> int:
        """Closes unused files, oldest first, until at most `allowed` are open; how many it closed."""
        opened = [file for file in self._files.values() if file.fd >= 0]
        idle = [file for file in opened if not file.users][: max(0, len(opened) - allowed)]
        for file in idle:
            self._close(file)
        return len(idle)

    def _close(self, file: _File) -> None:
        fd, file.fd = file.fd, -1
        try:
            if file.cache is not None and not self._keeps:
                file.cache.sweep(fd, self._calls)
        finally:
            self._calls.close(fd)

    def _pause_before_retry(self, file: _File, offset: int, error: OSError, failures: int) -> None:
        if not may_retry(error, failures, self._retries):
            raise CheckpointError(
                f"{file.path}: cannot be read at byte {offset:,}{_after(failures)}: {error.strerror}; check the disk "
                f"or the network mount of {file.location}"
            ) from error
        if error.errno == errno.ESTALE:
            with contextlib.suppress(OSError):  # the next read says that the handle is stale, and counts
                self._open_anew(file)

    def _open_anew(self, file: _File) -> None:
        """Go on with a fresh handle of the same file: a server that was restarted does not know the old one."""
        with self._lock:
            fresh = self._calls.open(file.location)
            try:
                self._identities.compare(file.path, self._calls.stat(fresh))
                self._calls.replace(file.fd, fresh)
            finally:
                self._calls.close(fresh)


def _after(failures: int) -> str:
    return f" after {failures} tries" if failures > 1 else ""
