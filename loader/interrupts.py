"""Ctrl-C: kept from leaving global state of torch half changed, and never hidden behind what it made of a clean-up."""

from __future__ import annotations

import contextlib
import signal
import sys
import threading
from collections.abc import Iterator
from types import FrameType


@contextlib.contextmanager
def interrupt_held() -> Iterator[None]:
    """Hold a first SIGINT back until the end: for what changes torch's modes and default dtype, in a few seconds.

    Torch and transformers undo such changes in Python, where an interrupt falls between two lines; the process would
    go on with the wrong default dtype or mode. A second SIGINT is not held back. Other threads get none.
    """
    before = signal.getsignal(signal.SIGINT)
    if threading.current_thread() is not threading.main_thread() or not callable(before):
        yield
        return
    held: list[FrameType | None] = []

    def hold(number: int, frame: FrameType | None) -> None:
        if held:
            before(number, frame)
        held.append(frame)

    signal.signal(signal.SIGINT, hold)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
        if held:
            before(signal.SIGINT, held[0])


@contextlib.contextmanager
def interrupt_first() -> Iterator[None]:
    """A `KeyboardInterrupt` leaves as such, also where what it interrupted raised something else on the way out."""
    already = sys.exc_info()[1]
    try:
        yield
    except Exception as error:
        if _was_interrupted(error, already):
            raise KeyboardInterrupt from error
        raise


def _was_interrupted(error: BaseException, already: BaseException | None) -> bool:
    """Whether an error, which is not `already` being handled, was raised while a `KeyboardInterrupt` was."""
    seen: BaseException | None = error
    while seen is not None and seen is not already:
        if isinstance(seen, KeyboardInterrupt):
            return True
        seen = seen.__context__
    return False
