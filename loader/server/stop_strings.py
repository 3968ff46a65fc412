"""Ending a text before the first of some strings, also when the text arrives in fragments."""

from __future__ import annotations

from collections.abc import Sequence


class StopMatcher:
    """Passes on fragments of a text up to, and without, the first occurrence of any of `stops`.

    Text that may be the beginning of a stop string is held back until it is known.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        self.stops = tuple(stops)
        self.stopped = False
        self._held = ""

    def feed(self, text: str) -> str:
        """What may be passed on now that `text` arrived; nothing after a stop string was found."""
        if self.stopped:
            return ""
        self._held += text
        end = first_stop(self._held, self.stops)
        if end is None:
            safe = len(self._held) - self._overlap()
        else:
            self.stopped, safe = True, end
        ready, self._held = self._held[:safe], self._held[safe:]
        return ready

    def flush(self) -> str:
        """What was held back, once no more text will arrive."""
        rest = "" if self.stopped else self._held
        self._held = ""
        return rest

    def _overlap(self) -> int:
        """Length of the longest end of the held text that a stop string begins with."""
        longest = max(map(len, self.stops), default=1) - 1
        for size in range(min(longest, len(self._held)), 0, -1):
            if any(stop.startswith(self._held[-size:]) for stop in self.stops):
                return size
        return 0


def first_stop(text: str, stops: Sequence[str]) -> int | None:
    """Index of the earliest occurrence of any of `stops` in `text`, or None."""
    found = [index for index in (text.find(stop) for stop in stops) if index >= 0]
    return min(found, default=None)
