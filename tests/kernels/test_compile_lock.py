"""What one process compiles is left to it by the others, unless it was killed or takes too long."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from quantload.kernels.cpu import compile_lock
from quantload.kernels.cpu.compile_lock import CompileLock

HOLDER = """
import sys
from quantload.kernels.cpu.compile_lock import CompileLock
with CompileLock(sys.argv[1]) as lock:
    print(lock.take(), flush=True)
    sys.stdin.read()
"""


@pytest.fixture
def path(tmp_path: Path) -> str:
    """Of a lock in a folder that does not exist yet."""
    return str(tmp_path / "cache" / "kernel.lock")


@pytest.mark.parametrize("target", ["precious", "nowhere"])
def test_a_link_in_its_place_is_not_followed(path: str, target: str, tmp_path: Path) -> None:
    (tmp_path / "precious").write_text("precious")
    os.makedirs(os.path.dirname(path))
    os.symlink(tmp_path / target, path)
    with CompileLock(path) as lock:
        assert lock.take()  # there is nothing to wait for
    assert sorted(os.listdir(tmp_path)) == ["cache", "precious"]
    assert os.path.islink(path)
    assert (tmp_path / "precious").read_text() == "precious"


def test_one_holds_it_and_nothing_is_left_of_it(path: str) -> None:
    before = os.listdir("/proc/self/fd")
    with CompileLock(path) as first, CompileLock(path) as second:
        assert first.take()
        assert not second.take()
    assert not os.path.exists(path)
    with CompileLock(path) as third:
        assert third.take()
    assert len(os.listdir("/proc/self/fd")) == len(before)


def test_it_ends_with_a_process_that_is_killed(path: str) -> None:
    command = [sys.executable, "-c", HOLDER, path]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "True\n"
        with CompileLock(path) as lock:
            assert not lock.take()
            holder.kill()
            holder.wait()
            assert lock.take()


def test_nobody_waits_for_ever(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compile_lock, "WAIT_SECONDS", 0.1)
    with CompileLock(path) as holder, CompileLock(path) as waiting:
        assert holder.take()
        waiting.wait()
        assert os.path.exists(path)


def test_who_waits_for_long_says_so_once(
    path: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "quantload")
    monkeypatch.setattr(logging.getLogger("quantload"), "handlers", [])  # those of tests of the command line
    monkeypatch.setattr(compile_lock, "WAIT_SECONDS", 60.0)
    monkeypatch.setattr(compile_lock, "NOTICE_SECONDS", 2.5)
    monkeypatch.setattr(compile_lock, "_waiting", compile_lock._Waiting())
    with CompileLock(path) as holder, CompileLock(path) as waiting:
        assert holder.take()
        polls: list[int] = []

        def sleep(seconds: float) -> None:
            polls.append(len(caplog.records))
            if len(polls) == 6:
                holder.release()

        monkeypatch.setattr(compile_lock, "POLL_SECONDS", 1.0)
        monkeypatch.setattr(time, "sleep", sleep)
        waiting.wait()
    assert polls == [0, 0, 0, 1, 1, 1]
    (record,) = caplog.records
    assert record.levelname == "INFO"
    assert record.getMessage().startswith("waiting for another process that compiles CPU kernels; ")


def test_nobody_waits_where_nothing_can_be_locked(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with CompileLock(str(tmp_path / "file" / "kernel.lock")) as lock:
        assert lock.take()
