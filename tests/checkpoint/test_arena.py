from __future__ import annotations

import mmap

import pytest
import torch
from quantload.checkpoint.arena import Arena, rounded_slot
from quantload.errors import PolicyError

MIB = 1 << 20


def anonymous_bytes() -> int:
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) * 1024 for line in status if line.startswith("RssAnon"))


def test_slots_are_equal_separate_and_reused() -> None:
    with Arena(10_000, 5000 - 904) as arena:
        one, two = arena.acquire(), arena.acquire()
        assert one.tensor.numel() == two.tensor.numel() == arena.slot_bytes == 4096
        one.tensor.fill_(1)
        two.tensor.fill_(2)
        assert one.tensor.sum() == 4096
        assert one.memory[0] == 1
        with pytest.raises(PolicyError, match="all 2 buffers"):
            arena.acquire()
        arena.release(two)
        assert arena.acquire() is two


def test_slots_are_whole_pages() -> None:
    assert rounded_slot(1) == mmap.PAGESIZE
    assert rounded_slot(mmap.PAGESIZE) == mmap.PAGESIZE
    with Arena(32 * MIB, 8 * MIB) as arena:
        assert arena.acquire().tensor.data_ptr() % (2 * MIB) == 0


def test_too_small() -> None:
    with pytest.raises(PolicyError, match="one buffer takes 8192"):
        Arena(8191, 5000)


def test_only_touched_memory_counts() -> None:
    before = anonymous_bytes()
    with Arena(512 * MIB, 8 * MIB) as arena:
        assert arena.peak_bytes == 0
        slot = arena.acquire()
        slot.first(5 * MIB).fill_(1)
        slot.first(1 * MIB)
        assert arena.peak_bytes in (5 * MIB, 6 * MIB), "whole pages, huge or not"
        assert 5 * MIB <= anonymous_bytes() - before < 16 * MIB
    assert arena.peak_bytes in (5 * MIB, 6 * MIB)


@pytest.mark.parametrize("escaped", [False, True])
def test_memory_is_given_back_on_close(escaped: bool) -> None:
    before = anonymous_bytes()
    arena = Arena(64 * MIB, 32 * MIB)
    slot = arena.acquire()
    view = slot.tensor[:100].view(torch.int16) if escaped else None
    slot.tensor.fill_(1)
    assert anonymous_bytes() - before > 24 * MIB
    arena.close()
    arena.close()
    assert anonymous_bytes() - before < 8 * MIB
    assert view is None or view.sum() == 0, "a view that escaped reads as zeros, not as freed memory"
