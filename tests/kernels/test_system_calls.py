"""Each call does the same, or what its docstring says, where the system lacks it."""

from __future__ import annotations

import errno
import os
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from quantload.kernels import system_calls

CALLS = ("preadv", "pread", "pwrite", "posix_fadvise", "posix_fallocate", "fdatasync", "sched_getaffinity", "geteuid")


@pytest.fixture(params=[False, True], ids=["as here", "without"])
def without(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Whether the calls are taken away."""
    if request.param:
        for name in (*CALLS, "O_DIRECTORY"):
            monkeypatch.delattr(os, name, raising=False)
    return bool(request.param)


@pytest.fixture
def file(tmp_path: Path) -> Any:
    path = tmp_path / "file"
    path.write_bytes(bytes(range(200)))
    fd = system_calls.open_plain(path, os.O_RDWR)
    yield fd
    os.close(fd)


@pytest.mark.usefixtures("without")
def test_reads_and_writes_at_a_position_leave_the_position_of_the_file(file: int) -> None:
    buffer = memoryview(bytearray(10))
    assert os.read(file, 3) == bytes([0, 1, 2])
    assert system_calls.preadv(file, [buffer], 195) == 5
    assert bytes(buffer) == bytes([*range(195, 200), *[0] * 5])
    assert system_calls.pwrite(file, b"abc", 100) == 3
    assert system_calls.pread(file, 5, 99) == b"\x63abc\x67"
    assert os.read(file, 2) == bytes([3, 4])


@pytest.mark.usefixtures("without")
def test_threads_that_read_one_file_at_several_positions_get_what_is_there(file: int) -> None:
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda at: system_calls.pread(file, 1, at)[0], [*range(200)] * 5))
    assert found == [*range(200)] * 5


@pytest.mark.usefixtures("without")
def test_room_is_reserved_and_data_and_names_are_forced_to_the_disk(file: int, tmp_path: Path) -> None:
    system_calls.reserve(file, 5000)
    system_calls.advise(file, 0, 0, system_calls.DONTNEED)
    system_calls.sync_data(file)
    system_calls.sync_folder(tmp_path)
    assert os.fstat(file).st_size == 5000


def test_where_nobody_says_how_many_cores_a_process_may_use_all_count(without: bool) -> None:
    assert system_calls.cores() == (os.cpu_count() if without else len(os.sched_getaffinity(0)))


def test_whose_a_file_is_counts_where_files_say_so(without: bool, tmp_path: Path) -> None:
    tmp_path.chmod(0o777)
    status = tmp_path.stat()
    strange = os.stat_result((*status[:4], status.st_uid + 1, *status[5:]))
    assert system_calls.user_owns(status)
    assert system_calls.user_owns(strange) == without
    assert system_calls.others_may_write(status) != without


def test_a_link_is_not_followed_where_the_system_cannot_refuse_it_either(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    link = tmp_path / "link"
    link.symlink_to(tmp_path / "target")
    (tmp_path / "target").write_text("x")
    for flag in (system_calls.O_NOFOLLOW, 0):
        monkeypatch.setattr(system_calls, "O_NOFOLLOW", flag)
        with pytest.raises(OSError, match="link") as raised:
            system_calls.open_plain(link, os.O_RDONLY, follow=False)
        assert raised.value.errno == errno.ELOOP
    os.close(system_calls.open_plain(link, os.O_RDONLY))


def test_limits_are_not_known_where_there_is_no_module_for_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(system_calls, "_resource", None)
    assert system_calls.resource_limit("RLIMIT_AS") is None


class Locked(ModuleType):
    """`msvcrt` with the locks of one other process, which lets go of them after some tries."""

    LK_NBLCK, LK_UNLCK = 2, 0

    def __init__(self, tries: int, code: int = errno.EACCES) -> None:
        super().__init__("msvcrt")
        self.tries, self.code = tries, code
        self.calls: list[tuple[int, int, int]] = []

    def locking(self, fd: int, mode: int, nbytes: int) -> None:
        self.calls.append((mode, os.lseek(fd, 0, os.SEEK_CUR), nbytes))
        self.tries -= 1
        if self.tries >= 0:
            raise OSError(self.code, "held")


def test_bytes_behind_the_file_are_locked_where_files_cannot_be(file: int, monkeypatch: pytest.MonkeyPatch) -> None:
    locked = Locked(tries=2)
    monkeypatch.setattr(system_calls, "_fcntl", None)
    monkeypatch.setitem(sys.modules, "msvcrt", locked)
    with pytest.raises(BlockingIOError):
        system_calls.lock(file)
    system_calls.lock(file, wait=True)
    system_calls.unlock(file)
    assert [mode for mode, *_ in locked.calls] == [2, 2, 2, 0]
    assert {(at > 1 << 20, nbytes) for _, at, nbytes in locked.calls} == {(True, 1)}
    assert os.lseek(file, 0, os.SEEK_CUR) == 0
    with pytest.raises(OSError, match="together") as raised:
        system_calls.lock(file, shared=True)
    assert raised.value.errno == errno.ENOLCK


def test_a_file_that_cannot_be_locked_is_not_taken_for_one_that_another_holds(
    file: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(system_calls, "_fcntl", None)
    monkeypatch.setitem(sys.modules, "msvcrt", Locked(tries=9, code=errno.EINVAL))
    with pytest.raises(OSError, match="held") as raised:
        system_calls.lock(file, wait=True)
    assert not isinstance(raised.value, BlockingIOError)
