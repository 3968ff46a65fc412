"""What lies side by side in a file and is read at once."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Iterator
from typing import Generic, NamedTuple, TypeVar

T = TypeVar("T")
F = TypeVar("F", bound=Hashable)


class Extent(NamedTuple, Generic[F]):
    """Bytes `start` to `stop` of a file; `file` may say more that neighbours must have in common, such as a dtype."""

    file: F
    start: int
    stop: int

    @property
    def nbytes(self) -> int:
        """How many."""
        return self.stop - self.start


def neighbours(
    items: Iterable[T], extent_of: Callable[[T], Extent[F]], limit: int, hole: int = 0, *, overlap: bool = False
) -> Iterator[list[T]]:
    """Items in order, those in one list that together are one read of at most `limit` bytes.

    Between two of them may be at most `hole` bytes that nobody needs. With `overlap` they may share bytes, and those
    that do stay together whatever the limit.
    """
    group: list[T] = []
    file: F | None = None
    start = stop = 0
    for item in items:
        own_file, own_start, own_stop = extent_of(item)
        gap = own_start - stop
        if group and own_file == file and own_start >= start and gap <= hole:
            shared = gap < 0
            if overlap if shared else own_stop - start <= limit:
                group.append(item)
                stop = max(stop, own_stop)
                continue
        if group:
            yield group
        group, file, start, stop = [item], own_file, own_start, own_stop
    if group:
        yield group
