"""Ctrl-C: kept from leaving global state of torch half changed, and never hidden behind what it made of a clean-up."""

from __future__ import annotations

import contextlib
import signal
import sys
import threading
from collections.abc import Iterator
from types import FrameType

_noted: list[list[int]] = []
"""Of each `interrupt_kept` that the main thread is in."""


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


@contextlib.contextmanager
def interrupt_kept() -> Iterator[None]:
    """`interrupt_first`, and one that Python prints and forgets is raised in the end, or by `raise_forgotten`.

    It does so where an interrupt falls into a destructor, a callback of a weak reference or of the garbage collector.
    """
    with interrupt_first(), _noting() as noted:
        try:
            yield
        except Exception as error:
            if noted:
                raise KeyboardInterrupt from error
            raise
        if noted:
            raise KeyboardInterrupt


def raise_forgotten() -> None:
    """Raise the `KeyboardInterrupt` that Python forgot within `interrupt_kept`: for who waits there."""
    if _noted and _noted[-1] and threading.current_thread() is threading.main_thread():
        raise KeyboardInterrupt


@contextlib.contextmanager
def _noting() -> Iterator[list[int]]:
    """The interrupts that the handler of SIGINT makes an exception of, in this thread."""
    before, noted = signal.getsignal(signal.SIGINT), list[int]()
    if threading.current_thread() is not threading.main_thread() or not callable(before):
        yield noted
        return

    def note(number: int, frame: FrameType | None) -> None:
        try:
            before(number, frame)
        except KeyboardInterrupt:
            noted.append(number)
            raise

    signal.signal(signal.SIGINT, note)
    _noted.append(noted)
    try:
        yield noted
    finally:
        _noted.pop()
        signal.signal(signal.SIGINT, before)


def _was_interrupted(error: BaseException, already: BaseException | None) -> bool:
    """Whether an error, which is not `already` being handled, was raised while a `KeyboardInterrupt` was."""
    seen: BaseException | None = error
    while seen is not None and seen is not already:
        if isinstance(seen, KeyboardInterrupt):
            return True
        seen = seen.__context__
    return False
