"""A client whose files are in memory, and which fails where it is told to."""

from __future__ import annotations

import random
import threading
from collections.abc import Callable, Iterator

from quantload.checkpoint.remote.client import Answer, ChangedError, MissingError, RemoteError, Tag


class MemoryClient:
    """Files by name, in chunks of random sizes. `trouble(name, start, stop)` gives an error and the bytes before it."""

    shown = "test://files"
    login = "log in"
    client_bytes = 0

    def __init__(self, files: dict[str, bytes], seed: int = 0) -> None:
        self.files = files
        self.trouble: Callable[[str, int, int], tuple[int, RemoteError] | None] = lambda name, start, stop: None
        self.asked: list[tuple[str, int, int]] = []
        self.in_flight = self.most_in_flight = 0
        self._random = random.Random(seed)
        self._lock = threading.Lock()

    def get(self, name: str, start: int, stop: int, tag: Tag | None) -> Answer:
        if name not in self.files:
            raise MissingError
        content = self.files[name]
        now = Tag(len(content), str(hash(content)))
        if tag not in (None, now):
            raise ChangedError("another version")
        with self._lock:
            self.asked.append((name, start, stop))
            trouble = self.trouble(name, start, stop)
        return Answer(now, self._chunks(content[start:stop], trouble))

    def names(self) -> list[str] | None:
        return list(self.files)

    def _chunks(self, content: bytes, trouble: tuple[int, RemoteError] | None) -> Iterator[bytes]:
        with self._lock:
            self.in_flight += 1
            self.most_in_flight = max(self.most_in_flight, self.in_flight)
        try:
            limit = len(content) if trouble is None else min(trouble[0], len(content))
            at = 0
            while at < limit:
                step = min(self._random.randint(1, 5000), limit - at)
                yield content[at : at + step]
                at += step
            if trouble is not None:
                raise trouble[1]
        finally:
            with self._lock:
                self.in_flight -= 1
