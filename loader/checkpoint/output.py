"""The folder a checkpoint is written to: under another name until all of it is on the disk, and resumed shard by shard.

Beside OUT stands `OUT.unfinished`: a folder `files` that will be OUT, and a journal with one line for what is being
written (its key) and one for each finished shard, each with its checksum. A run that is killed leaves it behind, and
the next one takes up the shards whose bytes are those the journal says; what a damaged line said is done anew. Both
are taken up only where this user made them: in a folder that others may write to, they could be anybody's.
"""

from __future__ import annotations

import contextlib
import errno
import json
import logging
import os
import shutil
import stat
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from ..errors import OutputError
from ..kernels.system_calls import SHARES_LOCKS, lock, open_plain, sync_folder, user_owns
from .writer import UNFINISHED_SUFFIX, Extent, ShardPlan, create_file, verified

logger = logging.getLogger("quantload")
UNFINISHED = ".unfinished"
_JOURNAL = "journal.jsonl"
_FILES = "files"


@dataclass(frozen=True, slots=True)
class _Finished:
    extents: list[Extent]
    notes: dict[str, Any]


class OutputFolder:
    """OUT on its way; `key` says what is being written, and only work with the same key is taken up.

    Use it as a context manager. Without `publish` nothing stands at OUT; what is finished stays for the next run.
    Raises `OutputError` where OUT exists, another run is writing it, or the disk says no.
    """

    def __init__(self, out: Path, key: str) -> None:
        self.out = Path(os.path.abspath(out.expanduser()))
        self._key = key
        self._work = self.out.with_name(self.out.name + UNFINISHED)
        self.files = self._work / _FILES
        self._finished: dict[str, _Finished] = {}
        self._journal = -1
        self._published = False

    def __enter__(self) -> Self:
        self._check_absent()
        with self._explained():
            self._take()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if not SHARES_LOCKS:  # nor can a file be removed there that is open
                self._close_journal()
            if kind is not None and self._finished:
                logger.warning(
                    "Finished files of weights (%d) stay in %s: the same conversion, run again, goes on from there",
                    *(len(self._finished), self._work),
                )
            if not self._published:
                with contextlib.suppress(OSError):  # the next run clears it away; what went wrong before is what counts
                    self._tidy()
        finally:
            self._close_journal()  # until then nobody else begins here

    def finished(self, plan: ShardPlan) -> dict[str, Any] | None:
        """The notes of a shard that an earlier run finished, if it is still what it was; `None`: it must be written."""
        found = self._finished.get(plan.path)
        if found is None or not verified(self.files / plan.path, plan, found.extents):
            return None
        return found.notes

    def record(self, plan: ShardPlan, extents: Sequence[Extent], notes: Mapping[str, Any]) -> None:
        """A shard has its name and is on the disk; `notes`, JSON-able, are given to who takes it up."""
        line = {"shard": plan.path, "extents": list(extents), "notes": notes}
        with self._explained():
            self._append(line)
        self._finished[plan.path] = _Finished(list(extents), dict(notes))

    def write(self, name: str, parts: Iterable[bytes | bytearray]) -> None:
        """Write a small file, in parts, and flush it."""
        with self._explained():
            path = self.files / name
            path.parent.mkdir(parents=True, exist_ok=True)
            with open(create_file(path), "wb") as file:
                for part in parts:
                    file.write(part)
                file.flush()
                os.fsync(file.fileno())

    def size(self) -> int:
        """Bytes of all files so far."""
        with self._explained():
            return sum(path.stat().st_size for path in self.files.rglob("*") if path.is_file())

    def publish(self) -> None:
        """Everything is written: give it its name."""
        with self._explained():
            for folder, *_ in os.walk(self.files):
                sync_folder(Path(folder))
            os.rename(self.files, self.out)
            self._published = True
            try:
                sync_folder(self.out.parent)
            finally:
                self._leave()

    def _take(self) -> None:
        self.out.parent.mkdir(parents=True, exist_ok=True)
        self._make_own(self._work)
        strangers = {path.name for path in self._work.iterdir()} - {_JOURNAL, _FILES}
        if strangers:
            raise OutputError(
                f"{self._work} holds {', '.join(sorted(strangers)[:3])}, which is none of ours; move it away, "
                f"or give another folder than {self.out}"
            )
        self._journal = self._open_journal()
        try:
            self._lock()
            self._read_journal()
        except BaseException:
            self._close_journal()
            raise

    def _make_own(self, folder: Path) -> None:
        """Make a folder; one that is there already must be a folder itself, and this user's."""
        try:
            folder.mkdir()
        except FileExistsError:
            status = folder.lstat()
            if not stat.S_ISDIR(status.st_mode) or not user_owns(status):
                raise self._not_ours(folder, "folder") from None

    def _open_journal(self) -> int:
        path, flags = self._work / _JOURNAL, os.O_RDWR | os.O_APPEND
        with contextlib.suppress(FileExistsError):
            return open_plain(path, flags | os.O_CREAT | os.O_EXCL, follow=False)
        try:
            fd = open_plain(path, flags, follow=False)
        except OSError as error:
            if error.errno != errno.ELOOP:
                raise
            raise self._not_ours(path, "file") from None
        status = os.fstat(fd)
        if not stat.S_ISREG(status.st_mode) or not user_owns(status) or status.st_nlink > 1:
            os.close(fd)
            raise self._not_ours(path, "file")
        return fd

    def _not_ours(self, path: Path, kind: str) -> OutputError:
        return OutputError(
            f"{path} is a link, belongs to another user, or is no {kind}; remove it, or give another folder than "
            f"{self.out}"
        )

    def _lock(self) -> None:
        """Take the journal, which another run may hold, or may have published and removed since it was opened."""
        try:
            lock(self._journal)
            ours = os.path.samestat(os.fstat(self._journal), os.stat(self._work / _JOURNAL))
        except (BlockingIOError, FileNotFoundError):
            ours = False
        if not ours:
            raise OutputError(f"another run is writing {self.out}; wait for it, or give another folder")
        if os.path.lexists(self.out):
            if not self.files.exists():  # published since we looked; we have just made what there is
                self._leave()
            self._check_absent()

    def _check_absent(self) -> None:
        if os.path.lexists(self.out):
            raise OutputError(f"{self.out} exists; give a folder that does not, or remove it first")

    def _tidy(self) -> None:
        """Keep what the next run can take up."""
        if not self._work.exists():
            return
        for part in self.files.glob(f"*{UNFINISHED_SUFFIX}"):
            part.unlink()
        if not self._finished:
            shutil.rmtree(self._work)

    def _leave(self) -> None:
        """Remove the folder the work was done in, unless another run has begun there since the journal is gone."""
        if not SHARES_LOCKS:
            self._close_journal()
        os.unlink(self._work / _JOURNAL)
        with contextlib.suppress(OSError):
            os.rmdir(self._work)

    def _close_journal(self) -> None:
        if self._journal >= 0:
            journal, self._journal = self._journal, -1
            os.close(journal)

    def _read_journal(self) -> None:
        with open(self._journal, "rb", closefd=False) as journal:
            lines = list(_intact(journal.read()))
        if {"key": self._key} in lines:
            self._make_own(self.files)
        else:
            self._begin_anew()
            lines.clear()
        for line in lines:
            if "shard" in line:
                extents = [Extent(*extent) for extent in line["extents"]]
                self._finished[line["shard"]] = _Finished(extents, line["notes"])

    def _begin_anew(self) -> None:
        if os.path.lexists(self.files):
            self._make_own(self.files)  # else a link would be followed
            shutil.rmtree(self.files)
        os.truncate(self._journal, 0)
        self._append({"key": self._key})
        self.files.mkdir()

    def _append(self, line: Mapping[str, Any]) -> None:
        # A line that a killed run or a full disk left half written ends here, and is skipped when the journal is read.
        data = memoryview(b"\n" + _with_checksum(json.dumps(line).encode()))
        while data:
            data = data[os.write(self._journal, data) :]
        os.fsync(self._journal)

    @contextlib.contextmanager
    def _explained(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise OutputError(
                f"{error.filename or self.out} cannot be written: {error.strerror}; make room or choose another "
                "folder, and run it again"
            ) from error


def _with_checksum(line: bytes) -> bytes:
    return b"%08x %b" % (zlib.crc32(line), line)


def _intact(journal: bytes) -> Iterator[dict[str, Any]]:
    """What the lines say that are as they were written."""
    for line in journal.split(b"\n"):
        said = line[9:]
        if line == _with_checksum(said):
            yield json.loads(said)
