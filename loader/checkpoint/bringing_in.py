"""Weights that are brought into the page cache while something else goes on, such as the import of torch."""

from __future__ import annotations

import os
import stat
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

from ..errors import QuantloadError
from ..kernels.system_calls import bring_in, open_plain
from ..shortage import start
from .files import FolderFiles
from .folder import Checkpoint, shard_names
from .identity import FileIdentity
from .pagecache import CacheWindows
from .paths import locate
from .source import ColdBefore, FileCalls

AT_ONCE = 32 << 20
"""Bytes of one system call: few, as each waits for Python's lock after it; a disk is done with as many in 20 ms."""
MOST_FILES = 64


class _Part(NamedTuple):
    """A part of a file that is not in the page cache, in bytes."""

    file: int
    offset: int
    length: int


@contextmanager
def bringing_in(checkpoint: Checkpoint, most_bytes: int) -> Iterator[None]:
    """Inside, another thread has the kernel read weights of a checkpoint here that are not in the page cache.

    They are read from the first file on, at most `most_bytes`, and no further than it gets until the end. What was in
    the page cache before is remembered for the sources of the checkpoint. Nothing is raised for what cannot be read:
    the load that follows reads the same, and says so.
    """
    files = checkpoint.files
    if not isinstance(files, FolderFiles):
        yield
        return
    opened: list[int] = []
    try:
        parts = _cold_parts(checkpoint, files, most_bytes, opened)
        if not parts:
            yield
            return
        ended = threading.Event()
        thread = threading.Thread(target=_bring_in, args=(parts, ended), name="quantload-bring-in", daemon=True)
        start(thread, "the thread that has weights read while libraries are imported")
        try:
            yield
        finally:
            ended.set()
            thread.join()
    finally:
        for fd in opened:
            os.close(fd)


def _cold_parts(checkpoint: Checkpoint, files: FolderFiles, most_bytes: int, opened: list[int]) -> list[_Part]:
    """What is to be read, in the order of the files, each in `opened` from now on."""
    parts: list[_Part] = []
    try:
        for name in shard_names(checkpoint.root)[:MOST_FILES]:
            fd = open_plain(locate(checkpoint.root, name), os.O_RDONLY)
            opened.append(fd)
            status = os.fstat(fd)
            if not stat.S_ISREG(status.st_mode):
                break
            windows = CacheWindows(status.st_size, "auto", fd, FileCalls(), status.st_dev)
            files.cold_before[name] = ColdBefore(FileIdentity.of(status), windows.cold)
            for offset, length in windows.cold_ranges(0, status.st_size):
                if most_bytes <= 0:
                    return parts
                parts.append(_Part(fd, offset, min(length, most_bytes)))
                most_bytes -= length
    except (OSError, QuantloadError):  # the load says what is wrong with it
        pass
    return parts


def _bring_in(parts: list[_Part], ended: threading.Event) -> None:
    for part in parts:
        offset, stop = part.offset, part.offset + part.length
        while offset < stop and not ended.is_set():
            try:
                count = bring_in(part.file, offset, min(AT_ONCE, stop - offset))
            except OSError:  # the load reads it again, and says so
                return
            if count == 0:
                return
            offset += count
