"""Entries of a cache that are spoilt in every way files can be, and many that are written, read and removed at once."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from faults_files import run
from faults_subject import RIGHT, Expected, Row, Subject, entries
from faults_subject import outcome_of as judged
from quantload import LoadOptions
from quantload.cache.checksums import Checksums
from quantload.cache.store import Store
from quantload.checkpoint.source import read_bytes
from quantload.errors import DamagedEntryError

WRITERS, KEYS = 4, 3
Spoil = Callable[[Path, random.Random], None]


def _flip(path: Path, choose: random.Random) -> None:
    data = bytearray(path.read_bytes())
    data[choose.randrange(len(data))] ^= 1 << choose.randrange(8)
    path.write_bytes(data)


def _cut(path: Path, choose: random.Random) -> None:
    os.truncate(path, choose.randrange(path.stat().st_size))


def _grow(path: Path, choose: random.Random) -> None:
    with path.open("ab") as file:
        file.write(choose.randbytes(choose.randint(1, 5000)))


def _blank(path: Path, choose: random.Random) -> None:
    """A stretch of zeros, as a machine that lost its power leaves it."""
    start = choose.randrange(path.stat().st_size)
    with path.open("r+b") as file:
        file.seek(start)
        file.write(bytes(min(choose.randint(1, 4096), path.stat().st_size - start)))


def _garble(path: Path, choose: random.Random) -> None:
    path.write_bytes(choose.randbytes(path.stat().st_size))


def _remove(path: Path, _: random.Random) -> None:
    path.unlink()


def _swap(path: Path, choose: random.Random) -> None:
    other = choose.choice([each for each in sorted(path.parent.iterdir()) if each.name not in (path.name, "lock")])
    content = other.read_bytes()
    other.write_bytes(path.read_bytes())
    path.write_bytes(content)


SPOILS: dict[str, Spoil] = {
    "a bit flipped": _flip,
    "cut off": _cut,
    "bytes appended": _grow,
    "a stretch of zeros": _blank,
    "random bytes": _garble,
    "removed": _remove,
    "exchanged with another": _swap,
}


def spoilt(subject: Subject, expected: Expected, tries: int, seed: int) -> Iterator[Row]:
    """So many spoilt files, all kinds in turn, each of a random file of an entry: the load has the right bytes."""
    choose, place = random.Random(seed), subject.root / "spoilt"
    whole = subject.root / "whole"
    run("load with a cache", subject.old, whole)
    for number, (name, spoil) in enumerate(SPOILS.items()):
        row = Row("cache entries", f"a file of it: {name}", "load from a cache")
        for _ in range(number, tries, len(SPOILS)):
            shutil.rmtree(place, ignore_errors=True)
            shutil.copytree(whole, place)
            (entry,) = entries(place / "cache")
            spoil(choose.choice(sorted(path for path in entry.iterdir() if path.name != "lock")), choose)
            outcome, wrong = judged(lambda: run("load with a cache", subject.old, place), (expected.model,))
            if outcome != RIGHT:
                wrong.append(f"a spoilt entry ended the load: {outcome}")
            row.add(outcome, wrong + expected.leftovers(place / "cache", place / "out"))
        yield row


def racing(root: Path, count: int, seed: int, kills: int) -> Row:
    """Processes that write, find and replace entries of a few keys in one store, which has room for some of them.

    Now and then one is killed, and another one begins. Each entry that is found must be whole, and of one writer.
    """
    row = Row("cache entries", f"{WRITERS} processes at once, {kills} killed", "write, find and replace")
    root.mkdir()
    choose, left, serial = random.Random(seed), kills, 0
    running: dict[int, int] = {}
    share = max(1, count // WRITERS)
    while serial < WRITERS or running:
        while serial < WRITERS + kills - left and len(running) < WRITERS:
            running[_writer(root, serial, share)] = serial
            serial += 1
        if serial < WRITERS:
            running[_writer(root, serial, share)] = serial
            serial += 1
            continue
        if left:
            time.sleep(choose.uniform(0.02, 0.2))
            os.kill(choose.choice(list(running)), signal.SIGKILL)
            left -= 1
        child, status = os.wait()
        number = running.pop(child)
        if os.waitstatus_to_exitcode(status) not in (0, -signal.SIGKILL):
            row.wrong.append(f"a writer ended with {status}")
        _add_up(root / f"said-{number}", row)
    store = Store(root / "cache")
    odd = [path.name for path in store.root.iterdir() if path.name != "lock" and len(path.name) != 64]
    unfinished = store.reserve("f" * 64, 10)
    unfinished.discard()
    left_over = [path.name for path in store.root.iterdir() if path.name != "lock" and len(path.name) != 64]
    if left_over:
        row.wrong.append(f"left behind: {left_over}, before {odd}")
    shutil.rmtree(root)
    return row


def _add_up(said: Path, row: Row) -> None:
    for line in said.read_text().splitlines() if said.exists() else ():
        try:
            outcome, wrong = json.loads(line)
        except ValueError:
            continue  # the last words of one that was killed
        row.add(outcome, wrong)


def _writer(root: Path, number: int, share: int) -> int:
    child = os.fork()
    if child:
        return child
    code = 1
    try:
        store, choose = Store(root / "cache", limit=KEYS * 2500), random.Random(number)
        with (root / f"said-{number}").open("w", buffering=1) as said:
            for turn in range(share):
                key = "abcdef"[choose.randrange(KEYS)] * 64
                outcome, wrong = _published(store, key, number * 1000 + turn) if turn % 3 == 0 else _found(store, key)
                said.write(json.dumps([outcome, wrong]) + "\n")
        code = 0
    finally:
        os._exit(code)


def _published(store: Store, key: str, serial: int) -> tuple[str, list[str]]:
    content = f"{serial:08}".encode() * 100
    try:
        unfinished = store.reserve(key, 2000)
    except BlockingIOError:
        return "another one writes it", []
    except OSError as error:
        return "no room", [] if "in use" in str(error) else [f"reserve: {error}"]
    try:
        (unfinished.folder / "model").write_bytes(content)
        checksums = Checksums((0, len(content)))
        checksums.note(0, memoryview(content))
        unfinished.publish({"note.json": json.dumps(serial).encode()}, {"model": checksums})
    except BlockingIOError:
        return "another one is read", []
    except OSError as error:
        return "not published", [f"publish: {error}"]
    finally:
        unfinished.discard()
    return "published", []


def _found(store: Store, key: str) -> tuple[str, list[str]]:
    try:
        entry = store.find(key)
        if entry is None:
            return "none there", []
        with entry:
            serial, source = entry.read_json("note.json"), entry.source(LoadOptions())
            content = bytes(read_bytes(source, "model", 0, source.size("model")))
            source.close()
    except DamagedEntryError as error:
        return "damaged", [f"found: {error}"]
    whole = content == f"{serial:08}".encode() * 100
    return "found", [] if whole else ["an entry of two writers"]
