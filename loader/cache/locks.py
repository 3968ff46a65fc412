"""Locks on files that end with the process that holds them; a link in the place of such a file is never followed."""

from __future__ import annotations

import contextlib
import errno
import os
from pathlib import Path
from typing import Self

from ..kernels import system_calls
from .ownership import check_file


class FileLock:
    """A held `flock` on a file; it goes where the file goes when that is renamed, and ends with the process."""

    def __init__(self, path: Path, fd: int) -> None:
        self.path = path
        self._fd = fd

    @classmethod
    def shared(cls, path: Path, *, wait: bool = False) -> Self | None:
        """A lock that others may share, or None where one holds it alone or the file is not there (any more)."""
        return cls._take(path, os.O_RDONLY, wait, shared=True)

    @classmethod
    def exclusive(cls, path: Path, *, create: bool = False, wait: bool = False) -> Self | None:
        """A lock that nobody shares, or None where somebody holds one or the file is not there (any more)."""
        return cls._take(path, os.O_RDWR | (os.O_CREAT if create else 0), wait, shared=False)

    @classmethod
    def _take(cls, path: Path, flags: int, wait: bool, *, shared: bool) -> Self | None:
        try:
            fd = system_calls.open_plain(path, flags, 0o600, follow=False)
        except (FileNotFoundError, NotADirectoryError):
            return None
        except OSError as error:
            if error.errno != errno.ELOOP:
                raise
            raise PermissionError(f"{path} is a link; remove it") from None
        try:
            check_file(path, os.fstat(fd))
            system_calls.lock(fd, shared=shared, wait=wait)
            if _same_file(fd, path):
                return cls(path, fd)
        except BlockingIOError:
            pass
        except BaseException:
            os.close(fd)
            raise
        os.close(fd)
        return None

    def is_on(self, path: Path) -> bool:
        """Whether it is held, and on the file that `path` leads to now."""
        return self._fd >= 0 and _same_file(self._fd, path)

    def note(self, number: int) -> None:
        """Have the file say a number."""
        os.ftruncate(self._fd, 0)
        system_calls.pwrite(self._fd, str(number).encode(), 0)

    def touch(self) -> None:
        """Make now the time of the last change of the file, where that can be written."""
        with contextlib.suppress(OSError):
            os.utime(self._fd)

    def release(self) -> None:
        """Let go of it; a second time does nothing."""
        if self._fd >= 0:
            fd, self._fd = self._fd, -1
            os.close(fd)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.release()


def _same_file(fd: int, path: Path) -> bool:
    """Whether the path still leads to the open file: it may have been renamed or removed before it was locked."""
    try:
        return os.path.samestat(os.fstat(fd), os.stat(path))
    except FileNotFoundError:
        return False
