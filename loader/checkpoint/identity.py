"""Whether the files of a checkpoint are still what they were when they were first looked at.

Headers, configs and weights are read at different times, and nothing but the file system can say that they belong
together: the device, inode, size and times of change of each file are remembered with its first opening, compared at
every later one, and compared once more when everything is read, before anything that was made of it is given out.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple, Self

from ..errors import ChangedFileError, CheckpointError
from ..kernels.system_calls import open_plain
from .retry import may_retry


class FileIdentity(NamedTuple):
    """What tells a file from any other, and from itself before it was written to.

    Programs set `mtime_ns` back, as `rsync --inplace --times` does; nobody can set `ctime_ns`.
    """

    device: int
    inode: int
    size: int
    mtime_ns: int
    ctime_ns: int

    @classmethod
    def of(cls, status: os.stat_result) -> Self:
        """The identity that `os.stat` or `os.fstat` describes."""
        return cls(status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns)


class FileIdentities:
    """The files below `root` by name, as they were when they were first looked at; callable from several threads."""

    def __init__(self, root: Path) -> None:
        self._root = root
        self._known: dict[str, FileIdentity | None] = {}

    def __getitem__(self, name: str) -> FileIdentity:
        """Of a file that was there when it was looked at; raises `KeyError` for any other."""
        identity = self._known[name]
        if identity is None:
            raise KeyError(name)
        return identity

    def compare(self, name: str, status: os.stat_result) -> None:
        """Remember a file that was just opened, or raise `ChangedFileError` where it is not the one it was before."""
        self._compare(name, FileIdentity.of(status))

    def note(self, names: Iterable[str]) -> None:
        """Remember files that somebody else will read, and those that are missing as missing."""
        for name in names:
            self._compare(name, self._now(name))

    def check_unchanged(self) -> None:
        """Raise `ChangedFileError` unless all files are what they were when they were first looked at."""
        self.note(tuple(self._known))

    def _compare(self, name: str, found: FileIdentity | None) -> None:
        known = self._known.setdefault(name, found)
        if known != found:
            raise ChangedFileError(
                f"{name}: changed while it was read ({_difference(known, found)}); nothing of it is used: let whatever "
                f"writes to {self._root} finish, and run it again"
            )

    def _now(self, name: str) -> FileIdentity | None:
        failures = 0
        while True:
            try:
                return _identity_of(self._root / name)
            except (FileNotFoundError, NotADirectoryError):
                return None
            except OSError as error:
                failures += 1
                if not may_retry(error, failures):
                    raise CheckpointError(
                        f"{name}: cannot be opened to see whether it changed: {error.strerror}; check {self._root}"
                    ) from error


def _identity_of(path: Path) -> FileIdentity:
    status = os.stat(path)
    if not stat.S_ISREG(status.st_mode):  # which is for whoever reads it to refuse
        return FileIdentity.of(status)
    # Opened, because a network file system asks its server then, and may answer `stat` from memory.
    fd = open_plain(path, os.O_RDONLY)
    try:
        return FileIdentity.of(os.fstat(fd))
    finally:
        os.close(fd)


def _difference(known: FileIdentity | None, found: FileIdentity | None) -> str:
    if known is None:
        return "it was not there before"
    if found is None:
        return "it is no longer there"
    if known[:2] != found[:2]:
        return "another file is in its place"
    if known.size != found.size:
        return f"{known.size:,} bytes before, {found.size:,} now"
    return "it was written to, or its owner or links were changed"
