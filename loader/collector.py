"""Python's cyclic garbage collector, out of the way while libraries are imported and a load is planned."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def collector_paused() -> Iterator[None]:
    """Run a block that makes many objects and no cycles without the collector walking all of them again and again.

    It is switched on again afterwards if it was on before; a block that overlaps with another one in another thread
    may see it come back early, which costs time and nothing else. What the block made counts as old from then on:
    freezing and thawing moves it there, where the collector's next round would look at all of it once more.
    """
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if gc.get_freeze_count() == 0:  # else thawing would undo what somebody else froze
            gc.freeze()
            gc.unfreeze()
        if was_enabled:
            gc.enable()
