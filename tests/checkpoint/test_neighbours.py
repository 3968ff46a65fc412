"""What is read at once: neighbours, what lies between them, and what overlaps."""

from __future__ import annotations

import itertools

from hypothesis import given
from hypothesis import strategies as st
from quantload.checkpoint.neighbours import Extent, neighbours


def groups(extents: list[tuple[str, int, int]], limit: int, hole: int = 0, overlap: bool = False) -> list[list[int]]:
    """The numbers of the extents of each group."""
    items = list(enumerate(extents))
    found = neighbours(items, lambda item: Extent(*item[1]), limit, hole, overlap=overlap)
    return [[number for number, _ in group] for group in found]


def test_neighbours_are_together_up_to_a_limit() -> None:
    extents = [("a", 0, 10), ("a", 10, 20), ("a", 20, 30), ("b", 30, 40)]
    assert groups(extents, 20) == [[0, 1], [2], [3]]
    assert groups(extents, 30) == [[0, 1, 2], [3]]
    assert groups(extents, 9) == [[0], [1], [2], [3]]
    assert groups([], 100) == []


def test_a_hole_may_be_read_over() -> None:
    assert groups([("a", 0, 10), ("a", 13, 20)], 100, hole=3) == [[0, 1]]
    assert groups([("a", 0, 10), ("a", 13, 20)], 100, hole=2) == [[0], [1]]
    assert groups([("a", 0, 10), ("a", 13, 20)], 19, hole=3) == [[0], [1]]


def test_what_shares_bytes_stays_together_only_where_that_is_asked_for() -> None:
    extents = [("a", 0, 10), ("a", 5, 8), ("a", 10, 12)]
    assert groups(extents, 12, overlap=True) == [[0, 1, 2]]
    assert groups(extents, 1, overlap=True) == [[0, 1], [2]]
    assert groups(extents, 12) == [[0], [1], [2]]


def test_going_back_in_a_file_begins_another_group() -> None:
    assert groups([("a", 10, 20), ("a", 0, 10)], 100, overlap=True) == [[0], [1]]


@given(
    st.lists(st.tuples(st.sampled_from("ab"), st.integers(0, 60), st.integers(0, 20)), max_size=30),
    st.integers(1, 80),
    st.integers(0, 10),
)
def test_every_item_is_in_one_group_and_no_group_is_larger_than_it_must_be(
    items: list[tuple[str, int, int]], limit: int, hole: int
) -> None:
    extents = sorted((file, start, start + length) for file, start, length in items)
    found = groups(extents, limit, hole)
    assert [number for group in found for number in group] == list(range(len(extents)))
    for group in found:
        own = [extents[number] for number in group]
        assert len({file for file, _, _ in own}) == 1
        assert len(own) == 1 or own[-1][2] - own[0][1] <= limit
        for (_, _, stop), (_, start, _) in itertools.pairwise(own):
            assert 0 <= start - stop <= hole
