from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest
from quantload.checkpoint import FileSource, pagecache
from quantload.checkpoint.pagecache import CacheWindows, kernel_readahead
from quantload.checkpoint.source import FileCalls
from quantload.errors import MissingShardError
from quantload.options import PageCache

MIB = 1 << 20


class Kernel:
    """Answers like a kernel in whose page cache the given ranges are, and records the advice it gets."""

    def __init__(self, *warm: tuple[int, int], error: int = errno.EAGAIN) -> None:
        self.warm = warm
        self.error = error
        self.advice: list[tuple[int, int, int]] = []

    def preadv(self, fd: int, buffers: list[memoryview], offset: int, flags: int = 0) -> int:
        assert flags == os.RWF_NOWAIT
        if any(start <= offset < stop for start, stop in self.warm):
            return 1
        raise OSError(self.error, os.strerror(self.error))

    def advise(self, fd: int, offset: int, length: int, advice: int) -> None:
        self.advice.append((offset, length, advice))


def test_what_others_read_too_is_dropped_at_the_end_alone(tmp_path: Path) -> None:
    (tmp_path / "f").write_bytes(bytes(3 * 4096))
    dropped: list[tuple[int, int]] = []

    class Calls(FileCalls):
        def advise(self, fd: int, offset: int, length: int, advice: int) -> None:
            if advice == os.POSIX_FADV_DONTNEED:
                dropped.append((offset, length))

    source = FileSource(tmp_path, page_cache="drop", calls=Calls())
    with source.keeping():
        source.read_into("f", 0, memoryview(bytearray(4096)))
        source.release("f", 0, 4096)
        source.close()
        assert not dropped
    assert dropped == [(0, 3 * 4096)]


def test_what_others_read_stays_where_the_load_fails(tmp_path: Path) -> None:
    (tmp_path / "f").write_bytes(bytes(4096))
    source = FileSource(tmp_path, page_cache="drop")
    with pytest.raises(MissingShardError), source.keeping():
        source.size("f"), source.size("g")
    cache = source._files["f"].cache
    assert cache is not None
    assert not cache.used
    source.close()


def test_warm_windows_are_left_alone() -> None:
    kernel = Kernel((0, 8 * MIB), (12 * MIB, 16 * MIB))
    windows = CacheWindows(20 * MIB, "auto", 0, kernel)
    assert windows.any_cold
    assert list(windows.cold_ranges(0, 20 * MIB)) == [(8 * MIB, 4 * MIB), (16 * MIB, 4 * MIB)]
    assert list(windows.cold_ranges(9 * MIB, 4 * MIB)) == [(9 * MIB, 3 * MIB)]
    assert list(windows.cold_ranges(0, 8 * MIB)) == []


def test_probing_does_not_read_ahead() -> None:
    kernel = Kernel()
    CacheWindows(20 * MIB, "auto", 0, kernel)
    assert [advice for *_, advice in kernel.advice] == [os.POSIX_FADV_RANDOM, os.POSIX_FADV_SEQUENTIAL]


def test_large_files_are_probed_in_few_places() -> None:
    windows = CacheWindows(1 << 40, "auto", 0, Kernel())
    assert list(windows.cold_ranges(0, 1 << 40)) == [(0, 1 << 40)]
    assert len(windows._cold) <= 64


@pytest.mark.parametrize("number", [errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL])
def test_files_nobody_can_tell_about_are_left_alone(number: int) -> None:
    assert not CacheWindows(20 * MIB, "auto", 0, Kernel(error=number)).any_cold


def test_policies_without_a_probe() -> None:
    kernel = Kernel()
    assert not CacheWindows(20 * MIB, "keep", 0, kernel).any_cold
    assert list(CacheWindows(20 * MIB, "drop", 0, kernel).cold_ranges(5, 30 * MIB)) == [(5, 20 * MIB - 5)]
    assert not CacheWindows(0, "drop", 0, kernel).any_cold
    assert kernel.advice == []


def test_cold_ranges_are_prefetched_dropped_and_swept() -> None:
    kernel = Kernel()
    windows = CacheWindows(8 * MIB, "drop", 0, kernel)
    windows.sweep(0, kernel)
    assert kernel.advice == [], "nothing was read, so nothing is dropped"
    windows.prefetch(0, 100, 200 * 1024, kernel)
    windows.release(0, 5000, 5000, kernel)
    windows.sweep(0, kernel)
    assert kernel.advice == [
        (100, 128 * 1024, os.POSIX_FADV_WILLNEED),
        (100 + 128 * 1024, 72 * 1024, os.POSIX_FADV_WILLNEED),
        (4096, 5904, os.POSIX_FADV_DONTNEED),
        (0, 8 * MIB, os.POSIX_FADV_DONTNEED),
    ]


def test_a_kernel_that_reads_ahead_far_is_not_asked_to(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pagecache, "kernel_readahead", lambda device: {5: 1 << 20, 6: 128 << 10}[device])
    for device, asked in ((5, 0), (6, 1)):
        kernel = Kernel()
        windows = CacheWindows(8 * MIB, "drop", 0, kernel, device)
        windows.prefetch(0, 0, 4096, kernel)
        assert len(kernel.advice) == asked


def test_readahead_of_a_device(tmp_path: Path) -> None:
    assert kernel_readahead(None) == 0
    assert kernel_readahead(os.makedev(4095, 1 << 19)) == 0
    folders = [folder for folder in Path("/sys/class/bdi").glob("[0-9]*:*") if (folder / "read_ahead_kb").exists()]
    if not folders:
        pytest.skip("no device says how far it reads ahead")
    major, minor = folders[0].name.split(":")
    expected = int((folders[0] / "read_ahead_kb").read_text()) * 1024
    assert kernel_readahead(os.makedev(int(major), int(minor))) == expected


def resident_share(path: Path, size: int) -> float:
    fd = os.open(path, os.O_RDONLY)
    try:
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_RANDOM)
        buffer, hits, places = bytearray(1), 0, range(0, size, 64 << 10)
        for place in places:
            try:
                hits += os.preadv(fd, [buffer], place, os.RWF_NOWAIT)
            except BlockingIOError:
                continue
        return hits / len(places)
    finally:
        os.close(fd)


@pytest.mark.parametrize(("policy", "warm", "left"), [
    ("auto", True, 1.0), ("auto", False, 0.0), ("keep", False, 1.0), ("drop", True, 0.0),
])  # fmt: skip
def test_on_a_real_disk(tmp_path: Path, policy: PageCache, warm: bool, left: float) -> None:
    """The kernel may take pages away, or keep them in use for a moment, whatever it is told; hence three tries."""
    size, path = 12 * MIB, tmp_path / "shard"
    found: list[float] = []
    while len(found) < 3 and not (found and abs(found[-1] - left) <= 0.1):
        with open(path, "wb") as file:
            file.write(os.urandom(size))
            file.flush()
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        try:
            cold = resident_share(path, size) < 0.1
        except OSError as error:
            pytest.skip(f"this filesystem cannot say what is cached: {error}")
        if not cold:
            pytest.skip("this filesystem keeps everything in memory")
        found.append(left_of(path, size, policy, warm))
    assert found[-1] == pytest.approx(left, abs=0.1), found


def left_of(path: Path, size: int, policy: PageCache, warm: bool) -> float:
    """The share of a file that is in the page cache when it was read once, to the end."""
    with open(path, "rb") as file:
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    if warm:
        path.read_bytes()
    with FileSource(path.parent, page_cache=policy, calls=FileCalls()) as source:
        buffer = memoryview(bytearray(MIB))
        for offset in range(0, size, MIB):
            source.prefetch(path.name, offset + MIB, MIB)
            source.read_into(path.name, offset, buffer)
            source.release(path.name, offset, MIB)
    return resident_share(path, size)
