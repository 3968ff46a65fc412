"""The tracker of regions: exactly once, in any order, from any thread, and what is missing has a name."""

from __future__ import annotations

import random
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from quantload.errors import RepeatedRegionError, RouteError
from quantload.geometry.regions import Region, RegionTracker
from torch import Tensor

THREADS = 4


def partition(region: Region, rng: random.Random, depth: int) -> list[Region]:
    """Random rectangles that cover `region` without overlap."""
    (top, bottom), (left, right) = region.rows, region.columns
    by_row = rng.random() < 0.5
    low, high = (top, bottom) if by_row else (left, right)
    if depth == 0 or high - low < 2:
        return [region]
    cut = rng.randrange(low + 1, high)
    if by_row:
        halves = Region(region.expert, (top, cut), (left, right)), Region(region.expert, (cut, bottom), (left, right))
    else:
        halves = Region(region.expert, (top, bottom), (left, cut)), Region(region.expert, (top, bottom), (cut, right))
    return [part for half in halves for part in partition(half, rng, depth - 1)]


@st.composite
def cases(draw: st.DrawFn) -> tuple[int | None, int, int, list[Region]]:
    """Experts, rows, columns, and a shuffled partition of all of it."""
    experts = draw(st.one_of(st.none(), st.integers(1, 3)))
    rows, columns = draw(st.integers(1, 12)), draw(st.integers(1, 12))
    rng = random.Random(draw(st.integers(0, 1 << 30)))
    matrices = [None] if experts is None else range(experts)
    parts = [
        part
        for expert in matrices
        for part in partition(Region(expert, (0, rows), (0, columns)), rng, rng.randrange(5))
    ]
    rng.shuffle(parts)
    return experts, rows, columns, parts


def paint(canvas: Tensor, region: Region) -> None:
    canvas[region.expert or 0, slice(*region.rows), slice(*region.columns)] += 1


@settings(max_examples=60, deadline=None)
@given(cases())
def test_a_partition_completes_exactly_once_from_several_threads(
    case: tuple[int | None, int, int, list[Region]],
) -> None:
    experts, rows, columns, parts = case
    tracker = RegionTracker("w", experts, rows, columns)
    start = threading.Barrier(min(THREADS, len(parts)))

    def bring(mine: list[Region]) -> int:
        start.wait(10)
        completed = 0
        for region in mine:
            tracker.claim(region)
            completed += tracker.commit(region.numel)
        return completed

    with ThreadPoolExecutor(THREADS) as pool:
        shares = [parts[i::THREADS] for i in range(THREADS) if parts[i::THREADS]]
        completions = sum(pool.map(bring, shares))
    assert completions == 1
    assert tracker.complete
    assert list(tracker.missing()) == []


@settings(max_examples=100, deadline=None)
@given(cases(), st.data())
def test_missing_names_exactly_what_is_absent(
    case: tuple[int | None, int, int, list[Region]], data: st.DataObject
) -> None:
    experts, rows, columns, parts = case
    arrived = parts[: data.draw(st.integers(0, len(parts) - 1))]
    tracker = RegionTracker("w", experts, rows, columns)
    canvas = torch.zeros(experts or 1, rows, columns, dtype=torch.int)
    for region in arrived:
        tracker.claim(region)
        assert not tracker.commit(region.numel)
        paint(canvas, region)
    assert not tracker.complete
    for region in tracker.missing():
        assert region.numel > 0
        assert (region.expert is None) == (experts is None)
        paint(canvas, region)
    assert (canvas == 1).all()


@settings(max_examples=100, deadline=None)
@given(cases(), st.data())
def test_an_overlap_is_refused_and_changes_nothing(
    case: tuple[int | None, int, int, list[Region]], data: st.DataObject
) -> None:
    experts, rows, columns, parts = case
    tracker = RegionTracker("w", experts, rows, columns)
    for region in parts[:-1]:
        tracker.claim(region)
        tracker.commit(region.numel)
    top, left = data.draw(st.integers(0, rows - 1)), data.draw(st.integers(0, columns - 1))
    bottom, right = data.draw(st.integers(top + 1, rows)), data.draw(st.integers(left + 1, columns))
    tried = Region(parts[-1].expert, (top, bottom), (left, right))
    (free,) = [parts[-1]]
    inside = free.rows[0] <= top and bottom <= free.rows[1] and free.columns[0] <= left and right <= free.columns[1]
    if inside:
        tracker.claim(tried)
        return
    with pytest.raises(RepeatedRegionError, match="arrived twice"):
        tracker.claim(tried)
    tracker.claim(free)
    assert tracker.commit(free.numel)


def test_two_threads_cannot_claim_the_same_region() -> None:
    for _ in range(20):
        tracker = RegionTracker("w", None, 8, 8)
        start = threading.Barrier(THREADS)

        def claim(_: int, tracker: RegionTracker = tracker, start: threading.Barrier = start) -> bool:
            start.wait(10)
            try:
                tracker.claim(Region(None, (2, 6), (0, 8)))
            except RepeatedRegionError:
                return False
            return True

        with ThreadPoolExecutor(THREADS) as pool:
            assert sum(pool.map(claim, range(THREADS))) == 1


def test_a_claim_is_not_an_arrival() -> None:
    tracker = RegionTracker("w", None, 2, 2)
    tracker.claim(Region(None, (0, 2), (0, 2)))
    assert not tracker.complete
    assert tracker.commit(4)


def test_reset_announces_a_reload() -> None:
    tracker = RegionTracker("w", 2, 2, 4)
    everything = [Region(expert, (0, 2), (0, 4)) for expert in range(2)]
    for _ in range(2):
        for region in everything:
            tracker.claim(region)
            tracker.commit(region.numel)
        complete = [tracker.complete]
        with pytest.raises(RepeatedRegionError):
            tracker.claim(everything[0])
        tracker.reset()
        complete.append(tracker.complete)
        assert complete == [True, False]
        assert list(tracker.missing()) == everything


@settings(max_examples=60, deadline=None)
@given(cases(), st.data())
def test_a_reset_of_a_region_asks_for_that_region_again(
    case: tuple[int | None, int, int, list[Region]], data: st.DataObject
) -> None:
    experts, rows, columns, parts = case
    tracker = RegionTracker("w", experts, rows, columns)
    for part in parts:
        tracker.claim(part)
        tracker.commit(part.numel)
    low, high = sorted((data.draw(st.integers(0, rows)), data.draw(st.integers(0, rows))))
    left, right = sorted((data.draw(st.integers(0, columns)), data.draw(st.integers(0, columns))))
    region = Region(data.draw(st.sampled_from(parts)).expert, (low, high), (left, right))
    tracker.reset(region)
    canvas = torch.zeros(experts or 1, rows, columns, dtype=torch.int32)
    for gap in tracker.missing():
        paint(canvas, gap)
    expected = torch.zeros_like(canvas)
    paint(expected, region)
    assert torch.equal(canvas, expected)
    assert tracker.complete == (region.numel == 0)
    assert tracker.arrived(region) == (region.numel == 0)
    tracker.claim(region)
    tracker.commit(region.numel)
    assert tracker.complete
    assert tracker.arrived(region)


def test_a_region_that_was_claimed_and_never_written_is_forgotten_with_the_rest() -> None:
    tracker = RegionTracker("w", None, 4, 4)
    for rows in ((0, 2), (2, 4)):
        tracker.claim(Region(None, rows, (0, 4)))
    tracker.commit(8)
    tracker.reset(Region(None, (2, 4), (0, 4)))
    tracker.claim(Region(None, (2, 4), (0, 4)))
    assert tracker.commit(8)


@pytest.mark.parametrize(
    ("experts", "region"),
    [
        (None, Region(None, (0, 5), (0, 4))),
        (None, Region(None, (0, 4), (0, 5))),
        (None, Region(None, (-1, 4), (0, 4))),
        (None, Region(0, (0, 4), (0, 4))),
        (2, Region(2, (0, 4), (0, 4))),
        (2, Region(-1, (0, 4), (0, 4))),
        (2, Region(None, (0, 4), (0, 4))),
    ],
)
def test_a_region_outside_is_refused(experts: int | None, region: Region) -> None:
    with pytest.raises(IndexError, match=r"w: .* lies outside of"):
        RegionTracker("w", experts, 4, 4).claim(region)
    with pytest.raises(IndexError, match=r"w: .* lies outside of"):
        RegionTracker("w", experts, 4, 4).reset(region)


def test_messages_name_the_parameter_and_the_region() -> None:
    tracker = RegionTracker("layers.0.experts.down_proj", 2, 4, 8)
    region = Region(1, (0, 2), (0, 8))
    tracker.claim(region)
    with pytest.raises(
        RouteError, match=r"layers\.0\.experts\.down_proj: expert 1, rows 0:2, columns 0:8 arrived twice"
    ):
        tracker.claim(region)
    assert str(Region(None, (0, 2), (3, 8))) == "rows 0:2, columns 3:8"


def test_a_large_ordered_claim_stays_cheap() -> None:
    """Neighbours merge, so that the list of claims does not grow with the number of pieces."""
    tracker = RegionTracker("w", None, 4096, 64)
    for row in range(4096):
        tracker.claim(Region(None, (row, row + 1), (0, 64)))
    assert len(tracker._claimed[None]) == 1
