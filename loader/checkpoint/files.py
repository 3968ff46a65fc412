"""Where the files of a checkpoint are, as far as a load has to know: a folder here, or one that is elsewhere."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple, Protocol

from ..errors import QuantloadError
from ..options import LoadOptions
from .identity import FileIdentities
from .other_kinds import folder_error
from .paths import locate
from .samples import sampled
from .source import ColdBefore, FileSource, Reads, Source


class ReadAhead(NamedTuple):
    """What a source takes beside the buffers of a load, in bytes: its own buffers, and what a library of its takes."""

    buffer_bytes: int = 0
    library_bytes: int = 0

    def left(self, options: LoadOptions) -> LoadOptions:
        """The options with what is left of the staging arena for the buffers of the load."""
        if options.staging_bytes is None or not self.buffer_bytes:
            return options
        return replace(options, staging_bytes=max(options.staging_bytes - self.buffer_bytes, 1))


NoteSource = Callable[[Mapping[str, int], int, int, int], None]


class Fetches(NamedTuple):
    """What a run will ask of a server: bytes that its pieces need, bytes of all requests, and how many those are."""

    needed_bytes: int
    fetched_bytes: int
    requests: int


class CheckpointFiles(Protocol):
    """The files of one checkpoint, and what they were when they were first looked at."""

    def source(self, options: LoadOptions | None = None) -> Source:
        """To read from; the options say how."""

    def read_ahead(self, options: LoadOptions, total_bytes: int) -> ReadAhead:
        """What a source takes for a load of so many bytes."""

    def gather(self, patterns: Iterable[str]) -> None:
        """Have the small files in the folder of the checkpoint whose names match."""

    def note(self, names: Iterable[str]) -> None:
        """Remember files that somebody else will read, and those that are missing as missing."""

    def version(self, name: str) -> tuple[str | int | None, ...]:
        """What tells a file that was looked at from any other version of it, now and here."""

    def fingerprint(self, name: str) -> tuple[str | int | None, ...]:
        """What tells a file of weights from any other, also on another day and in another place."""

    def check_unchanged(self) -> None:
        """Raise `ChangedFileError` unless all files are what they were when they were first looked at."""

    def foresee(self, batches: Iterable[Reads], options: LoadOptions) -> Fetches | None:
        """What will be asked of a server for a run; None where there is none."""

    def tell(self, note: NoteSource) -> None:
        """Say what was asked of a server so far, if one was: requests by result, retries, bytes, connections."""

    def no_model(self, *, has_config: bool) -> QuantloadError:
        """The error for where there is no model, or a config without weights."""

    def close(self) -> None:
        """Give back what the checkpoint has on this disk for itself alone."""


class FolderFiles:
    """Files of a folder here."""

    def __init__(self, root: Path) -> None:
        self._root = root
        self.identities = FileIdentities(root)
        self.cold_before: dict[str, ColdBefore] = {}
        """What was not in the page cache before it was brought in, by the name of the file."""

    def source(self, options: LoadOptions | None = None) -> Source:
        """The files as they lie there."""
        options = options or LoadOptions()
        return FileSource(
            self._root, page_cache=options.page_cache, retries=options.retries, identities=self.identities,
            cold_before=self.cold_before,
        )  # fmt: skip

    def read_ahead(self, options: LoadOptions, total_bytes: int) -> ReadAhead:
        """Nothing: the page cache is the system's."""
        return ReadAhead()

    def gather(self, patterns: Iterable[str]) -> None:
        """They are there."""

    def note(self, names: Iterable[str]) -> None:
        """Remember files that somebody else will read, and those that are missing as missing."""
        self.identities.note(names)

    def version(self, name: str) -> tuple[str | int | None, ...]:
        """Size and times of change."""
        identity = self.identities[name]
        return identity.size, identity.mtime_ns, identity.ctime_ns

    def fingerprint(self, name: str) -> tuple[str | int | None, ...]:
        """Of its header and of samples of its weights, its size and time of change (ns)."""
        with locate(self._root, name).open("rb") as file:
            status = os.fstat(file.fileno())
            self.identities.compare(name, status)
            return sampled(file, status.st_size), status.st_size, status.st_mtime_ns

    def check_unchanged(self) -> None:
        """Raise `ChangedFileError` unless all files are what they were when they were first looked at."""
        self.identities.check_unchanged()

    def foresee(self, batches: Iterable[Reads], options: LoadOptions) -> Fetches | None:
        """Nothing is asked of a server."""
        return None

    def tell(self, note: NoteSource) -> None:
        """Nothing was asked of a server."""

    def no_model(self, *, has_config: bool) -> QuantloadError:
        """The error for where there is no model, or a config without weights."""
        return folder_error(self._root, has_config=has_config)

    def close(self) -> None:
        """Nothing is there for the checkpoint alone."""
