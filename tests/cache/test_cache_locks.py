"""Locks that end with the process that holds them."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from quantload.cache.locks import FileLock

HOLDER = "import fcntl, sys; f = open(sys.argv[1], 'r+'); fcntl.flock(f, fcntl.LOCK_EX); print(flush=True); input()"


@pytest.fixture
def path(tmp_path: Path) -> Path:
    (tmp_path / "lock").touch()
    return tmp_path / "lock"


def test_many_share_and_one_excludes(path: Path) -> None:
    first, second = FileLock.shared(path), FileLock.shared(path)
    assert first is not None
    assert second is not None
    assert FileLock.exclusive(path) is None
    first.release()
    assert FileLock.exclusive(path) is None
    second.release()
    second.release()
    alone = FileLock.exclusive(path)
    assert alone is not None
    assert FileLock.shared(path) is None
    alone.release()
    assert FileLock.shared(path) is not None


def test_a_file_that_is_not_there_cannot_be_locked_unless_it_is_made(tmp_path: Path) -> None:
    assert FileLock.shared(tmp_path / "lock") is None
    assert FileLock.exclusive(tmp_path / "lock") is None
    assert FileLock.exclusive(tmp_path / "lock", create=True) is not None
    assert FileLock.exclusive(tmp_path / "folder" / "lock", create=True) is None


def test_a_lock_on_a_file_that_was_renamed_meanwhile_is_none(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def rename_first(fd: int, kind: int) -> None:
        path.rename(path.with_name("elsewhere"))

    monkeypatch.setattr("fcntl.flock", rename_first)
    assert FileLock.exclusive(path) is None


def test_it_ends_with_its_process(path: Path) -> None:
    with subprocess.Popen([sys.executable, "-c", HOLDER, path], stdin=-1, stdout=-1) as holder:
        assert holder.stdout is not None
        holder.stdout.readline()
        assert FileLock.shared(path) is None
        holder.kill()
        holder.wait()
        assert FileLock.shared(path) is not None
