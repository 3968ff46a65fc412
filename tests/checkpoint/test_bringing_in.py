"""Weights that are read while something else goes on: which, how far, and that a load knows what was cold before."""

from __future__ import annotations

import errno
import os
import sys
import threading
from pathlib import Path

import pytest
from quantload.checkpoint import bringing_in as module
from quantload.checkpoint.bringing_in import bringing_in
from quantload.checkpoint.files import FolderFiles
from quantload.checkpoint.folder import Checkpoint
from quantload.checkpoint.source import FileCalls, FileSource
from quantload.kernels.system_calls import bring_in

MIB = 1 << 20
ALL = 1 << 40


class Kernel(FileCalls):
    """Answers like a kernel that has nothing in its page cache."""

    def preadv(self, fd: int, buffers: list[memoryview], offset: int, flags: int = 0) -> int:
        raise OSError(errno.EAGAIN, os.strerror(errno.EAGAIN))

    def advise(self, fd: int, offset: int, length: int, advice: int) -> None:
        pass


class Warm(Kernel):
    """One that has all of it there."""

    def preadv(self, fd: int, buffers: list[memoryview], offset: int, flags: int = 0) -> int:
        return 1


class Brought:
    """Notes what is brought in, and says when it was so many bytes."""

    def __init__(self, wanted: int, failing: bool = False) -> None:
        self.parts: list[tuple[int, int]] = []
        self.done = threading.Event()
        self._wanted, self._failing = wanted, failing

    def __call__(self, fd: int, offset: int, length: int) -> int:
        self.parts.append((offset, length))
        if sum(part for _, part in self.parts) >= self._wanted:
            self.done.set()
        if self._failing:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return length


@pytest.fixture
def checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Checkpoint:
    monkeypatch.setattr(module, "FileCalls", Kernel)
    (tmp_path / "config.json").write_text("{}")
    with (tmp_path / "model.safetensors").open("wb") as file:
        file.truncate(70 * MIB)
    return Checkpoint(tmp_path, "m")


def windows(checkpoint: Checkpoint, calls: FileCalls) -> tuple[bool, ...]:
    """What a source of the checkpoint takes for cold."""
    files = checkpoint.files
    assert isinstance(files, FolderFiles)
    with FileSource(checkpoint.root, calls=calls, cold_before=files.cold_before) as source:
        source.size("model.safetensors")
        cache = source._files["model.safetensors"].cache
        assert cache is not None
        return cache.cold


@pytest.mark.parametrize(
    ("most", "parts"),
    [
        (ALL, [(0, 32 * MIB), (32 * MIB, 32 * MIB), (64 * MIB, 6 * MIB)]),
        (40 * MIB, [(0, 32 * MIB), (32 * MIB, 8 * MIB)]),
    ],
)
def test_what_is_cold_is_read_from_the_first_byte_on(
    checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch, most: int, parts: list[tuple[int, int]]
) -> None:
    brought = Brought(sum(length for _, length in parts))
    monkeypatch.setattr(module, "bring_in", brought)
    with bringing_in(checkpoint, most):
        brought.done.wait()
    assert brought.parts == parts
    assert all(windows(checkpoint, Warm()))  # as it was before


def test_a_file_that_was_replaced_meanwhile_is_looked_at_anew(
    checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "bring_in", lambda *_: 0)
    with bringing_in(checkpoint, ALL):
        other = checkpoint.root / "other"
        other.write_bytes(bytes(MIB))
        other.replace(checkpoint.root / "model.safetensors")
    assert windows(checkpoint, Warm()) == (False,)


def test_nothing_is_read_of_what_is_in_the_page_cache(checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    brought = Brought(0)
    monkeypatch.setattr(module, "FileCalls", Warm)
    monkeypatch.setattr(module, "bring_in", brought)
    with bringing_in(checkpoint, ALL):
        assert [each.name for each in threading.enumerate() if each.name == "quantload-bring-in"] == []
    assert brought.parts == []


def test_what_cannot_be_read_is_left_to_the_load(checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    failing = Brought(0, failing=True)
    monkeypatch.setattr(module, "bring_in", failing)
    with bringing_in(checkpoint, ALL):
        failing.done.wait()
    assert failing.parts == [(0, 32 * MIB)]
    (checkpoint.root / "model.safetensors").unlink()
    with bringing_in(checkpoint, ALL):
        pass
    assert len(failing.parts) == 1


def test_an_error_inside_ends_the_reading(checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    reached, inside_ended = threading.Event(), threading.Event()

    def wait(fd: int, offset: int, length: int) -> int:
        reached.set()
        inside_ended.wait()
        return length

    def fail() -> None:
        with bringing_in(checkpoint, ALL):
            reached.wait()
            inside_ended.set()
            raise KeyboardInterrupt

    monkeypatch.setattr(module, "bring_in", wait)
    with pytest.raises(KeyboardInterrupt):
        fail()
    assert [each.name for each in threading.enumerate() if each.name == "quantload-bring-in"] == []


@pytest.mark.skipif(sys.platform != "linux", reason="the call is Linux's")
def test_the_system_call_says_how_much_it_read(tmp_path: Path) -> None:
    (tmp_path / "f").write_bytes(bytes(10_000))
    with (tmp_path / "f").open("rb") as file:
        assert bring_in(file.fileno(), 4096, MIB) == 10_000 - 4096
        assert bring_in(file.fileno(), 10_000, MIB) == 0
        assert file.tell() == 0
