"""One range of a remote file, asked for until it is there: retries with growing pauses, and what a version must be."""

from __future__ import annotations

import logging
import random
import threading
import time
from collections.abc import Callable
from typing import BinaryIO

from ...errors import ChangedFileError, CheckpointError, MissingShardError, TruncatedShardError
from ..crew import Stopped
from .client import (
    Answer,
    ChangedError,
    Client,
    Counters,
    MissingError,
    PassingError,
    RefusedError,
    RemoteError,
    Tag,
)

RETRIES = 10
FIRST_PAUSE, LONGEST_PAUSE = 0.25, 10.0
"""Seconds; each pause is twice as long as the one before, and between half and all of that."""
SECONDS_BETWEEN_WARNINGS = 1.0
"""How often at most it is said that something is asked again."""
_TICK = 0.05
logger = logging.getLogger("quantload")


class Requests:
    """Asks a client for ranges, remembers the versions of all files it has seen, and counts; callable from threads.

    What may pass is asked for again, `retries` times in a row without a byte; what has come stays. Raises
    `MissingShardError`, `ChangedFileError`, `TruncatedShardError` or `CheckpointError`, with no credentials in it, and
    `Stopped` once `stopping()` is true.
    """

    def __init__(self, client: Client, retries: int | None = None, known: dict[str, Tag | None] | None = None) -> None:
        self.client = client
        self.counters = Counters()
        self.known: dict[str, Tag | None] = {} if known is None else known
        self._retries = RETRIES if retries is None else retries
        self._lock = threading.Lock()
        self._said_at = -SECONDS_BETWEEN_WARNINGS

    def beginning(self, name: str, nbytes: int, stopping: Callable[[], bool]) -> bytes:
        """The first `nbytes` bytes of a file, or all of a smaller one; the version of the file is known then."""
        found = bytearray()

        def attempt(answer: Answer) -> None:
            found.clear()
            for chunk in answer.chunks:
                self._arrived(chunk, stopping)
                found.extend(chunk)
            if len(found) != min(nbytes, answer.tag.size):
                raise PassingError("short", f"{len(found):,} bytes came where {min(nbytes, answer.tag.size):,} should")

        self._until_there(name, lambda: (0, nbytes), attempt, lambda: False, stopping)
        return bytes(found)

    def copy(self, name: str, file: BinaryIO, most: int, stopping: Callable[[], bool]) -> None:
        """Copy a file of at most `most` bytes into another; `CheckpointError` for a larger one."""

        def attempt(answer: Answer) -> None:
            if answer.tag.size > most:
                raise RefusedError(f"it has {answer.tag.size:,} bytes, such a file may have {most:,}")
            file.seek(0)
            file.truncate()
            for chunk in answer.chunks:
                self._arrived(chunk, stopping)
                file.write(chunk)
            if file.tell() != answer.tag.size:
                raise PassingError("short", f"{file.tell():,} bytes came where {answer.tag.size:,} should")

        self._until_there(name, lambda: (0, most), attempt, lambda: False, stopping)

    def fill(self, name: str, start: int, into: memoryview, stopping: Callable[[], bool]) -> None:
        """Fill a buffer from byte `start` on; raises `TruncatedShardError` where the file ends before."""
        done, total = 0, len(into)
        size = self.size(name, stopping)
        if start + total > size:
            raise TruncatedShardError(
                f"{name}: {size:,} bytes at {self.client.shown}, while bytes up to {start + total:,} were expected; it "
                f"was never complete: upload it again"
            )

        def attempt(answer: Answer) -> None:
            nonlocal done
            for chunk in answer.chunks:
                self._arrived(chunk, stopping)
                if done + len(chunk) > total:
                    raise PassingError("wrong_range", "more bytes came than were asked for")
                into[done : done + len(chunk)] = chunk
                done += len(chunk)
            if done < total:
                raise PassingError("short", f"{total - done:,} bytes of {total:,} did not come")

        before = 0

        def moved() -> bool:
            nonlocal before
            before, last = done, before
            return done > last

        if total:
            self._until_there(name, lambda: (start + done, start + total), attempt, moved, stopping)

    def size(self, name: str, stopping: Callable[[], bool]) -> int:
        """Bytes of a file."""
        tag = self.known.get(name)
        if tag is None:
            self.beginning(name, 1, stopping)
            tag = self.known[name]
        assert tag is not None
        return tag.size

    def note(self, name: str, stopping: Callable[[], bool]) -> None:
        """Remember which version of a file is there, or that none is; raises where it was another before."""
        try:
            self.beginning(name, 1, stopping)
        except MissingShardError:
            self._compare(name, None)

    def names(self, stopping: Callable[[], bool]) -> list[str] | None:
        """The names of all files; None where the server lists none. `CheckpointError` where there is no folder."""
        failures = 0
        while True:
            try:
                found = self.client.names()
                self._count("ok")
                return found
            except PassingError as error:
                failures += 1
                self._count(error.kind)
                if failures > self._retries:
                    raise CheckpointError(
                        f"{self.client.shown} cannot be read after {failures} tries: {error}; check the network and "
                        f"the server"
                    ) from None
                self._asks_again("", failures, error)
                _pause(failures, stopping)
            except MissingError as error:
                self._count("missing")
                raise CheckpointError(
                    f"{self.client.shown}: no such folder{_answer(error)}; check the address"
                ) from None
            except RemoteError as error:
                self._count("refused")
                raise CheckpointError(f"{self.client.shown} cannot be read: {error}; {self.client.login}") from None

    def _until_there(
        self,
        name: str,
        span: Callable[[], tuple[int, int]],
        attempt: Callable[[Answer], None],
        moved: Callable[[], bool],
        stopping: Callable[[], bool],
    ) -> None:
        failures = 0
        while True:
            if stopping():
                raise Stopped
            try:
                answer = self.client.get(name, *span(), self.known.get(name))
                self._compare(name, answer.tag)
                attempt(answer)
                self._count("ok")
                return
            except PassingError as error:
                failures = 0 if moved() else failures + 1
                self._count(error.kind)
                if failures > self._retries:
                    raise self._gave_up(name, span()[0], failures, error) from None
                self._asks_again(f"/{name}", failures, error)
                _pause(max(failures, 1), stopping)
            except RemoteError as error:
                raise self._final(name, error) from None  # what the library says may have credentials in it

    def _final(self, name: str, error: RemoteError) -> CheckpointError:
        where = self.client.shown
        if isinstance(error, MissingError):
            self._count("missing")
            if self.known.get(name) is not None:
                return _changed(name, where, "it is no longer there")
            return MissingShardError(
                f"{name}: no such file at {where}{_answer(error)}; check the address, or upload it again"
            )
        if isinstance(error, ChangedError):
            self._count("changed")
            return _changed(name, where, "another version is in its place")
        self._count("refused")
        advice = f"; {self.client.login}" if isinstance(error, RefusedError) and error.credentials else ""
        return CheckpointError(f"{name}: cannot be read from {where}: {error}{advice}")

    def _gave_up(self, name: str, offset: int, failures: int, error: PassingError) -> CheckpointError:
        tries = f" after {failures} tries in a row" if failures > 1 else ""
        return CheckpointError(
            f"{name}: cannot be read from {self.client.shown} at byte {offset:,}{tries}: {error}; check the network "
            f"and the server, or ask it for less at once with fewer connections"
        )

    def _compare(self, name: str, found: Tag | None) -> None:
        with self._lock:
            known = self.known.setdefault(name, found)
            same = known == found
            if known is not None and found is not None:
                same = not known.is_another(found)
                if same:
                    self.known[name] = known.with_what(found)
        if not same:
            self._count("changed")
            raise _changed(name, self.client.shown, _difference(known, found))

    def _asks_again(self, where: str, failures: int, error: PassingError) -> None:
        with self._lock:
            self.counters.retries += 1
            now = time.monotonic()
            says = now - self._said_at >= SECONDS_BETWEEN_WARNINGS
            if says:
                self._said_at = now
        if says:
            tries = f" ({failures} of at most {self._retries} times in a row)" if failures else ""
            logger.warning("%s%s: %s; asked again%s", self.client.shown, where, error, tries)

    def _arrived(self, chunk: bytes, stopping: Callable[[], bool]) -> None:
        if stopping():
            raise Stopped
        with self._lock:
            self.counters.nbytes += len(chunk)

    def _count(self, result: str) -> None:
        with self._lock:
            self.counters.requests[result] = self.counters.requests.get(result, 0) + 1


def _answer(error: MissingError) -> str:
    return f" ({error})" if str(error) else ""


def _changed(name: str, where: str, how: str) -> ChangedFileError:
    return ChangedFileError(
        f"{name}: changed at {where} while it was read ({how}); nothing of it is used: let whatever writes there "
        f"finish, and run it again"
    )


def _difference(known: Tag | None, found: Tag | None) -> str:
    if known is None:
        return "it was not there before"
    if found is None:
        return "it is no longer there"
    if known.size != found.size:
        return f"{known.size:,} bytes before, {found.size:,} now"
    return "another version is in its place"


def _pause(failures: int, stopping: Callable[[], bool]) -> None:
    seconds = min(FIRST_PAUSE * 2.0 ** min(failures - 1, 20), LONGEST_PAUSE) * random.uniform(0.5, 1.0)
    end = time.monotonic() + seconds
    while (left := end - time.monotonic()) > 0:
        if stopping():
            raise Stopped
        time.sleep(min(left, _TICK))


def nothing_stops() -> bool:
    """For what goes on to its end."""
    return False
