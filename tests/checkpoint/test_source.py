from __future__ import annotations

import errno
import os
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from quantload.checkpoint import FileSource
from quantload.checkpoint.source import FileCalls
from quantload.errors import ChangedFileError, CheckpointError, MissingShardError, TruncatedShardError, UnsafePathError

DATA = bytes(range(256)) * 40


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in "abcdef":
        (tmp_path / name).write_bytes(name.encode() + DATA)
    return tmp_path


@pytest.fixture(autouse=True)
def pauses(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    slept: list[float] = []
    monkeypatch.setattr(time, "sleep", slept.append)
    return slept


class Calls(FileCalls):
    """Real system calls, of which chosen ones fail first; counts what is open."""

    def __init__(self, failures: list[int] | None = None, at_most: int | None = None) -> None:
        self.failures = failures or []
        self.at_most = at_most
        self.opened: list[int] = []
        self.replaced = 0
        self.most_open = 0

    def open(self, path: str) -> int:
        fd = super().open(path)
        self.opened.append(fd)
        self.most_open = max(self.most_open, len(self.opened))
        return fd

    def close(self, fd: int) -> None:
        super().close(fd)
        self.opened.remove(fd)

    def replace(self, fd: int, fresh: int) -> None:
        self.replaced += 1
        super().replace(fd, fresh)

    def preadv(self, fd: int, buffers: list[memoryview], offset: int, flags: int = 0) -> int:
        if not flags and self.failures:
            number = self.failures.pop(0)
            raise OSError(number, os.strerror(number))
        if self.at_most is not None:
            buffers = [buffers[0][: self.at_most]]
        return super().preadv(fd, buffers, offset, flags)


class FailsToOpen(Calls):
    """Fails as often as there are numbers `left`, in one of the calls that opening a file makes."""

    def __init__(self, call: str, left: list[int]) -> None:
        super().__init__()
        self.call, self.left = call, left

    def _fail(self, call: str) -> None:
        if call == self.call and self.left:
            number = self.left.pop(0)
            raise OSError(number, os.strerror(number))

    def open(self, path: str) -> int:
        self._fail("open")
        return super().open(path)

    def stat(self, fd: int) -> os.stat_result:
        self._fail("stat")
        return super().stat(fd)

    def preadv(self, fd: int, buffers: list[memoryview], offset: int, flags: int = 0) -> int:
        if flags:
            self._fail("probe")
        return super().preadv(fd, buffers, offset, flags)


def read(source: FileSource, path: str, offset: int, length: int) -> bytes:
    buffer = bytearray(length)
    assert source.read_into(path, offset, memoryview(buffer)) == length
    return bytes(buffer)


def test_reads_ranges(folder: Path) -> None:
    with FileSource(folder) as source:
        assert source.size("a") == len(DATA) + 1
        assert read(source, "a", 0, 4) == b"a\0\1\2"
        assert read(source, "b", 100, 500) == (b"b" + DATA)[100:600]
        assert read(source, "b", 7, 0) == b""


def test_short_reads_are_continued(folder: Path) -> None:
    with FileSource(folder, calls=Calls(at_most=7)) as source:
        assert read(source, "a", 1, 1000) == DATA[:1000]


@pytest.mark.parametrize("number", [errno.EIO, errno.ESTALE, errno.ETIMEDOUT, errno.EINTR])
def test_passing_errors_are_retried(folder: Path, pauses: list[float], number: int) -> None:
    calls = Calls([number] * 4)
    with FileSource(folder, calls=calls) as source:
        assert read(source, "a", 1, 1000) == DATA[:1000]
    assert pauses == [0.01, 0.02, 0.04, 0.08]
    assert calls.replaced == (4 if number == errno.ESTALE else 0)
    assert calls.opened == []


def test_lasting_errors_are_raised(folder: Path, pauses: list[float]) -> None:
    source = FileSource(folder, calls=Calls([errno.EIO] * 9), retries=2)
    with source, pytest.raises(CheckpointError, match=r"at byte 1 after 3 tries.*check the disk") as caught:
        read(source, "a", 1, 1000)
    assert isinstance(caught.value.__cause__, OSError)
    assert len(pauses) == 2


def test_other_errors_are_not_retried(folder: Path, pauses: list[float]) -> None:
    with FileSource(folder, calls=Calls([errno.EACCES])) as source, pytest.raises(CheckpointError, match="at byte 1:"):
        read(source, "a", 1, 1000)
    assert pauses == []


def test_a_stale_handle_is_not_replaced_by_that_of_a_new_file(folder: Path) -> None:
    """A server forgets the handles of files that were replaced: headers and weights would be of two files."""
    with FileSource(folder, calls=Calls([errno.ESTALE])) as source:
        source.size("a")
        (folder / "new").write_bytes(b"new content")
        (folder / "new").replace(folder / "a")
        with pytest.raises(ChangedFileError, match=r"a: changed while it was read \(another file is in its place\)"):
            read(source, "a", 0, 11)


def test_a_stale_handle_of_a_file_that_is_gone(folder: Path) -> None:
    calls = Calls([errno.ESTALE] * 9)
    with FileSource(folder, calls=calls) as source:
        source.size("a")
        (folder / "a").unlink()
        with pytest.raises(CheckpointError, match=r"a: cannot be read at byte 0 after 5 tries: Stale file handle"):
            read(source, "a", 0, 11)
    assert calls.opened == []


@pytest.mark.parametrize("number", [errno.EIO, errno.ESTALE, errno.ETIMEDOUT, errno.EINTR])
@pytest.mark.parametrize("call", ["open", "stat", "probe"])
def test_opening_is_tried_again(folder: Path, pauses: list[float], call: str, number: int) -> None:
    calls = FailsToOpen(call, [number] * 4)
    with FileSource(folder, calls=calls) as source:
        assert read(source, "a", 1, 1000) == DATA[:1000]
    assert pauses == [0.01, 0.02, 0.04, 0.08]
    calls.left = [number] * 9
    with source, pytest.raises(CheckpointError, match=r"a: cannot be opened after 5 tries: "):
        FileSource(folder, calls=calls).size("a")
    assert calls.opened == []


@pytest.mark.parametrize("number", [errno.EACCES, errno.ELOOP])
@pytest.mark.parametrize("call", ["open", "stat", "probe"])
def test_opening_that_cannot_succeed_is_not_tried_again(
    folder: Path, pauses: list[float], call: str, number: int
) -> None:
    calls = FailsToOpen(call, [number])
    with pytest.raises(CheckpointError, match=r"a: cannot be opened: "):
        FileSource(folder, calls=calls).size("a")
    assert (pauses, calls.opened) == ([], [])


def test_end_of_file(folder: Path) -> None:
    with FileSource(folder) as source:
        with pytest.raises(TruncatedShardError, match="a: ended at byte 10,241"):
            read(source, "a", 10_000, 5_000)
        os.truncate(folder / "a", 100)
        with pytest.raises(TruncatedShardError, match=r"ended at byte 100 .* up to 150"):
            read(source, "a", 50, 100)


def test_missing_and_strange_files(folder: Path) -> None:
    os.mkfifo(folder / "pipe")
    (folder / "folder").mkdir()
    with FileSource(folder) as source:
        for name in ("nothing", "a/b"):
            with pytest.raises(MissingShardError, match="download it again"):
                source.size(name)
        for name in ("pipe", "folder"):
            with pytest.raises(CheckpointError, match="not a regular file"):
                source.size(name)
        with pytest.raises(UnsafePathError):
            source.size("../x")


def test_few_files_stay_open(folder: Path) -> None:
    calls = Calls()
    with FileSource(folder, calls=calls, max_open=2) as source:
        for name in "abcdefabcdef":
            assert read(source, name, 0, 1) == name.encode()
        assert calls.most_open == 2
    assert calls.opened == []


def test_out_of_descriptors_closes_idle_files_first(folder: Path) -> None:
    class Scarce(Calls):
        def open(self, path: str) -> int:
            if len(self.opened) >= 3:
                raise OSError(errno.EMFILE, "Too many open files")
            return super().open(path)

    with FileSource(folder, calls=Scarce()) as source:
        for name in "abcdef":
            assert read(source, name, 0, 1) == name.encode()


def test_out_of_descriptors_for_good(folder: Path) -> None:
    class Scarce(Calls):
        def open(self, path: str) -> int:
            raise OSError(errno.EMFILE, "Too many open files")

    with FileSource(folder, calls=Scarce()) as source, pytest.raises(CheckpointError, match="Too many open files"):
        source.size("a")


def test_close_keeps_the_source_usable(folder: Path) -> None:
    calls = Calls()
    source = FileSource(folder, calls=calls)
    source.size("a")
    source.close()
    assert calls.opened == []
    assert read(source, "a", 0, 1) == b"a"
    source.close()
    source.close()
    assert calls.opened == []


def in_threads(count: int, work: Callable[[int], None]) -> None:
    errors: list[BaseException] = []

    def guarded(number: int) -> None:
        try:
            work(number)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=guarded, args=(number,)) for number in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []


def test_many_threads_few_descriptors(folder: Path) -> None:
    calls = Calls([errno.ESTALE] * 3)
    with FileSource(folder, calls=calls, max_open=2, retries=9) as source:

        def work(number: int) -> None:
            for turn in range(60):
                name = "abcdef"[(number + turn) % 6]
                assert read(source, name, 0, 9) == (name.encode() + DATA)[:9]

        in_threads(4, work)
    assert calls.opened == []
