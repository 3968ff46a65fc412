"""Several questions to a server at once, from threads that an interrupt need not wait for."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import TypeVar

from ...shortage import starting
from ..crew import Stopped

_TICK = 0.05
_T = TypeVar("_T")
_R = TypeVar("_R")


def side_by_side(
    work: Callable[[_T, Callable[[], bool]], _R],
    items: Sequence[_T],
    most: int,
    stopping: Callable[[], bool] = lambda: False,
) -> list[_R]:
    """What `work(item, stopping)` returns for each item, in order, from up to `most` threads.

    A library that waits for a server cannot be interrupted, so that it is done in threads that end with what they wait
    for: this one leaves at once, with the first error, `Stopped` once `stopping()` is true, or a `KeyboardInterrupt`.
    """
    results: dict[int, _R] = {}
    errors: list[BaseException] = []
    left = threading.Event()
    done = threading.Semaphore(0)
    numbers = iter(range(len(items)))

    def run() -> None:
        try:
            for number in numbers:
                if left.is_set():
                    return
                results[number] = work(items[number], lambda: left.is_set() or stopping())
        except BaseException as error:
            errors.append(error)
        finally:
            done.release()

    count = min(most, len(items))
    threads = [threading.Thread(target=run, name=f"quantload-asker-{number}", daemon=True) for number in range(count)]
    try:
        with starting(f"{count} threads that ask a server"):
            for thread in threads:
                thread.start()
        finished = 0
        while finished < count and not errors:
            finished += done.acquire(timeout=_TICK)
            if stopping():
                raise Stopped
    finally:
        left.set()
    if errors:
        try:
            raise errors[0]
        finally:
            errors.clear()  # a traceback refers to this frame: no circle
    for thread in threads:
        thread.join()
    return [results[number] for number in range(len(items))]
