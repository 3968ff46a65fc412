"""A folder of entries: found by key, written under another name and renamed, the least recently used removed first.

    <root>/<key>/                     a finished entry; its `lock` is held, shared, by those who read it
    <root>/.quantload-writing-<key>/  an entry being written; its `lock` is held, alone, by the one who writes it
    <root>/.quantload-removed-*/      on its way out
    <root>/lock                       held, briefly, by the one who makes room

A process that is killed leaves no lock, and at most a folder that the next writer clears away. Folders are made for
this user alone, and one that others can write to is neither read nor written.
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
import shutil
import uuid
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from ..errors import DamagedEntryError
from ..kernels.system_calls import sync_folder
from ..memory.amounts import format_bytes
from .checksums import Checksums
from .entry import ENTRY, LOCK, Entry, write_description, write_file
from .locks import FileLock
from .ownership import check_folder

WRITING, REMOVED = ".quantload-writing-", ".quantload-removed-"
_KEY = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True)
class Unfinished:
    """An entry that is being written, which nobody else can see or remove."""

    store: Store
    folder: Path
    key: str
    lock: FileLock

    def publish(self, small: Mapping[str, bytes], checksums: Mapping[str, Checksums]) -> None:
        """Add the small files, and make it an entry: the files `checksums` are of must be on disk already.

        Raises `BlockingIOError` where an entry of the key is being read, its files opened by their names: it stays.
        """
        known = dict(checksums)
        for name, data in small.items():
            write_file(self.folder / name, data)
            known[name] = Checksums((0, len(data)))
            known[name].note(0, memoryview(data))
        write_description(self.folder, self.key, known)
        sync_folder(self.folder)
        with self.store.alone():
            final = self.store.root / self.key
            if not _put_away_unread(final):
                raise BlockingIOError(errno.EWOULDBLOCK, "an entry of the same load is being read", str(final))
            self.folder.rename(final)
            sync_folder(self.store.root)
        self.lock.release()

    def discard(self) -> None:
        """Leave nothing of it; does nothing once it is published, when the folder may be another writer's.

        What the disk does not let go of, the next writer clears away: whoever discards has another error to tell, or
        none that matters to the model.
        """
        try:
            with contextlib.suppress(OSError):
                if self.lock.is_on(self.folder / LOCK):
                    _put_away(self.folder)
        finally:
            self.lock.release()


class Store:
    """The entries below `root`, together at most `limit` bytes (None: as many as the disk takes)."""

    def __init__(self, root: Path, limit: int | None = None) -> None:
        self.root = root
        self._limit = limit

    def find(self, key: str) -> Entry | None:
        """The entry of a key, locked against removal, as just used.

        Raises `DamagedEntryError` where it is there and its description is not what was written, or others could have
        written it, and `PermissionError` where others may write to the root.
        """
        folder = self.root / key
        if not os.path.lexists(folder):
            return None
        check_folder(self.root, links=True)
        try:
            check_folder(folder)
            lock = FileLock.shared(folder / LOCK)
        except FileNotFoundError:  # it was removed meanwhile
            return None
        except PermissionError as error:
            raise DamagedEntryError(str(error)) from error
        if lock is None:
            return None
        try:
            lock.touch()  # unless the cache may only be read, where nothing is removed either
            return Entry.open(folder, lock)
        except BaseException:
            lock.release()
            raise

    def reserve(self, key: str, nbytes: int) -> Unfinished:
        """Room for an entry of `nbytes` that replaces any of its key.

        Removes the least recently used entries that nobody is reading. Raises `BlockingIOError` while another process
        writes the entry, and other `OSError`s where the folder cannot be written to, or cannot have that much room.
        """
        self.root.mkdir(mode=0o700, parents=True, exist_ok=True)
        check_folder(self.root, links=True)
        folder = self.root / f"{WRITING}{key}"
        with contextlib.suppress(FileExistsError):  # of a killed process, or of one that is at it
            folder.mkdir(mode=0o700)
        lock = None
        with contextlib.suppress(FileNotFoundError):  # who makes room takes it for one that a killed process left
            check_folder(folder)
            lock = FileLock.exclusive(folder / LOCK, create=True)
        if lock is None:
            raise BlockingIOError(errno.EWOULDBLOCK, "another process is writing the entry", str(folder))
        unfinished = Unfinished(self, folder, key, lock)
        try:
            lock.note(0)  # what a killed process had reserved
            _clear(folder)
            with self.alone():
                self._make_room(key, nbytes)
                lock.note(nbytes)
        except BaseException:
            unfinished.discard()
            raise
        return unfinished

    @contextlib.contextmanager
    def alone(self) -> Iterator[None]:
        """Meanwhile nobody else adds or removes an entry."""
        lock = FileLock.exclusive(self.root / LOCK, create=True, wait=True)
        if lock is None:
            raise FileNotFoundError(errno.ENOENT, f"{self.root / LOCK} was removed while it was waited for")
        with lock:
            yield

    def _make_room(self, key: str, nbytes: int) -> None:
        for path in self.root.glob(f"{REMOVED}*"):
            shutil.rmtree(path, ignore_errors=True)
        for path in self.root.glob(f"{WRITING}*"):
            _remove(path)  # what a killed process left: nobody holds its lock
        _remove(self.root / key)
        entries = sorted(self._entries(), key=_last_used)
        self._check_possible(nbytes, sum(map(_size, entries)))
        for path in entries:
            if self._lack(nbytes) is None:
                return
            _remove(path)
        problem = self._lack(nbytes)
        if problem is not None:
            raise OSError(errno.ENOSPC, f"{problem}; what it holds is in use")

    def _check_possible(self, nbytes: int, removable: int) -> None:
        """Raise `OSError` where removing all there is would not make room."""
        if self._limit is not None and nbytes > self._limit:
            raise OSError(
                errno.ENOSPC,
                f"an entry of {format_bytes(nbytes)} is larger than its limit, {format_bytes(self._limit)}",
            )
        free = shutil.disk_usage(self.root).free
        if nbytes > free + removable:
            raise OSError(
                errno.ENOSPC, f"an entry of {format_bytes(nbytes)} needs more than the {format_bytes(free)} free there"
            )

    def _lack(self, nbytes: int) -> str | None:
        """Why there is no room for `nbytes` more, or None."""
        held = sum(map(_size, (*self._entries(), *self.root.glob(f"{WRITING}*"))))
        free = shutil.disk_usage(self.root).free
        if self._limit is not None and held + nbytes > self._limit:
            return f"{format_bytes(nbytes)} beside {format_bytes(held)} are more than {format_bytes(self._limit)}"
        return f"{format_bytes(nbytes)} are more than the {format_bytes(free)} free there" if nbytes > free else None

    def _entries(self) -> list[Path]:
        named = (path for path in self.root.iterdir() if _KEY.fullmatch(path.name))
        return [path for path in named if any((path / name).is_file() for name in (LOCK, ENTRY))]


def _remove(folder: Path) -> None:
    """Remove an entry, finished or not, unless somebody is using it or may be: a lock of others cannot be taken."""
    lock = None
    with contextlib.suppress(PermissionError):
        lock = FileLock.exclusive(folder / LOCK, create=True)
    if lock is not None:
        with lock:
            _put_away(folder)


def _put_away_unread(folder: Path) -> bool:
    """Put away what is in the place of a new entry; false where somebody is reading it."""
    lock = None
    if not folder.is_symlink() and (folder / LOCK).is_file():
        with contextlib.suppress(PermissionError):  # nobody reads what is not this user's
            lock = FileLock.exclusive(folder / LOCK)
            if lock is None:
                return False
    with lock or contextlib.nullcontext():
        _put_away(folder)
    return True


def _clear(folder: Path) -> None:
    """Remove what a killed process left of an entry."""
    for left in folder.iterdir():
        if left.name != LOCK:
            left.unlink()


def _put_away(folder: Path) -> None:
    """Take a folder out of sight at once, then remove it."""
    away = folder.parent / f"{REMOVED}{uuid.uuid4().hex}"
    try:
        folder.rename(away)
    except FileNotFoundError:
        return
    shutil.rmtree(away, ignore_errors=True)


def _last_used(folder: Path) -> int:
    """Time in ns; 0 for a damaged entry."""
    lock = folder / LOCK
    return lock.stat().st_mtime_ns if lock.exists() else 0


def _size(folder: Path) -> int:
    """Bytes of a finished entry; of an unfinished one those it has reserved."""
    if not folder.name.startswith(WRITING):
        return sum(path.stat().st_size for path in folder.iterdir())
    with contextlib.suppress(FileNotFoundError):  # its writer has just given up
        return int((folder / LOCK).read_text() or 0)
    return 0
