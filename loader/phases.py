"""The parts of a load, one after the other, and how long each takes."""

from __future__ import annotations

import time

from .memory.report import PhaseReport


class Phases:
    """A clock with a hand for each part; from `begin` to the next `begin`, or to `end`. For one thread."""

    def __init__(self) -> None:
        self.name = ""
        self._done: list[PhaseReport] = []
        self._began: float | None = None

    def begin(self, name: str) -> None:
        """Another part begins; the one before has come to its end."""
        self.end()
        self.name, self._began = name, time.perf_counter()

    def end(self) -> None:
        """Nothing is being done any more; `name` stays that of the last part."""
        if self._began is not None:
            self._done.append(PhaseReport(self.name, time.perf_counter() - self._began))
            self._began = None

    def reports(self) -> list[PhaseReport]:
        """The parts that have come to their ends."""
        return [*self._done]
