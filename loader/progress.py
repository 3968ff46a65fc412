"""How far a load is: a function of the caller's, or a bar where somebody is looking."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

Progress = Callable[[int, int], None]
"""Called with the bytes that were read and all that will be; what it raises cancels the load. One that is a `Watcher`
too is told everything instead."""


@dataclass(frozen=True)
class Moment:
    """How far a load is: sizes in bytes, `seconds` since it began, `memory` above what there was before.

    What is not known yet, as before the plan is made, is 0; `limit_bytes` is None where the caller set none,
    `available_bytes` where nobody knows what the machine has. `phase` is one of `PhaseReport`.
    """

    phase: str
    seconds: float
    bytes_read: int = 0
    bytes_total: int = 0
    memory: int = 0
    predicted_peak_bytes: int = 0
    limit_bytes: int | None = None
    available_bytes: int | None = None

    @property
    def fraction(self) -> float:
        """Part of the bytes that was read, 0 to 1."""
        return min(1.0, self.bytes_read / self.bytes_total) if self.bytes_total > 0 else 0.0


@runtime_checkable
class Watcher(Protocol):
    """What is told of each phase when it begins, and about ten times a second while weights are read."""

    def watch(self, moment: Moment) -> None:
        """How far the load is now; what it raises cancels the load."""


def watcher_of(progress: object) -> Watcher | None:
    """`progress` where it is to be told everything."""
    return progress if isinstance(progress, Watcher) else None


@contextmanager
def showing(progress: Progress | bool | None, doing: str) -> Iterator[Progress | None]:
    """The function to call; for True it moves a bar on standard error, for None only in a terminal or a notebook."""
    if callable(progress):
        yield progress
        return
    from rich.console import Console

    console = Console(stderr=True)
    if progress is False or (progress is None and not (console.is_terminal or console.is_jupyter)):
        yield None
        return
    from rich.progress import BarColumn, DownloadColumn, TextColumn, TransferSpeedColumn
    from rich.progress import Progress as Bar

    columns = (TextColumn(doing), BarColumn(), DownloadColumn(binary_units=True), TransferSpeedColumn())
    with Bar(*columns, console=console, transient=True) as bar:
        task = bar.add_task(doing, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)
