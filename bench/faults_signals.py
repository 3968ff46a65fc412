"""Signals at random moments of a load that writes a cache, of one that reads it, and of a conversion.

Each try is a process of its own, forked from this one, which has imported everything and has run nothing: what torch's
threads have done cannot be forked.
"""

from __future__ import annotations

import os
import random
import shutil
import signal
import statistics
import time
import traceback
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

from faults_files import run
from faults_subject import Expected, Row, Subject, entries
from quantload import QuantloadError

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGKILL)
DONE, REFUSED, INTERRUPTED, RAW = 0, 3, 130, 4
_SECONDS = 60.0


def signals(subject: Subject, tries: int, seed: int) -> Iterator[Row]:
    """Each signal so many times in each way, between the beginning and a little after the end."""
    choose, place = random.Random(seed), subject.root / "signals"
    place.mkdir()
    facts = _forked(lambda: _measured(subject, place / "facts"), place)
    assert facts == DONE, (place / "said").read_text()
    expected = Expected(*(place / "facts").read_text().split())
    for way, source in (("load that writes a cache", None), ("load from a cache", "written"), ("convert", None)):
        if source:
            whole = place / source
            assert _forked(partial(_to_the_end, _way(way), subject, whole, expected), place) == DONE
        lasts = statistics.median(_timed(way, subject, place, source, expected) for _ in range(3))
        for number in SIGNALS:
            row = Row("signals", number.name, way)
            for _ in range(tries):
                row.add(*_one(way, subject, place, source, expected, number, choose.uniform(0, lasts * 1.1)))
            yield row
    shutil.rmtree(place)


def _way(way: str) -> str:
    return "convert" if way == "convert" else "load with a cache"


def _prepare(place: Path, source: str | None) -> Path:
    work = place / "work"
    shutil.rmtree(work, ignore_errors=True)
    if source:
        shutil.copytree(place / source, work)
    return work


def _timed(way: str, subject: Subject, place: Path, source: str | None, expected: Expected) -> float:
    work = _prepare(place, source)
    start = time.perf_counter()
    code = _forked(lambda: _to_the_end(_way(way), subject, work, expected), place)
    assert code == DONE, (place / "said").read_text()
    return time.perf_counter() - start


def _one(
    way: str,
    subject: Subject,
    place: Path,
    source: str | None,
    expected: Expected,
    number: signal.Signals,
    after: float,
) -> tuple[str, list[str]]:
    """One process that gets the signal after so many seconds, what it leaves, and a second one that runs to its end."""
    work, wrong = _prepare(place, source), []
    code = _forked(lambda: _to_the_end(_way(way), subject, work, expected), place, number, after)
    outcome = {DONE: "finished before", INTERRUPTED: "interrupted", -number: "killed"}.get(code, f"code {code}")
    if outcome.startswith("code"):
        wrong.append(f"{outcome}: {(place / 'said').read_text()[-300:]}")
    wrong += expected.leftovers(work / "cache", work / "out")
    if source and not entries(work / "cache"):
        wrong.append("the entry that was read is gone")
    if not (work / "out").exists():
        code = _forked(lambda: _to_the_end(_way(way), subject, work, expected), place)
        if code != DONE:
            wrong.append(f"a retry ended with {code}: {(place / 'said').read_text()[-300:]}")
        wrong += expected.leftovers(work / "cache", work / "out")
        wrong += _left(work)
    return outcome, wrong


def _left(work: Path) -> list[str]:
    """After a run to the end nothing is left that a killed one began."""
    names = sorted(path.name for folder in (work, work / "cache") if folder.is_dir() for path in folder.iterdir())
    odd = [name for name in names if name not in ("cache", "lock", "out") and len(name) != 64]
    return [f"left behind: {', '.join(odd)}"] if odd else []


def _to_the_end(way: str, subject: Subject, work: Path, expected: Expected) -> None:
    digest = run(way, subject.old, work)
    if digest != (expected.folder if way == "convert" else expected.model):
        raise AssertionError("other bytes than the right ones")


def _measured(subject: Subject, facts: Path) -> None:
    expected = subject.measure()
    facts.write_text(f"{expected.model} {expected.folder} {expected.entry}")


def _forked(do: Callable[[], None], place: Path, number: int | None = None, after: float = 0.0) -> int:
    """How a process ends that does something, and gets a signal after so many seconds: an exit code, or -signal."""
    child = os.fork()
    if child == 0:
        os._exit(_code_of(do, place))
    if number is not None:
        time.sleep(after)
        os.kill(child, number)
    end = time.monotonic() + _SECONDS
    while time.monotonic() < end:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.002)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    (place / "said").write_text(f"it did not end within {_SECONDS:.0f} s")
    return -1


def _code_of(do: Callable[[], None], place: Path) -> int:
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell starts what runs in its background without
    try:
        try:
            do()
        except KeyboardInterrupt:
            return INTERRUPTED
        except QuantloadError:
            (place / "said").write_text(traceback.format_exc())
            return REFUSED
        except BaseException:
            (place / "said").write_text(traceback.format_exc())
            return RAW
        return DONE
    except KeyboardInterrupt:  # while it was on its way out
        return INTERRUPTED
