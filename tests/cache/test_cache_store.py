"""Entries: found, published, replaced, and removed when room is needed."""

from __future__ import annotations

import errno
import os
import shutil
import signal
import subprocess
import sys
from collections import namedtuple
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from forced_to_disk import Disk
from quantload.cache.checksums import Checksums
from quantload.cache.entry import CHECKSUMS, ENTRY, Entry
from quantload.cache.store import REMOVED, WRITING, Store
from quantload.errors import DamagedEntryError
from quantload.options import LoadOptions

A, B, C = "a" * 64, "b" * 64, "c" * 64
Usage = namedtuple("Usage", "total used free")


def publish(store: Store, key: str, content: bytes = b"tensors", nbytes: int = 1000) -> None:
    unfinished = store.reserve(key, nbytes)
    (unfinished.folder / "model").write_bytes(content)
    checksums = Checksums((0, len(content)))
    checksums.note(0, memoryview(content))
    try:
        unfinished.publish({"note.json": b'{"b": 1}'}, {"model": checksums})
    finally:
        unfinished.discard()


def find(store: Store, key: str) -> Entry:
    entry = store.find(key)
    assert entry is not None
    return entry


def use_at(store: Store, key: str, seconds: int) -> None:
    os.utime(store.root / key / "lock", (seconds, seconds))


def test_what_is_published_is_found(tmp_path: Path) -> None:
    store = Store(tmp_path / "cache")
    assert store.find(A) is None
    publish(store, A)
    assert store.find(B) is None
    entry = find(store, A)
    assert entry.read_json("note.json") == {"b": 1}
    assert entry.source(LoadOptions()).size("model") == 7
    assert entry.nbytes == 7 + 8
    assert sorted(path.name for path in store.root.iterdir()) == [A, "lock"]


def test_an_entry_is_on_the_disk_before_it_has_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    disk, store = Disk(monkeypatch), Store(tmp_path)
    unfinished = store.reserve(A, 1000)
    unfinished.publish({"note.json": b"{}"}, {})
    assert disk.renamed[-1] == A
    assert [Path(path).name for path in disk.lacking] == ["lock"]  # which says nothing of the entry
    assert disk.holds(store.root)


def test_an_entry_of_another_version_is_written_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = Store(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr("quantload.cache.entry.FORMAT_VERSION", 999)
        publish(store, A)
    with pytest.raises(DamagedEntryError, match="it is of version 999, 2 is read"):
        store.find(A)


def test_nobody_finds_what_is_not_published(tmp_path: Path) -> None:
    store = Store(tmp_path)
    unfinished = store.reserve(A, 1000)
    (unfinished.folder / "model").touch()
    assert store.find(A) is None
    unfinished.discard()
    assert store.find(A) is None
    assert [path.name for path in tmp_path.iterdir()] == ["lock"]


def test_one_writes_at_a_time(tmp_path: Path) -> None:
    store = Store(tmp_path)
    unfinished = store.reserve(A, 1000)
    with pytest.raises(BlockingIOError):
        store.reserve(A, 1000)
    other = store.reserve(B, 1000)
    unfinished.discard()
    store.reserve(A, 1000).discard()
    other.discard()


def test_a_new_entry_replaces_the_old_one_but_while_that_is_read(tmp_path: Path) -> None:
    store = Store(tmp_path)
    publish(store, A, b"old")
    reader = find(store, A)
    with pytest.raises(BlockingIOError, match="is being read"):
        publish(store, A, b"newer")
    assert reader.source(LoadOptions()).size("model") == 3
    reader.release()
    publish(store, A, b"newer")
    assert find(store, A).source(LoadOptions()).size("model") == 5


def test_who_has_published_leaves_the_next_writer_alone(tmp_path: Path) -> None:
    """A load discards what it reserved when it ends, published or not; by then another one may write that entry."""
    store = Store(tmp_path)
    first = store.reserve(A, 1000)
    first.publish({"note.json": b"1"}, {})
    second = store.reserve(A, 1000)
    first.discard()
    assert second.folder.is_dir()
    second.publish({"note.json": b"2"}, {})
    second.discard()
    assert find(store, A).read_json("note.json") == 2
    assert sorted(path.name for path in tmp_path.iterdir()) == [A, "lock"]


def test_writers_at_once(tmp_path: Path) -> None:
    """Whoever gets the entry publishes it, and nobody is disturbed by another one; `flock` is by open file."""
    store = Store(tmp_path)

    def write(name: int) -> int:
        published = 0
        for _ in range(40):
            try:
                unfinished = store.reserve(A, 1000)
            except BlockingIOError:
                continue
            unfinished.publish({"note.json": str(name).encode()}, {})
            unfinished.discard()
            published += 1
        return published

    with ThreadPoolExecutor(4) as pool:
        published = list(pool.map(write, range(4)))
    assert sum(published) > 1
    assert find(store, A).read_json("note.json") in range(4)
    assert sorted(path.name for path in tmp_path.iterdir()) == [A, "lock"]


@pytest.mark.parametrize("name", [ENTRY, CHECKSUMS])
def test_a_damaged_description_is_noticed(tmp_path: Path, name: str) -> None:
    store = Store(tmp_path)
    publish(store, A)
    intact = (tmp_path / A / name).read_bytes()
    for position in range(len(intact)):
        (tmp_path / A / name).write_bytes(intact[:position] + bytes([intact[position] ^ 1]) + intact[position + 1 :])
        with pytest.raises(DamagedEntryError):
            store.find(A)
    for content in (b"", intact[:-1], b"[]", b"null"):
        (tmp_path / A / name).write_bytes(content)
        with pytest.raises(DamagedEntryError):
            store.find(A)
    (tmp_path / A / name).unlink()
    with pytest.raises(DamagedEntryError):
        store.find(A)
    publish(store, A)
    find(store, A)


def test_an_entry_without_its_lock_is_none(tmp_path: Path) -> None:
    store = Store(tmp_path)
    publish(store, A)
    (tmp_path / A / "lock").unlink()
    assert store.find(A) is None
    publish(store, A)
    find(store, A)


def test_the_least_recently_used_makes_room(tmp_path: Path) -> None:
    publish(Store(tmp_path), A, bytes(1000))
    publish(Store(tmp_path), B, bytes(1000))
    use_at(Store(tmp_path), A, 2000)
    use_at(Store(tmp_path), B, 1000)
    publish(Store(tmp_path, limit=4000), C, bytes(1000), nbytes=2500)
    assert {path.name for path in tmp_path.iterdir()} == {A, C, "lock"}


def test_finding_is_using(tmp_path: Path) -> None:
    store = Store(tmp_path, limit=4000)
    publish(store, A, bytes(1000))
    publish(store, B, bytes(1000))
    use_at(store, A, 1000)
    use_at(store, B, 2000)
    find(store, A).release()
    publish(store, C, bytes(1000), nbytes=2500)
    assert {path.name for path in tmp_path.iterdir()} == {A, C, "lock"}


def test_what_is_in_use_stays(tmp_path: Path) -> None:
    store = Store(tmp_path, limit=4000)
    publish(store, A, bytes(1000))
    publish(store, B, bytes(1000))
    use_at(store, A, 1000)
    reader = find(store, A)
    use_at(store, A, 1000)
    publish(store, C, bytes(1000), nbytes=2500)
    assert {path.name for path in tmp_path.iterdir()} == {A, C, "lock"}
    others = [find(store, C)]
    with pytest.raises(OSError, match=r"what it holds is in use") as error:
        store.reserve(B, 4000)
    assert error.value.errno == errno.ENOSPC
    for each in (reader, *others):
        each.release()
    assert {path.name for path in tmp_path.iterdir()} == {A, C, "lock"}


def test_what_is_being_written_counts(tmp_path: Path) -> None:
    store = Store(tmp_path, limit=4000)
    unfinished = store.reserve(A, 3000)
    with pytest.raises(OSError, match=r"1.953 KiB beside 2.930 KiB are more than 3.906 KiB"):
        store.reserve(B, 2000)
    unfinished.discard()
    store.reserve(B, 2000).discard()


def test_nothing_is_removed_for_an_entry_larger_than_the_limit(tmp_path: Path) -> None:
    store = Store(tmp_path, limit=4000)
    publish(store, A)
    with pytest.raises(OSError, match=r"an entry of 3.907 KiB is larger than its limit, 3.906 KiB"):
        store.reserve(B, 4001)
    find(store, A)


def test_a_full_disk_is_made_room_on_or_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = Store(tmp_path)
    publish(store, A, bytes(1000))
    free = {"bytes": 500}
    monkeypatch.setattr(shutil, "disk_usage", lambda _: Usage(0, 0, free["bytes"]))
    with pytest.raises(OSError, match=r"needs more than the 500 B free there"):
        store.reserve(B, 5000)
    find(store, A).release()
    reader = find(store, A)
    with pytest.raises(OSError, match=r"more than the 500 B free there; what it holds is in use"):
        store.reserve(B, 1000)
    reader.release()
    monkeypatch.setattr(shutil, "disk_usage", lambda _: Usage(0, 0, 500 if (tmp_path / A).exists() else 1500))
    store.reserve(B, 1000).discard()
    assert store.find(A) is None


def test_folders_of_others_are_left_alone(tmp_path: Path) -> None:
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "lock").touch()
    (tmp_path / ("d" * 64)).mkdir()
    store = Store(tmp_path, limit=1100)
    publish(store, A)
    publish(store, B)
    assert {path.name for path in tmp_path.iterdir()} == {"photos", "d" * 64, "lock", A, B} - {A}


WRITE_AND_WAIT = """
import sys
from pathlib import Path
from quantload.cache.store import Store
for key in sys.argv[2:]:
    unfinished = Store(Path(sys.argv[1])).reserve(key, 1 << 20)
    (unfinished.folder / "model").write_bytes(bytes(100))
print(flush=True)
input()
"""


def test_a_killed_writer_leaves_nothing_that_looks_finished_and_is_cleared_away(tmp_path: Path) -> None:
    store = Store(tmp_path, limit=4000)
    command = [sys.executable, "-c", WRITE_AND_WAIT, str(tmp_path), A, B]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as writer:
        assert writer.stdout is not None
        writer.stdout.readline()
        with pytest.raises(BlockingIOError):
            store.reserve(A, 1000)
        assert (tmp_path / f"{WRITING}{A}" / "model").exists()
        writer.send_signal(signal.SIGKILL)
        writer.wait()
    (tmp_path / f"{REMOVED}old").mkdir()
    assert store.find(A) is None
    assert (tmp_path / f"{WRITING}{B}" / "model").exists()
    publish(store, A)
    assert {path.name for path in tmp_path.iterdir()} == {A, "lock"}


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_cache_that_may_only_be_read_is_read(tmp_path: Path) -> None:
    store = Store(tmp_path)
    publish(store, A)
    paths = [tmp_path, tmp_path / A, *(tmp_path / A).iterdir()]
    for path in paths:
        path.chmod(path.stat().st_mode & ~0o222)
    try:
        find(store, A).release()
        with pytest.raises(PermissionError):
            store.reserve(B, 1000)
    finally:
        for path in paths:
            path.chmod(path.stat().st_mode | 0o200)
