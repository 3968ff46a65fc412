"""How many workers an arena is for, and what is said where it is for none."""

from __future__ import annotations

import mmap
import re

import pytest
from quantload import LoadOptions
from quantload.errors import PolicyError
from quantload.memory.amounts import parse_bytes, typed_bytes
from quantload.plan import plan_staging

MIB = 1 << 20


def refused(chunk: int, chunk_bytes: int, staging: int) -> str:
    with pytest.raises(
        PolicyError, match=re.escape(f"2 buffers of {typed_bytes(chunk)}: give it {typed_bytes(2 * chunk)}")
    ) as told:
        plan_staging(LoadOptions(chunk_bytes=chunk_bytes, staging_bytes=staging, workers=2), chunk, 100, 2)
    return str(told.value).partition(f"give it {typed_bytes(2 * chunk)}")[2]


def test_an_arena_too_small_for_the_chunk_says_which_chunk_fits() -> None:
    told = refused(8 * MIB, 8 * MIB, 3 * MIB + 100)
    assert told == ", or a chunk of at most 1536KiB"
    options = LoadOptions(chunk_bytes=3 * MIB // 2, staging_bytes=3 * MIB + 100, workers=2)
    assert plan_staging(options, 3 * MIB // 2, 100, 2) == (1, 3 * MIB)


def test_no_smaller_chunk_is_advised_where_scale_blocks_decide() -> None:
    assert refused(MIB, 65536, MIB) == "; scale blocks cannot be cut, so a chunk of 64KiB changes nothing"


def test_no_smaller_chunk_is_advised_where_none_would_fit() -> None:
    assert refused(MIB, 8 * MIB, mmap.PAGESIZE) == ""


@pytest.mark.parametrize("size", [0, 1, 4097, 12 << 10, 1536 << 10, 16 * MIB, 3 << 30])
def test_a_size_that_is_advised_can_be_typed(size: int) -> None:
    assert parse_bytes(typed_bytes(size)) == size
