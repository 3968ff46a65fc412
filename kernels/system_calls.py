"""Calls that one system has and another lacks, under one name: on files, locks, limits and the user.

Where the system has a call, it is that call. Elsewhere each function does the nearest thing, and says what is lost. On
macOS that is advice about the page cache, room reserved for a file, and the cores a process is kept to; on Windows
besides these positioned reads, links that are not followed, shared locks, limits, and whose a file is.
"""

from __future__ import annotations

import contextlib
import errno
import os
import sys
import threading
import time
from importlib import import_module
from types import ModuleType
from typing import Any


def _module(name: str) -> Any:
    """A module of the standard library that not every system has; None where there is none."""
    try:
        return import_module(name)
    except ModuleNotFoundError:
        return None


_fcntl: ModuleType | None = _module("fcntl")
_resource: Any = _module("resource")

O_NOFOLLOW = getattr(os, "O_NOFOLLOW", 0)
PLAIN = (
    getattr(os, "O_CLOEXEC", getattr(os, "O_NOINHERIT", 0))
    | getattr(os, "O_NONBLOCK", 0)
    | getattr(os, "O_BINARY", 0)
)  # fmt: skip
"""Flags of every open: not for child processes, without waiting for the other end of a FIFO, bytes as they are."""

WILLNEED = getattr(os, "POSIX_FADV_WILLNEED", 3)
DONTNEED = getattr(os, "POSIX_FADV_DONTNEED", 4)
NORMAL = getattr(os, "POSIX_FADV_NORMAL", 0)
RANDOM = getattr(os, "POSIX_FADV_RANDOM", 1)
SEQUENTIAL = getattr(os, "POSIX_FADV_SEQUENTIAL", 2)

SHARES_LOCKS = _fcntl is not None
"""Whether processes can hold a lock together, and files that are open be renamed and removed: not on Windows."""
_LOCKED_BYTE = 1 << 30
"""The byte that stands for a file where bytes are locked, not files: behind all that is in one that is locked."""
_POLL_SECONDS = 0.02
_positions = [threading.Lock() for _ in range(16)]


def open_plain(path: str | os.PathLike[str], flags: int, mode: int = 0o666, *, follow: bool = True) -> int:
    """A descriptor of a file. Without `follow` a link in its place is `OSError` ELOOP.

    Where the system cannot refuse links, it is looked for before; one that is put there meanwhile is followed.
    """
    if not follow and not O_NOFOLLOW and os.path.islink(path):
        raise OSError(errno.ELOOP, os.strerror(errno.ELOOP), str(path))
    return os.open(path, flags | PLAIN | (0 if follow else O_NOFOLLOW), mode)


def preadv(fd: int, buffers: list[memoryview], offset: int, flags: int = 0) -> int:
    """Read into buffers from byte `offset` on; how many bytes there were. Else into the first, one thread at a time."""
    if hasattr(os, "preadv"):
        return os.preadv(fd, buffers, offset, flags)
    data = pread(fd, len(buffers[0]), offset)
    buffers[0][: len(data)] = data
    return len(data)


def pread(fd: int, length: int, offset: int) -> bytes:
    """At most `length` bytes from byte `offset` on; the position of the file stays."""
    if hasattr(os, "pread"):
        return os.pread(fd, length, offset)
    with _at(fd, offset):
        return os.read(fd, length)


def pwrite(fd: int, data: bytes | memoryview, offset: int) -> int:
    """Write from byte `offset` on; how many bytes it were. The position of the file stays."""
    if hasattr(os, "pwrite"):
        return os.pwrite(fd, data, offset)
    with _at(fd, offset):
        return os.write(fd, data)


@contextlib.contextmanager
def _at(fd: int, offset: int) -> Any:
    """At another position of a file, which nobody else uses meanwhile."""
    with _positions[fd % len(_positions)]:
        before = os.lseek(fd, 0, os.SEEK_CUR)
        os.lseek(fd, offset, os.SEEK_SET)
        try:
            yield
        finally:
            os.lseek(fd, before, os.SEEK_SET)


def advise(fd: int, offset: int, length: int, advice: int) -> None:
    """Tell the kernel what becomes of a part of a file; where nobody can, its pages are the kernel's own business."""
    if hasattr(os, "posix_fadvise"):
        os.posix_fadvise(fd, offset, length, advice)


def bring_in(fd: int, offset: int, length: int) -> int:
    """Read a part of a file into the page cache, and nowhere else; how many bytes, 0 where the system has no such call.

    One system call that waits for the disk without Python's lock. Advice (`WILLNEED`) would be many: the kernel takes
    it for a hundred KiB or so at once.
    """
    if sys.platform != "linux":  # elsewhere sendfile writes to sockets only
        return 0
    sink = os.open(os.devnull, os.O_WRONLY | PLAIN)
    try:
        return os.sendfile(sink, fd, offset, length)
    finally:
        os.close(sink)


def reserve(fd: int, nbytes: int) -> None:
    """Make a file so long, with room on the disk; elsewhere only long, and a full disk is found when it is written."""
    if hasattr(os, "posix_fallocate"):
        os.posix_fallocate(fd, 0, nbytes)
    else:
        os.truncate(fd, nbytes)


def sync_data(fd: int) -> None:
    """Wait until what was written to a file is on the disk."""
    if hasattr(os, "fdatasync"):
        os.fdatasync(fd)
    else:
        os.fsync(fd)


def sync_folder(folder: str | os.PathLike[str]) -> None:
    """Force the names in a folder to the disk, where folders can be opened."""
    if not hasattr(os, "O_DIRECTORY"):
        return
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def lock(fd: int, *, shared: bool = False, wait: bool = False) -> None:
    """Lock an open file for as long as it is open; `BlockingIOError` where another process holds it.

    Raises other `OSError`s where files cannot be locked, or not for several processes together.
    """
    if _fcntl is not None:
        kind = _fcntl.LOCK_SH if shared else _fcntl.LOCK_EX
        _fcntl.flock(fd, kind if wait else kind | _fcntl.LOCK_NB)
        return None
    if shared:
        raise OSError(errno.ENOLCK, "this system has no locks that several processes hold together")
    while True:
        try:
            return _lock_byte(fd, "LK_NBLCK")
        except OSError as error:
            if error.errno not in (errno.EACCES, errno.EDEADLK):
                raise
            if not wait:
                raise BlockingIOError(errno.EWOULDBLOCK, "another process holds the lock") from error
        time.sleep(_POLL_SECONDS)


def unlock(fd: int) -> None:
    """Let go of a lock before the file is closed: a process forked meanwhile has it open, too."""
    if _fcntl is not None:
        _fcntl.flock(fd, _fcntl.LOCK_UN)
    else:
        _lock_byte(fd, "LK_UNLCK")


def _lock_byte(fd: int, kind: str) -> None:
    msvcrt: Any = import_module("msvcrt")
    with _at(fd, _LOCKED_BYTE):
        msvcrt.locking(fd, getattr(msvcrt, kind), 1)


def resource_limit(name: str) -> int | None:
    """What the system allows this process, by the name of the limit (`RLIMIT_AS`); None: no limit, or none is known."""
    if _resource is None:
        return None
    allowed: int = _resource.getrlimit(getattr(_resource, name))[0]
    return None if allowed == _resource.RLIM_INFINITY else allowed


def cores() -> int:
    """How many cores this process may use; where it is not kept to some, how many there are."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def user_owns(status: os.stat_result, *, or_root: bool = False) -> bool:
    """Whether a file belongs to the user this process runs as; where files do not say whose they are, yes."""
    if not hasattr(os, "geteuid"):
        return True
    return status.st_uid == os.geteuid() or (or_root and status.st_uid == 0)


def others_may_write(status: os.stat_result) -> bool:
    """Whether the mode of a file lets others than its owner write to it; where modes say nothing of that, no."""
    return hasattr(os, "geteuid") and bool(status.st_mode & 0o022)
