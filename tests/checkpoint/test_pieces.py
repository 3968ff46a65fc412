from __future__ import annotations

import pytest
import torch
from quantload.checkpoint import Barrier, Piece
from quantload.checkpoint.arena import Arena
from quantload.checkpoint.pieces import (
    MAX_GAP,
    SMALL_PIECE,
    SMALL_TARGET,
    Lines,
    check_barriers,
    plan_batches,
    sub_reads,
)
from quantload.checkpoint.workspace import HostWorkspace

SLOT = 8 << 20


def piece(*extents: tuple[int, int], shard: int = 0, target: bool = False, **more: Barrier) -> Piece:
    return Piece(shard, extents, lambda workspace: None, (lambda: torch.empty(0)) if target else None, **more)


def sizes(pieces: list[Piece], slot_bytes: int = SLOT) -> list[int]:
    batches = plan_batches(pieces, slot_bytes)
    assert [p for batch in batches for p in batch.pieces] == pieces
    for batch in batches:
        assert batch.offset == min(offset for p in batch.pieces for offset, _ in p.extents)
        assert batch.stop == max(offset + length for p in batch.pieces for offset, length in p.extents)
    return [len(batch.pieces) for batch in batches]


def test_small_neighbours_share_a_read() -> None:
    assert sizes([piece((100 * i, 100)) for i in range(50)]) == [50]
    assert sizes([piece((0, 10)), piece((10 + MAX_GAP, 10)), piece((21 + 2 * MAX_GAP, 10))]) == [2, 1]


def test_what_does_not_share_a_read() -> None:
    assert sizes([piece((0, 10)), piece((10, 10), shard=1)]) == [1, 1], "another shard"
    assert sizes([piece((10, 10)), piece((0, 10))]) == [1, 1], "backwards"
    assert sizes([piece((0, 10)), piece((5, 10))]) == [1, 1], "overlapping"
    assert sizes([piece((0, SMALL_PIECE)), piece((SMALL_PIECE, 10))]) == [1, 1], "too large"
    assert sizes([piece((0, SMALL_TARGET), target=True), piece((SMALL_TARGET, 10))]) == [1, 1], "large and with target"
    assert sizes([piece((0, 10), target=True), piece((10, 10))]) == [2], "small and with target"
    assert sizes([piece((0, 10), (20, 10)), piece((30, 10))]) == [1, 1], "in several extents"


def test_a_shared_read_takes_at_most_half_a_slot_and_1_mib() -> None:
    assert sizes([piece((1000 * i, 1000)) for i in range(8)], slot_bytes=4096) == [2, 2, 2, 2]
    quarter = (1 << 18) - 1
    assert sizes([piece((quarter * i, quarter)) for i in range(8)]) == [4, 4]


def test_lines_of_a_matrix_are_extents() -> None:
    lines = Lines(3, 10, 4, 3)
    assert list(lines) == [(3, 4), (13, 4), (23, 4)]
    assert (len(lines), lines[1], lines[-1], lines[1:]) == (3, (13, 4), (23, 4), [(13, 4), (23, 4)])
    assert list(lines.of_bytes(1000, 2)) == [(1006, 8), (1026, 8), (1046, 8)]
    assert list(sub_reads(lines, 3)) == [(0, 3, 3), (3, 6, 1), (4, 13, 3), (7, 16, 1), (8, 23, 3), (11, 26, 1)]


def test_sub_reads_join_adjacent_extents_and_cut_long_ones() -> None:
    assert list(sub_reads(((10, 5), (15, 5), (30, 3)), 100)) == [(0, 10, 10), (10, 30, 3)]
    assert list(sub_reads(((0, 25),), 10)) == [(0, 0, 10), (10, 10, 10), (20, 20, 5)]
    assert list(sub_reads((), 10)) == []
    assert list(sub_reads(((7, 0),), 10)) == []


def test_barriers_that_cannot_open_are_refused() -> None:
    barrier = Barrier(2)
    signals = [piece((0, 1), signal=barrier), piece((1, 1), signal=barrier)]
    check_barriers([*signals, piece((0, 1), after=barrier)])
    for wrong in ([*signals[:1], piece((0, 1), after=barrier)], [piece((0, 1), after=barrier), *signals]):
        with pytest.raises(ValueError, match="waits for 2 signals"):
            check_barriers(wrong)
    with pytest.raises(ValueError, match="at least 1 piece"):
        Barrier(0)


def test_a_barrier_opens_at_the_last_signal() -> None:
    barrier = Barrier(2)
    barrier.signal()
    assert not barrier.wait(0)
    barrier.signal()
    assert barrier.wait(0)


def test_scratch_is_a_second_buffer_taken_when_asked_for() -> None:
    with Arena(8192, 4096) as arena:
        workspace = HostWorkspace(arena)
        workspace.landed(4096).fill_(1)
        assert arena.peak_bytes == 4096
        workspace.scratch(100).fill_(2)
        assert workspace.scratch(4096).data_ptr() == workspace.scratch(1).data_ptr()
        assert workspace.landed(4096).eq(1).all()
        assert arena.peak_bytes == 8192
        with pytest.raises(ValueError, match="has 4096"):
            workspace.scratch(4097)
        workspace.__exit__()
        assert [arena.acquire(), arena.acquire()]
