"""Checksums of the files of an entry, and a source that hands out no byte it has not checked.

A file is cut into segments of at most 64 KiB that begin anew with each tensor, and each has a CRC-32: what was read can
be checked at once, in the thread that read it, while it is in the processor's cache. Where a read begins or ends inside
a segment, the rest of that segment is read too.
"""

from __future__ import annotations

import itertools
import zlib
from array import array
from bisect import bisect_right
from collections.abc import Callable, Iterable, Mapping
from typing import Self

from ..checkpoint.source import Source, read_bytes
from ..errors import DamagedEntryError, MissingShardError

SEGMENT_BYTES = 64 << 10


class Checksums:
    """CRC-32 of the segments of one file; all are 0 at first.

    `borders` are the offsets in bytes where a segment has to begin, rising, the first 0 and the last the file's size.
    """

    def __init__(self, borders: Iterable[int]) -> None:
        self._borders = array("q", borders)
        starts = (range(low, high, SEGMENT_BYTES) for low, high in itertools.pairwise(self._borders))
        self._starts = array("q", (*itertools.chain.from_iterable(starts), self._borders[-1]))
        self._values = array("I", bytes(4 * (len(self._starts) - 1)))

    @property
    def size(self) -> int:
        """Bytes of the file."""
        return self._borders[-1]

    def note(self, offset: int, data: memoryview) -> None:
        """Take the checksums of whole segments that are written at `offset`."""
        number, done = bisect_right(self._starts, offset) - 1, 0
        while done < len(data):
            count = self._starts[number + 1] - self._starts[number]
            self._values[number] = zlib.crc32(data[done : done + count])
            number, done = number + 1, done + count

    def differs(self, offset: int, data: memoryview, read: Callable[[int, int], bytearray]) -> int | None:
        """Where the first segment begins that `data`, read at `offset`, shows not to be what was written, or None.

        `read(offset, length)` reads what `data` lacks of its first and last segment.
        """
        stop = offset + len(data)
        number = bisect_right(self._starts, offset) - 1
        while number < len(self._values) and (start := self._starts[number]) < stop:
            end = self._starts[number + 1]
            value = zlib.crc32(read(start, offset - start)) if start < offset else 0
            value = zlib.crc32(data[max(start - offset, 0) : end - offset], value)
            value = zlib.crc32(read(stop, end - stop), value) if end > stop else value
            if value != self._values[number]:
                return start
            number += 1
        return None

    def to_bytes(self) -> bytes:
        """The number of borders, the borders and the checksums, in this machine's byte order."""
        return b"".join(part.tobytes() for part in (array("q", [len(self._borders)]), self._borders, self._values))

    @classmethod
    def from_bytes(cls, data: bytes) -> Self:
        """What `to_bytes` gave."""
        end = 8 * (1 + array("q", data[:8])[0])
        checksums = cls(array("q", data[8:end]))
        checksums._values = array("I", data[end:])
        return checksums


class VerifiedSource(Source):
    """The files of an entry through another source; raises `DamagedEntryError` for a read that differs."""

    def __init__(self, files: Source, checksums: Mapping[str, Checksums]) -> None:
        self._files = files
        self._checksums = checksums
        self.read_bytes = files.read_bytes

    def size(self, path: str) -> int:
        """Size of the file in bytes; raises `DamagedEntryError` where it is not what was written."""
        size = self._files.size(path)
        expected = self._checksums_of(path).size
        if size != expected:
            raise DamagedEntryError(f"{path} has {size:,} bytes, {expected:,} were written")
        return size

    def read_into(self, path: str, offset: int, buffer: memoryview) -> int:
        """Fills `buffer` from byte `offset` on and returns its length, once it is known to be what was written."""
        count = self._files.read_into(path, offset, buffer)
        checksums = self._checksums_of(path)
        with buffer.cast("B") as data:
            at = checksums.differs(offset, data, lambda start, length: read_bytes(self._files, path, start, length))
        if at is not None:
            raise DamagedEntryError(f"{path}: what was read from byte {at:,} on is not what was written")
        return count

    def prefetch(self, path: str, offset: int, length: int) -> None:
        """Says that a byte range will be read soon."""
        self._files.prefetch(path, offset, length)

    def release(self, path: str, offset: int, length: int) -> None:
        """Says that a byte range will not be read again."""
        self._files.release(path, offset, length)

    def close(self) -> None:
        """Gives back what is open; a later read opens it again."""
        self._files.close()

    def _checksums_of(self, path: str) -> Checksums:
        known = self._checksums.get(path)
        if known is None:
            raise MissingShardError(f"{path}: no such file was written")
        return known
