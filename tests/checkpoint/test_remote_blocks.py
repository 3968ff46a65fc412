"""Blocks cover what is read with few holes, and a schedule never holds more than it may."""

from __future__ import annotations

from collections.abc import Sequence

from hypothesis import given, settings
from hypothesis import strategies as st
from quantload.checkpoint.pieces import Lines
from quantload.checkpoint.remote.blocks import LONGEST_HOLE, MOST_HOLES, Blocks, schedule
from quantload.checkpoint.source import Reads

MIB = 1 << 20
EXTENT = st.tuples(st.integers(0, 40 * MIB), st.integers(1, 3 * MIB))
BATCHES = st.lists(st.tuples(st.sampled_from("ab"), st.lists(EXTENT, min_size=1, max_size=3)), min_size=1, max_size=20)


def needed(batches: Sequence[Reads], path: str) -> set[int]:
    """The pages of 4 KiB that are read."""
    return {
        page
        for name, extents in batches
        if name == path
        for offset, length in extents
        for page in range(offset // 4096, (offset + length - 1) // 4096 + 1)
    }


@settings(max_examples=60, deadline=None)
@given(BATCHES, st.sampled_from([MIB, 8 * MIB]))
def test_blocks_are_short_and_have_few_holes(batches: list[Reads], request_bytes: int) -> None:
    blocks = Blocks(batches, request_bytes)
    assert all(0 < blocks.nbytes(block) <= request_bytes for block in range(len(blocks)))
    assert sum(map(blocks.nbytes, range(len(blocks)))) <= (1 + MOST_HOLES) * blocks.needed_bytes
    for number, (path, extents) in enumerate(batches):
        covered = [(blocks.starts[each], blocks.stops[each], blocks.paths[each]) for each in blocks.uses(number)]
        for offset, length in extents:
            at = offset
            while at < offset + length:
                at = next(stop for start, stop, name in covered if start <= at < stop and name == path)


@settings(max_examples=100, deadline=None)
@given(BATCHES, st.integers(1, 6))
def test_a_schedule_has_every_use_in_one_stay_and_holds_few_at_once(batches: list[Reads], most: int) -> None:
    blocks = Blocks(batches, MIB)
    plan = schedule(blocks, most)
    uses = [block for number in range(len(batches)) for block in blocks.uses(number)]
    assert [plan.stays[stay].block for stay in plan.of_use] == uses
    assert [stay.uses for stay in plan.stays] == [list(plan.of_use).count(n) for n in range(len(plan.stays))]
    last = {stay: position for position, stay in enumerate(plan.of_use)}
    first = {stay: position for position, stay in reversed(list(enumerate(plan.of_use)))}
    assert sorted(first, key=lambda stay: first[stay]) == list(range(len(plan.stays)))
    for position in range(len(uses)):
        assert sum(first[stay] <= position <= last[stay] for stay in first) <= plan.most_at_once <= most + 1
    assert plan.fetched_bytes == sum(blocks.nbytes(stay.block) for stay in plan.stays)


def test_what_is_read_in_order_is_fetched_once() -> None:
    batches: list[Reads] = [("a", [(at, MIB)]) for at in range(0, 64 * MIB, MIB)]
    blocks = Blocks(batches, 8 * MIB)
    assert len(blocks) == 8
    assert schedule(blocks, 2).fetched_bytes == 64 * MIB


def test_what_is_read_twice_is_fetched_twice_unless_it_can_be_held() -> None:
    once: list[Reads] = [("a", [(at, 8 * MIB)]) for at in range(0, 32 * MIB, 8 * MIB)]
    batches = 2 * once
    assert schedule(Blocks(batches, 8 * MIB), 4).fetched_bytes == 32 * MIB
    assert schedule(Blocks(batches, 8 * MIB), 1).fetched_bytes == 64 * MIB


def test_small_holes_are_read_through_and_large_ones_are_not() -> None:
    near: list[Reads] = [("a", [(0, MIB)]), ("a", [(MIB + 40_000, MIB)])]
    assert len(Blocks(near, 8 * MIB)) == 1
    far: list[Reads] = [("a", [(0, 4 * MIB)]), ("a", [(4 * MIB + LONGEST_HOLE + 1, 4 * MIB)])]
    assert len(Blocks(far, 8 * MIB)) == 2


def test_short_lines_of_a_matrix_are_one_range_and_long_ones_are_not() -> None:
    assert len(Blocks([("a", Lines(0, 40_000, 4_000, 20))], 8 * MIB)) == 1
    assert len(Blocks([("a", Lines(0, 4 * MIB, 2 * MIB, 5))], 8 * MIB)) == 5
