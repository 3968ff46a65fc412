"""Times functions of a running program by name, without changing it."""

from __future__ import annotations

import functools
import threading
import time
from types import TracebackType
from typing import Any, Self


class Stopwatch:
    """In a `with` block, adds up the seconds spent in functions given as (module or class, name).

    `seconds` has them by name. The functions are looked up when the block begins: `AttributeError` for one that is not
    there any more. Not meant for functions that run in several threads at once, whose seconds would be added up.
    """

    def __init__(self, *places: tuple[Any, str]) -> None:
        self._places = places
        self._originals: list[tuple[Any, str, Any]] = []
        self._lock = threading.Lock()
        self.seconds = {name: 0.0 for _, name in places}

    def __enter__(self) -> Self:
        for owner, name in self._places:
            original = getattr(owner, name)
            self._originals.append((owner, name, original))
            setattr(owner, name, self._timed(name, original))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        while self._originals:
            owner, name, original = self._originals.pop()
            setattr(owner, name, original)

    def _timed(self, name: str, original: Any) -> Any:
        @functools.wraps(original)
        def run(*args: Any, **kwargs: Any) -> Any:
            start = time.perf_counter()
            try:
                return original(*args, **kwargs)
            finally:
                with self._lock:
                    self.seconds[name] += time.perf_counter() - start

        return run
