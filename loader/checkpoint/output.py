"""The folder a checkpoint is written to: under another name until all of it is on the disk, and resumed shard by shard.

Beside OUT stands `OUT.unfinished`: a folder `files` that will be OUT, and a journal with one line for what is being
written (its key) and one for each finished shard. A run that is killed leaves it behind, and the next one takes up the
shards whose bytes are those the journal says.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from ..errors import OutputError
from .writer import UNFINISHED_SUFFIX, Extent, ShardPlan, verified

UNFINISHED = ".unfinished"
_JOURNAL = "journal.jsonl"
_FILES = "files"
_COPY_BYTES = 1 << 20


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
            if not self._published:
                self._tidy()
        finally:
            os.close(self._journal)  # until then nobody else begins here

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

    def write(self, name: str, data: bytes) -> None:
        """Write a small file and flush it."""
        with self._explained(), (self.files / name).open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())

    def copy(self, source: Path, name: str) -> None:
        """Copy a file and flush it."""
        with self._explained():
            target = self.files / name
            target.parent.mkdir(parents=True, exist_ok=True)
            with source.open("rb") as read, target.open("wb") as file:
                shutil.copyfileobj(read, file, _COPY_BYTES)
                file.flush()
                os.fsync(file.fileno())

    def publish(self) -> None:
        """Everything is written: give it its name."""
        with self._explained():
            for folder, *_ in os.walk(self.files):
                sync_folder(Path(folder))
            os.rename(self.files, self.out)
            self._published = True
            sync_folder(self.out.parent)
            self._leave()

    def _take(self) -> None:
        self.out.parent.mkdir(parents=True, exist_ok=True)
        self._work.mkdir(exist_ok=True)
        strangers = {path.name for path in self._work.iterdir()} - {_JOURNAL, _FILES}
        if strangers:
            raise OutputError(
                f"{self._work} holds {', '.join(sorted(strangers)[:3])}, which is none of ours; move it away, "
                f"or give another folder than {self.out}"
            )
        self._journal = os.open(self._work / _JOURNAL, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o666)
        try:
            self._lock()
            self._read_journal()
        except BaseException:
            os.close(self._journal)
            raise

    def _lock(self) -> None:
        """Take the journal, which another run may hold, or may have published and removed since it was opened."""
        try:
            fcntl.flock(self._journal, fcntl.LOCK_EX | fcntl.LOCK_NB)
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
        os.unlink(self._work / _JOURNAL)
        with contextlib.suppress(OSError):
            os.rmdir(self._work)

    def _read_journal(self) -> None:
        lines = list(_parsed((self._work / _JOURNAL).read_bytes()))
        if not lines or lines[0] != {"key": self._key}:
            shutil.rmtree(self.files, ignore_errors=True)
            os.truncate(self._journal, 0)
            self._append({"key": self._key})
            lines.clear()
        for line in lines[1:]:
            extents = [Extent(*extent) for extent in line["extents"]]
            self._finished[line["shard"]] = _Finished(extents, line["notes"])
        self.files.mkdir(exist_ok=True)

    def _append(self, line: Mapping[str, Any]) -> None:
        # A line that a killed run left half written ends here, and is skipped when the journal is read.
        os.write(self._journal, b"\n" + json.dumps(line).encode())
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


def _parsed(journal: bytes) -> Iterator[dict[str, Any]]:
    for line in journal.split(b"\n"):
        with contextlib.suppress(ValueError):
            yield json.loads(line)


def sync_folder(folder: Path) -> None:
    """Force the names in a folder to the disk."""
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
