"""Checksums of a file's segments, and the source that hands out nothing it has not checked."""

from __future__ import annotations

import zlib
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from quantload.cache.checksums import SEGMENT_BYTES, Checksums, VerifiedSource
from quantload.checkpoint.source import FileSource, read_bytes
from quantload.errors import DamagedEntryError, MissingShardError

SIZE = 3 * SEGMENT_BYTES + 1000
DATA = bytes((7 * i + i // 251) % 256 for i in range(SIZE))


def noted(data: bytes, *borders: int) -> Checksums:
    checksums = Checksums((0, *borders, len(data)))
    for low, high in zip((0, *borders), (*borders, len(data)), strict=True):
        checksums.note(low, memoryview(data)[low:high])
    return checksums


def test_a_small_file_has_one_checksum_in_its_bytes() -> None:
    checksums = noted(b"abc")
    assert checksums.size == 3
    assert checksums.to_bytes() == b"".join(
        number.to_bytes(width, "little") for number, width in ((2, 8), (0, 8), (3, 8), (zlib.crc32(b"abc"), 4))
    )


def test_a_segment_begins_at_every_border_and_every_64_kib() -> None:
    parts = [DATA[:10], DATA[10 : 10 + SEGMENT_BYTES], DATA[10 + SEGMENT_BYTES : 70_000], DATA[70_000:70_001]]
    expected = b"".join(zlib.crc32(part).to_bytes(4, "little") for part in parts)
    assert noted(DATA[:70_001], 10, 70_000).to_bytes()[-len(expected) :] == expected


def test_what_was_written_can_be_read_back() -> None:
    checksums = noted(DATA, 10, 70_000)
    again = Checksums.from_bytes(checksums.to_bytes())
    assert again.to_bytes() == checksums.to_bytes()
    assert again.differs(0, memoryview(DATA), lambda *_: bytearray()) is None


@given(
    bounds=st.tuples(st.integers(0, SIZE), st.integers(0, SIZE)).map(sorted),
    damaged=st.integers(0, SIZE - 1),
    borders=st.sets(st.integers(1, SIZE - 1), max_size=3).map(sorted),
)
def test_every_read_finds_damage_in_its_segments_and_only_there(
    bounds: list[int], damaged: int, borders: list[int]
) -> None:
    start, stop = bounds
    checksums = noted(DATA, *borders)
    data = bytearray(DATA)
    data[damaged] ^= 16
    found = checksums.differs(start, memoryview(data)[start:stop], lambda at, count: data[at : at + count])
    assert checksums.differs(start, memoryview(DATA)[start:stop], lambda at, n: bytearray(DATA[at : at + n])) is None
    if start <= damaged < stop:
        assert found is not None
        assert found <= damaged < found + SEGMENT_BYTES
    if found is not None:
        assert start - SEGMENT_BYTES < found < stop
        assert found <= damaged


@pytest.fixture
def source(tmp_path: Path) -> VerifiedSource:
    (tmp_path / "file").write_bytes(DATA)
    (tmp_path / "other").write_bytes(DATA)
    return VerifiedSource(FileSource(tmp_path), {"file": noted(DATA, 10), "gone": noted(b"x")})


def test_intact_bytes_come_through(source: VerifiedSource) -> None:
    assert source.size("file") == SIZE
    assert read_bytes(source, "file", 5, 70_000) == DATA[5:70_005]
    assert read_bytes(source, "file", SIZE, 0) == b""


def test_a_flipped_bit_is_an_error_even_just_outside_of_what_is_read(source: VerifiedSource, tmp_path: Path) -> None:
    data = bytearray(DATA)
    data[100] ^= 1
    (tmp_path / "file").write_bytes(data)
    assert read_bytes(source, "file", 0, 10) == DATA[:10]
    with pytest.raises(DamagedEntryError, match=r"file: what was read from byte 10 on is not what was written"):
        read_bytes(source, "file", 200, 10)


def test_another_size_is_an_error(source: VerifiedSource, tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(DATA[:-1])
    with pytest.raises(DamagedEntryError, match=r"file has 197,607 bytes, 197,608 were written"):
        source.size("file")


@pytest.mark.parametrize("name", ["other", "gone"])
def test_a_file_nobody_wrote_or_that_is_gone_is_missing(source: VerifiedSource, name: str) -> None:
    with pytest.raises(MissingShardError):
        source.size(name)
