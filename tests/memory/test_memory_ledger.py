from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise

import torch
from hypothesis import given
from hypothesis import strategies as st
from quantload.memory.ledger import TIMELINE_POINTS, Ledger, _Timeline
from quantload.memory.probes import AnonymousRssProbe, Kind
from quantload.memory.report import TimelinePoint

MIB = 1 << 20


class ScriptedProbe:
    """A probe whose memory the test sets."""

    kind: Kind = "CPU"
    device = torch.device("cpu")

    def __init__(self, memory: int = 1000) -> None:
        self.memory = memory
        self.highest = memory
        self.calls: list[str] = []

    def current(self) -> int:
        return self.sample()

    def sample(self) -> int:
        self.highest = max(self.highest, self.memory)
        return self.memory

    def reset_peak(self) -> None:
        self.highest = self.memory

    def peak(self) -> int:
        return max(self.highest, self.sample())

    def start(self) -> None:
        self.calls.append("start")

    def stop(self) -> None:
        self.calls.append("stop")


def test_peak_increase_and_timeline_are_relative_to_the_baseline() -> None:
    probe = ScriptedProbe(1000)
    with Ledger(probe) as ledger:
        assert probe.calls == ["start"]
        probe.memory = 1700
        ledger.record(10)
        probe.memory = 1400
        ledger.record(30)
    assert probe.calls == ["start", "stop"]
    assert (ledger.baseline_bytes, ledger.peak_bytes, ledger.increase_bytes) == (1000, 700, 400)
    assert [(p.bytes_read, p.memory) for p in ledger.timeline if p.memory != 0][-1] == (30, 400)
    assert ledger.timeline[0].memory == 0
    assert max(p.memory for p in ledger.timeline) == 700


def test_numbers_stay_after_stop() -> None:
    probe = ScriptedProbe(1000)
    ledger = Ledger(probe)
    ledger.start()
    probe.memory = 1500
    ledger.record(5)
    ledger.stop()
    seconds, points = ledger.seconds, len(ledger.timeline)
    probe.memory = 9000
    probe.sample()
    ledger.stop()
    assert (ledger.peak_bytes, ledger.increase_bytes) == (500, 500)
    assert (ledger.seconds, len(ledger.timeline)) == (seconds, points)


def test_a_peak_before_the_load_does_not_count_and_none_is_negative() -> None:
    probe = ScriptedProbe(1000)
    probe.memory = 9000
    probe.sample()
    probe.memory = 2000
    ledger = Ledger(probe, baseline=1500)
    assert ledger.peak_bytes == 500
    probe.memory = 100
    ledger = Ledger(probe, baseline=1500)
    assert (ledger.peak_bytes, ledger.increase_bytes) == (0, -1400)


def test_threads_may_record_at_once() -> None:
    ledger = Ledger(ScriptedProbe())

    def work(_: int) -> None:
        for number in range(500):
            ledger.record(number)

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(work, range(4)))
    points = ledger.timeline
    assert len(points) <= TIMELINE_POINTS
    assert points == sorted(points, key=lambda point: (point.seconds, point.bytes_read))
    assert points[-1].bytes_read == 499


@given(
    st.lists(st.tuples(st.floats(0, 50), st.integers(-(10**6), 10**12)), min_size=1, max_size=1500),
    st.integers(0, 5),
)
def test_timeline_is_bounded_ordered_and_keeps_ends_and_highest(steps: list[tuple[float, int]], stretch: int) -> None:
    timeline, added, seconds = _Timeline(limit=20), [], 0.0
    for number, (step, memory) in enumerate(steps):
        seconds += step * 10.0**-stretch
        added.append(TimelinePoint(seconds, number, memory))
        timeline.add(added[-1])
    points = timeline.points()
    assert len(points) <= 20
    assert points[0] == added[0]
    assert points[-1] == added[-1]
    assert [p.bytes_read for p in points] == sorted({p.bytes_read for p in points})
    assert max(p.memory for p in points) == max(p.memory for p in added)
    assert set(points) <= set(added)


def test_a_long_load_uses_most_of_the_timeline() -> None:
    """Decimation keeps between half of the points and all of them, spread over the whole load."""
    timeline = _Timeline()
    for i in range(20_000):
        timeline.add(TimelinePoint(i * 0.01, i, i))
    points = timeline.points()
    assert 90 <= len(points) <= TIMELINE_POINTS
    gaps = [b.seconds - a.seconds for a, b in pairwise(points)]
    assert max(gaps) < 200 / 90 * 2


def test_real_memory_and_thread() -> None:
    threads = threading.active_count()
    with Ledger(AnonymousRssProbe()) as ledger:
        held = torch.ones(48 * MIB, dtype=torch.uint8)
        extra = torch.ones(48 * MIB, dtype=torch.uint8)
        ledger.record(0)
        del extra
    assert threading.active_count() == threads
    assert ledger.peak_bytes >= 95 * MIB
    assert 40 * MIB < ledger.increase_bytes < 64 * MIB
    del held
