"""How far a load is: a function of the caller's, or a bar where somebody is looking."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import TracebackType
from typing import TYPE_CHECKING, Protocol, Self, runtime_checkable

if TYPE_CHECKING:
    from rich.console import Console

GIB, MIB = 1 << 30, 1 << 20

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
    with ProgressBar(console, doing) as bar:
        yield bar


class ProgressBar:
    """A line that moves, on `console`, gone when the block ends: phase, bytes, speed, memory, time left.

    It is a `Progress` and a `Watcher`, and fits into 80 columns.
    """

    shown = True

    def __init__(self, console: Console, doing: str) -> None:
        from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

        self._doing = doing
        self._bar = Progress(
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=None),
            TaskProgressColumn(),
            TextColumn("{task.fields[said]}", markup=False),
            TimeRemainingColumn(compact=True),
            console=console,
            transient=True,
        )
        self._task = self._bar.add_task(doing, total=None, said="")
        self._began: float | None = None

    def __enter__(self) -> Self:
        self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.stop()

    def __call__(self, done: int, total: int) -> None:
        """So many bytes are read, which is all that is known."""
        self._bar.update(self._task, completed=done, total=total, said=_of(done, total))

    def watch(self, moment: Moment) -> None:
        """Everything there is to know."""
        phase = self._doing if moment.phase == "stream" else f"{self._doing}: {moment.phase}"
        total = moment.bytes_total or None
        self._bar.update(
            self._task, description=phase, completed=moment.bytes_read, total=total, said=self._said(moment)
        )

    def _said(self, moment: Moment) -> str:
        if not moment.bytes_total:
            return ""
        if self._began is None:
            self._began = moment.seconds
        passed = moment.seconds - self._began
        speed = f" {_short(moment.bytes_read / passed)}/s" if passed > 0.2 else ""
        allowed = moment.limit_bytes or moment.predicted_peak_bytes
        memory = f" mem {_of(max(0, moment.memory), allowed)}" if allowed else ""
        return f"{_of(moment.bytes_read, moment.bytes_total)}{speed}{memory}"


def _of(part: int, whole: int) -> str:
    """Two sizes in the unit of the second, such as `3.2/56.9 GiB`."""
    unit, name = (GIB, "GiB") if whole >= GIB else (MIB, "MiB")
    return f"{part / unit:.1f}/{whole / unit:.1f} {name}"


def _short(nbytes: float) -> str:
    return f"{nbytes / GIB:.1f} GiB" if nbytes >= GIB else f"{nbytes / MIB:.0f} MiB"
