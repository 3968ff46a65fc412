"""How far the load of a server is, for everybody who asks."""

from __future__ import annotations

import time
from dataclasses import asdict, replace
from typing import Any

from ..progress import Moment

TOKENIZER, WEIGHTS, WARM_UP = "reading the tokenizer", "loading the weights", "warming up"


class LoadProgress:
    """What the thread that loads notes and other threads read: each attribute is replaced whole.

    Calling it notes bytes read and bytes in all. `phase` is one of the three above.
    """

    def __init__(self) -> None:
        self._began = time.monotonic()
        self.phase = ""
        self._moment = Moment("", 0.0)
        self._phases: tuple[tuple[str, float], ...] = ()
        """Names, and when they began, in seconds of the process's clock."""
        self.begin(TOKENIZER)

    def __call__(self, bytes_done: int, bytes_total: int) -> None:
        self._moment = replace(self._moment, bytes_read=bytes_done, bytes_total=bytes_total)

    def watch(self, moment: Moment) -> None:
        """Note everything about the load of the weights."""
        if moment.phase != self._moment.phase:
            self._phases = (*self._phases, (f"{WEIGHTS}: {moment.phase}", time.monotonic()))
        self._moment = moment

    def begin(self, phase: str) -> None:
        """Note that another part of starting has begun; an empty one when there is no more."""
        self.phase = phase
        self._phases = (*self._phases, (phase, time.monotonic()))

    @property
    def bytes_done(self) -> int:
        """Bytes of the checkpoint that were read."""
        return self._moment.bytes_read

    @property
    def bytes_total(self) -> int:
        """Bytes of the checkpoint that are to be read; 0 while that is not known."""
        return self._moment.bytes_total

    @property
    def seconds(self) -> float:
        """Seconds since it began."""
        return time.monotonic() - self._began

    def fraction(self) -> float:
        """Part of the checkpoint that was read, 0 to 1."""
        return self._moment.fraction

    def phases(self) -> list[dict[str, Any]]:
        """Each phase until now and its seconds; the last one is under way until starting has ended."""
        begun = self._phases
        ends = [*(began for _, began in begun[1:]), time.monotonic()]
        pairs = [(name, end - began) for (name, began), end in zip(begun, ends, strict=True) if name]
        return [{"name": name, "seconds": round(seconds, 3)} for name, seconds in pairs]

    def now(self) -> dict[str, Any]:
        """Everything, as JSON: a `Moment` with the phase that people read, and the speed since reading began."""
        moment = self._moment
        reading = moment.phase or self.phase
        began = next((began for name, began in self._phases if name.endswith(": stream")), self._began)
        passed = time.monotonic() - began
        phase = self.phase if self.phase != WEIGHTS else f"{WEIGHTS}: {reading}"
        speed = moment.bytes_read / passed if passed > 0 else 0.0
        return {**asdict(moment), "phase": phase, "seconds": round(self.seconds, 3), "bytes_per_second": round(speed)}
