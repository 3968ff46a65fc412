"""The `Source` of a remote checkpoint: what a run reads is fetched ahead of it, all else when it is asked for."""

from __future__ import annotations

import threading
from array import array
from collections.abc import Callable, Iterable, Sequence

from ...errors import MissingShardError
from ..source import Reads, Source, Turn
from .blocks import Blocks, schedule
from .requests import Requests, nothing_stops
from .side_by_side import side_by_side
from .window import Sizes, Window

HEAD_BYTES = 64 << 10
"""Of a file that is looked into for the first time: its size is known then, and most headers are in there."""
_LONGEST_HEAD = 100_000_008


class RemoteSource(Source):
    """Files of a remote folder. `sizes` says, for so many bytes, how much is asked for at once and held."""

    read_bytes = 2 << 20

    def __init__(self, requests: Requests, sizes: Callable[[int], Sizes]) -> None:
        self._requests, self._sizes = requests, sizes
        self._heads: dict[str, bytes] = {}
        self._lock = threading.Lock()
        self._window: Window | None = None
        self._peak_bytes = 0
        self._blocks: Blocks
        self._of_batch: Callable[[int], array[int]]

    @property
    def staging_peak_bytes(self) -> int:
        """The most bytes of blocks that were held at once, until now."""
        return max(self._peak_bytes, 0 if self._window is None else self._window.peak_bytes)

    def size(self, path: str) -> int:
        """Size of the file in bytes; raises `MissingShardError` when there is none."""
        tag = self._requests.known.get(path)
        if tag is None:
            self.look_ahead([path])
            tag = self._requests.known.get(path)
            if tag is None:
                raise MissingShardError(f"{path}: no such file at {self._requests.client.shown}")
        return tag.size

    def read_into(self, path: str, offset: int, buffer: memoryview) -> int:
        """Fills `buffer` from byte `offset` on and returns its length."""
        head = self._heads.get(path, b"")
        if offset + len(buffer) <= len(head):
            buffer[:] = head[offset : offset + len(buffer)]
            return len(buffer)
        side_by_side(lambda at, stopping: self._requests.fill(path, at, buffer, stopping), [offset], 1)
        return len(buffer)

    def look_ahead(self, paths: Sequence[str]) -> None:
        """Fetches the beginnings of files, as far as the header of a safetensors file goes."""
        absent = [path for path in paths if path not in self._heads]
        side_by_side(self._fetch_head, absent, self._sizes(1 << 40).connections)

    def prefetch(self, path: str, offset: int, length: int) -> None:
        """Nothing: what a run reads is known before it begins."""

    def release(self, path: str, offset: int, length: int) -> None:
        """Nothing: what a run reads is known before it begins."""

    def expect(self, batches: Iterable[Reads], stopping: Callable[[], bool]) -> None:
        """Begins to fetch what a run will read, in requests of many reads at once."""
        self.close()
        batches = list(batches)
        sizes = self._sizes(read_bytes(batches))
        blocks = Blocks(batches, sizes.request_bytes)
        plan = schedule(blocks, held_for_later(sizes))
        blocks.forget_batches()
        self._blocks, self._of_batch = blocks, plan.of_batch
        self._window = Window(self._requests, blocks, plan, sizes, stopping)
        self._window.start()

    def turn(self, number: int) -> Turn:
        """To read batch `number` of those that are expected."""
        assert self._window is not None
        return _RemoteTurn(self._window, self._blocks, self._of_batch(number))

    def close(self) -> None:
        """Stops what is fetched ahead, and forgets what was."""
        self._heads.clear()
        if self._window is not None:
            self._peak_bytes = self.staging_peak_bytes
            self._window.close()
            self._window = None

    def _fetch_head(self, path: str, stopping: Callable[[], bool]) -> None:
        try:
            head = self._requests.beginning(path, HEAD_BYTES, stopping)
        except MissingShardError:
            return
        size = self._requests.size(path, nothing_stops)
        whole = 8 + int.from_bytes(head[:8], "little")
        if len(head) < whole <= min(size, _LONGEST_HEAD) and path.endswith(".safetensors"):
            rest = bytearray(whole)
            rest[: len(head)] = head
            with memoryview(rest) as view:
                self._requests.fill(path, len(head), view[len(head) :], stopping)
            head = bytes(rest)
        self._heads[path] = head


def read_bytes(batches: Iterable[Reads]) -> int:
    """Bytes that the batches of a run read; what is read twice counts twice."""
    return sum(length for _, extents in batches for _, length in extents)


def held_for_later(sizes: Sizes) -> int:
    """Blocks that may be held between their uses: half of the buffers, the others are for what comes next."""
    return max(sizes.buffers // 2, 1)


class _RemoteTurn(Turn):
    """A batch, read out of the window in the order of its stays."""

    __slots__ = ("_blocks", "_next", "_stays", "_window")

    def __init__(self, window: Window, blocks: Blocks, stays: array[int]) -> None:
        super().__init__(self._read)
        self._window, self._blocks, self._stays, self._next = window, blocks, stays, 0

    def _read(self, path: str, offset: int, buffer: memoryview) -> int:
        done, total = 0, len(buffer)
        while done < total:
            stay = self._stays[self._next]
            block = self._window.block_of(stay)
            start, stop = self._blocks.starts[block], self._blocks.stops[block]
            at = offset + done
            if not start <= at < stop:
                self._over()
                continue
            count = min(total - done, stop - at)
            memory = self._window.wait(stay)
            buffer[done : done + count] = memory[at - start : at - start + count]
            done += count
            if done < total:
                self._over()
        return total

    def done(self) -> None:
        """The batch is read."""
        while self._next < len(self._stays):
            self._over()

    def _over(self) -> None:
        stay = self._stays[self._next]
        self._window.wait(stay)
        self._window.used(stay)
        self._next += 1
