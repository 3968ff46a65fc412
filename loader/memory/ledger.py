"""What a load was measured to take, while it runs."""

from __future__ import annotations

import threading
import time
from types import TracebackType
from typing import Self

from .probes import MemoryProbe
from .report import TimelinePoint

TIMELINE_POINTS = 200
_FIRST_BUCKET_SECONDS = 0.001


class Ledger:
    """Measures the memory a load takes with a probe. Thread-safe.

    `baseline` (bytes) is the memory before the load; without it the probe is read now. On a GPU it is subtracted as on
    a CPU, so that a model that was there before does not count. Between `start` and `stop`, or in a `with` block, the
    probe follows the peak.
    """

    def __init__(self, probe: MemoryProbe, baseline: int | None = None) -> None:
        self.probe = probe
        self._lock = threading.Lock()
        self._timeline = _Timeline()
        self._bytes_read = 0
        self._started = time.perf_counter()
        self._peak: int | None = None
        self._increase: int | None = None
        self._seconds: float | None = None
        self.probe.reset_peak()
        self.baseline_bytes = self.probe.current() if baseline is None else baseline

    def start(self) -> None:
        """Begin the measurement: clock, first timeline point, peak."""
        self._started = time.perf_counter()
        self.probe.reset_peak()
        self.probe.start()
        self.record(0)

    def stop(self) -> None:
        """End the measurement: the last timeline point, then peak and increase stay as they are."""
        if self._peak is None:
            self.record(self._bytes_read)
            self._seconds = self.seconds
            self._increase = self.probe.sample() - self.baseline_bytes
            self._peak = self._measured_peak()
            self.probe.stop()

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def record(self, bytes_read: int) -> None:
        """Add a timeline point: `bytes_read` so far in the load, the memory measured now."""
        memory = self.probe.sample() - self.baseline_bytes
        with self._lock:
            # Taken inside the lock, so that points are in the order of time whichever thread brings them.
            self._bytes_read = max(self._bytes_read, bytes_read)
            self._timeline.add(TimelinePoint(self.seconds, self._bytes_read, memory))

    @property
    def bytes_read(self) -> int:
        """Bytes that were read so far."""
        return self._bytes_read

    @property
    def seconds(self) -> float:
        """Seconds from `start` until now or until `stop`."""
        return time.perf_counter() - self._started if self._seconds is None else self._seconds

    @property
    def peak_bytes(self) -> int:
        """Highest measured memory above the baseline (bytes), until now or until `stop`; never negative."""
        return self._measured_peak() if self._peak is None else self._peak

    @property
    def increase_bytes(self) -> int:
        """Measured memory above the baseline (bytes), now or at `stop`; negative where the load freed more."""
        return self.probe.sample() - self.baseline_bytes if self._increase is None else self._increase

    @property
    def timeline(self) -> list[TimelinePoint]:
        """At most 200 points in order of time: the first, the last, and the highest of each stretch between."""
        with self._lock:
            return self._timeline.points()

    def _measured_peak(self) -> int:
        return max(0, self.probe.peak() - self.baseline_bytes)


class _Timeline:
    """Keeps the highest point of each stretch of time, and doubles the stretch when there are too many."""

    def __init__(self, limit: int = TIMELINE_POINTS) -> None:
        self._limit = limit - 2  # room for the first and the last point
        self._bucket = _FIRST_BUCKET_SECONDS
        self._first: TimelinePoint | None = None
        self._last: TimelinePoint | None = None
        self._highest: dict[int, TimelinePoint] = {}

    def add(self, point: TimelinePoint) -> None:
        if self._first is None:
            self._first = point
        self._last = point
        self._keep(point)
        while len(self._highest) > self._limit:
            self._bucket *= 2
            points, self._highest = self._highest, {}
            for kept in points.values():
                self._keep(kept)

    def _keep(self, point: TimelinePoint) -> None:
        bucket = int(point.seconds / self._bucket)
        held = self._highest.get(bucket)
        if held is None or point.memory >= held.memory:
            self._highest[bucket] = point

    def points(self) -> list[TimelinePoint]:
        if self._first is None or self._last is None:
            return []
        # Points are compared by identity: two may be equal in all their numbers.
        between = [p for p in self._highest.values() if p is not self._first and p is not self._last]
        ends = [self._first] if self._last is self._first else [self._first, self._last]
        return [ends[0], *between, *ends[1:]]
