"""Disks that are full or fail: real ones that are too small, a limit on the size of files, and injected errors."""

from __future__ import annotations

import contextlib
import errno
import os
import random
import resource
import shutil
import subprocess
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from faults_files import run
from faults_subject import ERROR, RIGHT, Expected, Row, Subject, is_looking
from faults_subject import outcome_of as judged

WAYS = ("load with a cache", "convert")
CALLS = (
    *("pwrite", "write", "fsync", "fdatasync", "posix_fallocate", "truncate", "ftruncate"),
    *("open", "rename", "replace", "mkdir", "unlink", "rmdir", "listdir", "stat"),
)
ERRORS = (errno.ENOSPC, errno.EIO, errno.EDQUOT)
MOST_BYTES = 900_000
"""More than either way writes."""


def disks(subject: Subject, expected: Expected, tries: int, seed: int) -> Iterator[Row]:
    """So many sizes of a file system and of a file, and so many injected errors of each call, in each way."""
    choose = random.Random(seed)
    for way in WAYS:
        yield _trial("a disk of 0 to 900 KB", way, subject, expected, tries, _small_disk, choose)
        yield _trial("files of at most 0 to 900 KB", way, subject, expected, tries, _small_files, choose)
        for call in CALLS:
            yield _trial(f"{call} fails", way, subject, expected, tries, _failing_call(call), choose)


Broken = Callable[[Path, random.Random], contextlib.AbstractContextManager[Any]]


def _trial(
    what: str, way: str, subject: Subject, expected: Expected, tries: int, broken: Broken, choose: random.Random
) -> Row:
    """A load goes on without its cache, a conversion says what is wrong; the next run does what it should."""
    row, place = Row("disks that are full or fail", what, way), subject.root / "disk"
    right = (expected.folder if way == "convert" else expected.model,)
    for _ in range(tries):
        shutil.rmtree(place, ignore_errors=True)
        place.mkdir()
        try:
            with broken(place, choose):
                outcome, wrong = judged(lambda: run(way, subject.old, place), right)
        except PermissionError:
            row.outcomes["not permitted here"] += 1
            return row
        wrong = wrong + expected.leftovers(place / "cache", place / "out")
        if way != "convert" and outcome == ERROR:
            wrong.append("a cache that cannot be written to ended the load")
        # A conversion whose folder has its name is finished, though the disk did not say that it keeps the name.
        if way != "convert" or not (place / "out").exists():
            again, wrong_again = judged(lambda: run(way, subject.old, place), right)
            wrong += wrong_again or ([] if again == RIGHT else ["a retry failed"])
            wrong += expected.leftovers(place / "cache", place / "out")
        row.add(outcome, wrong)
    return row


@contextlib.contextmanager
def _small_disk(place: Path, choose: random.Random) -> Iterator[None]:
    """A file system of its own at `place`; afterwards what is on it lies in an ordinary folder of that name."""
    size = choose.randrange(0, MOST_BYTES) >> 12 << 12
    if os.geteuid() != 0:
        raise PermissionError
    options = f"size={max(size, 4096)}"
    if subprocess.run(["mount", "-t", "tmpfs", "-o", options, "none", place], capture_output=True).returncode:
        raise PermissionError
    left = place.with_name("left on the disk")
    try:
        yield
        shutil.rmtree(left, ignore_errors=True)
        shutil.copytree(place, left, symlinks=True)
    finally:
        subprocess.run(["umount", place], check=True)
    place.rmdir()
    left.rename(place)


@contextlib.contextmanager
def _small_files(place: Path, choose: random.Random) -> Iterator[None]:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (choose.randrange(0, MOST_BYTES), hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def _failing_call(name: str) -> Broken:
    @contextlib.contextmanager
    def broken(place: Path, choose: random.Random) -> Iterator[None]:
        """One call on what lies below `place` fails, or all from it on."""
        real, number = getattr(os, name), choose.choice(ERRORS)
        first, last, lock, made = choose.randint(1, 12), choose.choice((1, 1 << 30)), threading.Lock(), [0]

        def call(*arguments: Any, **named: Any) -> Any:
            if _is_below(arguments[0], place) and not is_looking():
                with lock:
                    made[0] += 1
                    fails = first <= made[0] < first + last
                if fails:
                    raise OSError(number, os.strerror(number))
            return real(*arguments, **named)

        setattr(os, name, call)
        try:
            yield
        finally:
            setattr(os, name, real)

    return broken


def _is_below(path: Any, place: Path) -> bool:
    if isinstance(path, int):
        try:
            path = os.readlink(f"/proc/self/fd/{path}")
        except OSError:
            return False
    return str(path).startswith(str(place))
