"""Python's cyclic garbage collector, out of the way while a load is planned."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def collector_paused() -> Iterator[None]:
    """Run a block that makes many objects and no cycles without the collector walking all of them again and again.

    It is switched on again afterwards if it was on before; a block that overlaps with another one in another thread
    may see it come back early, which costs time and nothing else.
    """
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()
