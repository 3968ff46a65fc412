"""Files that change, and reads that fail, at random moments of a load, a load with a cache, and a conversion."""

from __future__ import annotations

import contextlib
import errno
import os
import random
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from faults_subject import (
    ERROR,
    RIGHT,
    SHARDS,
    Expected,
    Row,
    Subject,
    convert,
    digest_of_folder,
    digest_of_model,
    load,
)
from faults_subject import outcome_of as judged
from quantload.checkpoint import retry
from quantload.checkpoint.source import FileCalls

Change = Callable[[Path, Path], None]


def _replace(*names: str) -> Change:
    def change(folder: Path, new: Path) -> None:
        for name in names:
            shutil.copy2(new / name, folder / f"{name}.tmp")
            os.replace(folder / f"{name}.tmp", folder / name)

    return change


def _write_in_place(folder: Path, new: Path) -> None:
    for name in SHARDS:
        status = (folder / name).stat()
        with (folder / name).open("r+b") as file:
            file.write((new / name).read_bytes())
        os.utime(folder / name, ns=(status.st_atime_ns, status.st_mtime_ns))


def _truncate(folder: Path, _: Path) -> None:
    os.truncate(folder / SHARDS[1], (folder / SHARDS[1]).stat().st_size // 3)


def _remove(folder: Path, _: Path) -> None:
    (folder / SHARDS[0]).unlink()


CHANGES: dict[str, Change] = {
    "one shard replaced": _replace(SHARDS[1]),
    "all shards replaced": _replace(*SHARDS),
    "shards written in place": _write_in_place,
    "a shard truncated": _truncate,
    "a shard removed": _remove,
}
WAYS = ("load", "load with a cache", "convert")


def run(way: str, folder: Path, place: Path) -> str:
    """One load or conversion of `folder`; what it leaves goes below `place`. The digest of what came out."""
    if way == "convert":
        convert(folder, place / "out")
        return digest_of_folder(place / "out")
    return digest_of_model(load(folder, place / "cache" if way == "load with a cache" else None))


class _Reads:
    """Counts the reads of a source, and does something before one of them."""

    def __init__(self, at: int, do: Callable[[], None]) -> None:
        self.count = 0
        self._at, self._do = at, do
        self._lock = threading.Lock()

    def one_more(self) -> None:
        with self._lock:
            self.count += 1
            if self.count == self._at:
                self._do()


@contextlib.contextmanager
def patched(**calls: Callable[..., Any]) -> Iterator[None]:
    """Meanwhile sources make other system calls."""
    before = {name: getattr(FileCalls, name) for name in calls}
    for name, call in calls.items():
        setattr(FileCalls, name, call)
    try:
        yield
    finally:
        for name, call in before.items():
            setattr(FileCalls, name, call)


@contextlib.contextmanager
def at_read(at: int, do: Callable[[], None]) -> Iterator[_Reads]:
    """Do something before the read of that number."""
    reads, real = _Reads(at, do), FileCalls.preadv

    def preadv(self: FileCalls, fd: int, buffers: list[memoryview], offset: int, flags: int = 0) -> int:
        reads.one_more()
        return real(self, fd, buffers, offset, flags)

    with patched(preadv=preadv):
        yield reads


def changing(subject: Subject, expected: Expected, tries: int, seed: int) -> Iterator[Row]:
    """Each change so many times in each way, at a random read."""
    choose, place, folder = random.Random(seed), subject.root / "place", subject.root / "model"
    for way in WAYS:
        shutil.rmtree(place, ignore_errors=True)
        with at_read(0, lambda: None) as reads:
            run(way, subject.old, place)
        for name, change in CHANGES.items():
            row = Row("files that change", name, way)
            for _ in range(tries):
                for each in (place, folder):
                    shutil.rmtree(each, ignore_errors=True)
                shutil.copytree(subject.old, folder)
                with at_read(choose.randint(1, reads.count), lambda change=change: change(folder, subject.new)):  # type: ignore[misc]
                    outcome, wrong = judged(lambda way=way: run(way, folder, place), ())  # type: ignore[misc]
                    # Changed before anything was looked at, it is a checkpoint like any other.
                if outcome == "other bytes":
                    outcome, wrong = RIGHT, _compared(way, folder, place)
                row.add(outcome, [*wrong, *_retried(way, name, subject, folder, place)])
            yield row


def _compared(way: str, folder: Path, place: Path) -> list[str]:
    """Whether what was made is what the files as they are now give."""
    now = run(way, folder, place.with_name("again")) if way == "convert" else run("load", folder, place)
    made = digest_of_folder(place / "out") if way == "convert" else run(way, folder, place)
    shutil.rmtree(place.with_name("again"), ignore_errors=True)
    return [] if made == now else ["what was made is of no version of the files"]


def _retried(way: str, name: str, subject: Subject, folder: Path, place: Path) -> list[str]:
    """Whether a second run, without a change, has the right bytes."""
    if name in ("a shard truncated", "a shard removed"):
        for shard in SHARDS:
            shutil.copy2(subject.new / shard, folder / shard)
    shutil.rmtree(place / "out", ignore_errors=True)
    fresh = place.with_name("fresh")
    outcome, wrong = judged(lambda: run(way, folder, place), (run(way, folder, fresh),))
    shutil.rmtree(fresh, ignore_errors=True)
    return [f"retry: {each}" for each in wrong] or ([] if outcome == RIGHT else ["a retry failed"])


def _raising(number: int, times: int) -> tuple[Callable[[], None], list[int]]:
    left = [times]

    def fail() -> None:
        if left[0]:
            left[0] -= 1
            raise OSError(number, os.strerror(number))

    return fail, left


FOREVER = 1 << 30
PASSING = {"EIO": errno.EIO, "ESTALE": errno.ESTALE, "ETIMEDOUT": errno.ETIMEDOUT, "EINTR": errno.EINTR}
FAILURES: dict[str, tuple[int, int, str]] = {
    **{f"{name} once": (number, 1, RIGHT) for name, number in PASSING.items()},
    **{f"{name} four times": (number, 4, RIGHT) for name, number in PASSING.items()},
    **{f"{name} for ever": (number, FOREVER, ERROR) for name, number in PASSING.items()},
    "EACCES once": (errno.EACCES, 1, ERROR),
    "ENXIO once": (errno.ENXIO, 1, ERROR),
}


def failing(subject: Subject, expected: Expected, tries: int, seed: int) -> Iterator[Row]:
    """Each error so many times in each way, from a random open, look or read on."""
    choose, place = random.Random(seed), subject.root / "place"
    pause, retry.FIRST_DELAY = retry.FIRST_DELAY, 1e-5
    try:
        for way in WAYS:
            right = (expected.folder if way == "convert" else expected.model,)
            calls = {name: _count(name, way, subject, place) for name in ("open", "stat", "preadv")}
            for name, (number, times, wanted) in FAILURES.items():
                row = Row("reads that fail", name, way)
                for turn in range(tries):
                    call = ("preadv", "open", "stat")[turn % 3]
                    shutil.rmtree(place, ignore_errors=True)
                    with failing_call(call, choose.randint(1, calls[call]), number, times):
                        outcome, wrong = judged(lambda way=way: run(way, subject.old, place), right)  # type: ignore[misc]
                    if outcome != wanted:
                        wrong = [*wrong, f"{outcome} for {name} in {call}, which should be {wanted}"]
                    wrong += expected.leftovers(place / "cache", place / "out")
                    if outcome == ERROR:
                        wrong += _again(way, subject, place, right)
                    row.add(outcome, wrong)
                yield row
            yield from _odd_reads(way, subject, place, right, tries, choose)
    finally:
        retry.FIRST_DELAY = pause


def _again(way: str, subject: Subject, place: Path, right: tuple[str, ...]) -> list[str]:
    outcome, wrong = judged(lambda: run(way, subject.old, place), right)
    return wrong or ([] if outcome == RIGHT else ["a retry failed"])


def _count(name: str, way: str, subject: Subject, place: Path) -> int:
    shutil.rmtree(place, ignore_errors=True)
    with failing_call(name, FOREVER, errno.EIO, 1) as reads:
        run(way, subject.old, place)
    return reads.count


@contextlib.contextmanager
def failing_call(name: str, at: int, number: int, times: int) -> Iterator[_Reads]:
    """Fail so many times in a row, from the call of that number on."""
    fail, _ = _raising(number, times)
    reads, real, on = _Reads(at, lambda: on.append(True)), getattr(FileCalls, name), list[bool]()

    def call(self: FileCalls, *arguments: Any, **named: Any) -> Any:
        reads.one_more()
        if on:
            fail()
        return real(self, *arguments, **named)

    with patched(**{name: call}):
        yield reads


def _odd_reads(
    way: str, subject: Subject, place: Path, right: tuple[str, ...], tries: int, choose: random.Random
) -> Iterator[Row]:
    """Reads of random lengths, late ones, and ones that end too early."""
    real = FileCalls.preadv

    def short(self: FileCalls, fd: int, buffers: list[memoryview], offset: int, flags: int = 0) -> int:
        whole = len(buffers[0])
        return real(self, fd, [buffers[0][: choose.randint(1, whole)] if whole else buffers[0]], offset, flags)

    def slow(self: FileCalls, fd: int, buffers: list[memoryview], offset: int, flags: int = 0) -> int:
        time.sleep(choose.random() * 0.004)
        return real(self, fd, buffers, offset, flags)

    for name, call in {"reads of random lengths": short, "slow reads": slow}.items():
        row = Row("reads that fail", name, way)
        for _ in range(tries):
            shutil.rmtree(place, ignore_errors=True)
            with patched(preadv=call):
                row.add(*judged(lambda: run(way, subject.old, place), right))
        yield row
