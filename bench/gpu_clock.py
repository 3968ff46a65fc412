"""Times work on a GPU by events, several sides in turns.

A call of a few microseconds is over before the next one is launched, so launches would be timed instead of kernels.
Therefore two times are taken of each side: "device", where the device is held busy until all calls of a turn are
queued, and "issued", where Python launches one call after the other as a model does without graphs.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch

MOST_LAUNCHES = 400
"""That a turn queues: well under what the driver's queue takes before it blocks (1024)."""
TRIES = 3
LEAST_HOLD, MOST_HOLD = 1e-3, 0.3
"""Seconds."""
WARM_UP_SECONDS = 0.5


class Queue(Protocol):
    """A device's queue of work, and marks in it."""

    def mark(self) -> Any:
        """A mark behind everything queued so far."""

    def hold(self, seconds: float) -> None:
        """Queue something that does nothing for about so long."""

    def passed(self, mark: Any) -> bool:
        """Whether the device has come to a mark."""

    def seconds(self, start: Any, end: Any) -> float:
        """Between two passed marks."""

    def synchronize(self) -> None:
        """Wait for everything queued."""


class CudaQueue:
    """The current stream of a CUDA or ROCm device, its clocks raised by half a second of work."""

    def __init__(self, device: torch.device) -> None:
        torch.cuda.set_device(device)
        raise_clocks(device)
        self._cycles_per_second = 1e9
        self.hold(LEAST_HOLD)
        start = self.mark()
        self.hold(0.02)
        end = self.mark()
        self.synchronize()
        self._cycles_per_second *= 0.02 / self.seconds(start, end)

    def mark(self) -> Any:
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def hold(self, seconds: float) -> None:
        torch.cuda._sleep(round(seconds * self._cycles_per_second))

    def passed(self, mark: Any) -> bool:
        return bool(mark.query())

    def seconds(self, start: Any, end: Any) -> float:
        return float(start.elapsed_time(end)) / 1e3

    def synchronize(self) -> None:
        torch.cuda.synchronize()


def raise_clocks(device: torch.device, seconds: float = WARM_UP_SECONDS) -> None:
    """Multiply random matrices for a while: an idle device has low clocks."""
    matrix = torch.randn(4096, 4096, device=device).bfloat16()
    end = time.perf_counter() + seconds
    while time.perf_counter() < end:
        for _ in range(20):
            torch.mm(matrix, matrix)
        torch.cuda.synchronize(device)


@dataclass(frozen=True)
class Side:
    """One of the sides: `run(i)` makes its i-th call, which launches at most about `launches` kernels."""

    run: Callable[[int], object]
    launches: int = 8


@dataclass
class Times:
    """Seconds of a call, by turn; no `device` times where calls wait for the device, as reading a result back does."""

    device: list[float] = field(default_factory=list)
    issued: list[float] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """Medians, and every turn, ready for JSON."""
        medians = {name: statistics.median(turns) if turns else None for name, turns in vars(self).items()}
        return {**medians, "turns": {"device": self.device, "issued": self.issued}}


def take_turns(queue: Queue, sides: Mapping[str, Side], turns: int, turn_seconds: float) -> dict[str, Times]:
    """The sides one after the other (A B A B), `turns` times, each turn as many calls as fill `turn_seconds`."""
    timers = {name: _Timer(queue, side, turn_seconds) for name, side in sides.items()}
    for _ in range(turns):
        for timer in timers.values():
            timer.turn()
    return {name: timer.times for name, timer in timers.items()}


class _Timer:
    """Times one side; its calls are numbered on and on, so that every one takes other weights."""

    def __init__(self, queue: Queue, side: Side, turn_seconds: float) -> None:
        self.times = Times()
        self._queue, self._side, self._number, self._can_queue = queue, side, 0, True
        self._calls(2)  # what is compiled, allocated and tuned at first
        queue.synchronize()
        to_launch = self._calls(2) / 2
        queue.synchronize()
        most = max(1, MOST_LAUNCHES // side.launches)
        self._count = min(most, max(1, round(turn_seconds / max(self._issued(2), 1e-9))))
        self._hold = LEAST_HOLD + 2 * to_launch * self._count

    def turn(self) -> None:
        """Time a turn both ways."""
        seconds = self._queued(self._count) if self._can_queue else None
        if seconds is None:
            self._can_queue = False
            self.times.device.clear()
        else:
            self.times.device.append(seconds)
        self.times.issued.append(self._issued(self._count))

    def _calls(self, count: int) -> float:
        start = time.perf_counter()
        for _ in range(count):
            self._side.run(self._number)
            self._number += 1
        return time.perf_counter() - start

    def _issued(self, count: int) -> float:
        start = self._queue.mark()
        self._calls(count)
        end = self._queue.mark()
        self._queue.synchronize()
        return self._queue.seconds(start, end) / count

    def _queued(self, count: int) -> float | None:
        """Seconds of a call when all of them are queued before the first one begins; None if that cannot be."""
        for _ in range(TRIES):
            self._queue.hold(min(self._hold, MOST_HOLD))
            start = self._queue.mark()
            took = self._calls(count)
            in_time = not self._queue.passed(start)
            end = self._queue.mark()
            self._queue.synchronize()
            if in_time:
                return self._queue.seconds(start, end) / count
            self._hold = 2 * max(self._hold, took)
        return None


def speed_up(reference: Mapping[str, Any], other: Mapping[str, Any]) -> float:
    """How many times as fast the other side is, by the device's time where both have one."""
    both = reference["device"] is not None and other["device"] is not None
    name = "device" if both else "issued"
    return float(reference[name] / other[name])
